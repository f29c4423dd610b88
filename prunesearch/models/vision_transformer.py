"""Schedules in timm's VisionTransformer and VisionTransformerDistilled (ViT, DeiT, DINOv2, CLIP, SigLIP, ...).

The classes of the model, of `blocks`, of each block and of its attention are swapped for subclasses. Each is called as
a module, with a tensor, and returns a tensor, as in timm. Whatever else a step needs or returns is passed in a `call`,
an object that hooks, FSDP and mixed precision do not change. Without a call the subclasses run timm's own code.
Checked against timm 1.0.31. Letters in tensor names as in `tokens/inputs.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prunesearch.errors import ModelError
from prunesearch.models.masked_step import Group, compact, join_groups, split_by_count, take_masked_step
from prunesearch.models.plan import (
    PARTS,
    BlockPlan,
    Plan,
    PlannedStep,
    StageParts,
    make_plan,
    plan_for,
)
from prunesearch.models.step import Evidence, TokenState, gather_evidence, mean_keys, take_step
from prunesearch.models.swap import (
    Place,
    Swapped,
    check_methods,
    check_takes_call,
    check_was_called,
    timm_class,
)
from prunesearch.models.trace import ModelCall, Trace
from prunesearch.models.vit_shape import channels_of, gate_of
from prunesearch.models.vit_shape import shape_of as shape_of
from prunesearch.schedule import Schedule, reads_attention
from prunesearch.shape import ModelShape
from prunesearch.tokens.inputs import Attended
from prunesearch.tokens.select import in_onnx_export

MOST_GROUPS = 8
"""Most groups into which a batch is split when its images have different counts; measured in benchmarks/adaptive.md."""
MOST_GAP = 10.0
"""Bound in nats on the gap between the logit of an absent key and the largest present one, in gradients to predictors.
Gaps of 17 nats and more occur when few tokens stay. Without the bound one image would then outweigh a whole batch."""
SUPPORTS = "timm VisionTransformer and VisionTransformerDistilled with plain blocks"


class Run(NamedTuple):
    """One forward pass. masked: tokens stay in their slots from the first learned decision on, as in training."""

    plan: Plan
    parts: nn.ModuleDict | None
    training: bool
    masked: bool


class BlocksCall:
    """Passed to `blocks` in one pass, besides the tokens. The blocks set `left`, the state after them.

    Neither this nor `BlockCall` is a dataclass, because FSDP would copy it and look for tensors in it.
    """

    def __init__(self, run: Run, checkpointed: bool) -> None:
        self.run, self.checkpointed = run, checkpointed
        self.left: TokenState | None = None


class BlockCall:
    """Passed to a block that runs steps, and to its attention, besides the tokens.

    most_gap: for `masked_softmax`, when the attention must pass gradients to earlier decisions; else None.
    The attention sets `attended`. The block sets `left`, its state before the MLP, and `ahead`, the evidence of later
    stages.
    """

    def __init__(self, index: int, run: Run, state: TokenState, most_gap: float | None) -> None:
        self.index, self.run, self.state, self.most_gap = index, run, state, most_gap
        self.plan: BlockPlan = run.plan.blocks[index]
        self.attended: Attended | None = None
        self.left: TokenState | None = None
        self.ahead: tuple[Evidence, ...] = ()


class AttendingAttention(Swapped, Attention):
    """timm's Attention. With a call, it sets `call.attended` for scorers."""

    stands_for = Attention

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, *args: Any, call: BlockCall | None = None, **kwargs: Any
    ) -> Tensor:
        """Tokens (B, N, C) to what is added to them, (B, N, C)."""
        if call is None:
            return Attention.forward(self, x, attn_mask, *args, **kwargs)
        shape, present_Bn = call.run.plan.shape, call.state.present_Bn
        x, call.attended = attend(self, x, attn_mask, shape, present_Bn, call.most_gap, call.plan.needs_keys)
        return x


class ReducedBlock(Swapped, Block):
    """timm's Block. With a call, it runs the steps of the schedule between attention and MLP."""

    stands_for = Block

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, *args: Any, call: BlockCall | None = None, **kwargs: Any
    ) -> Tensor:
        """Tokens (B, N, C) to tokens (B, N', C)."""
        if call is None:
            return Block.forward(self, x, attn_mask, *args, **kwargs)
        if call.plan.listening or call.most_gap is not None:
            path = f"model.blocks[{call.index}].attn"
            check_takes_call(self.attn, path)
            attention = self.attn(self.norm1(x), attn_mask=attn_mask, call=call)
            check_was_called(call.attended, path)
        else:
            attention = self.attn(self.norm1(x), attn_mask=attn_mask)
        x = x + self.drop_path1(self.ls1(attention))
        evidence = tuple(_evidence(step, x, call.attended, call.state, call.run) for step in call.plan.listening)
        state, ahead = _take_steps(call.plan.mid, call.state._replace(tokens_BNC=x), evidence, call.run)
        call.left, call.ahead, x = state, ahead, state.tokens_BNC
        del attention, evidence, state  # and the keys of the attention: the MLP then writes to memory in the cache
        call.attended = None
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ReducedBlocks(Swapped, nn.Sequential):
    """A model's `blocks`. With a call, they run the schedule."""

    stands_for = nn.Sequential

    def forward(self, input: Tensor, call: BlocksCall | None = None) -> Tensor:
        """Tokens (B, N, C) to tokens (B, N at the end, C)."""
        if call is None:
            return nn.Sequential.forward(self, input)
        run, state = call.run, TokenState(input)
        if run.plan.counts_differ and not run.masked:
            _refuse_to_be_traced()
            state = _run_in_groups(self, run, state)
        else:
            for index, block in enumerate(self):
                if call.checkpointed:
                    state = checkpoint(_run_block, index, block, run, state, use_reentrant=False)
                else:
                    state = _run_block(index, block, run, state)
        call.left = state
        return state.tokens_BNC


class _Reduced(Swapped):
    """The forward pass with a schedule, for VisionTransformer and VisionTransformerDistilled."""

    _plan: Plan

    def forward_features(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Image to normalised tokens (B, N at the end, C). Raises ModelError when images end with different counts."""
        state = self._features(x, attn_mask, is_causal)
        if state.present_Bn is not None:
            raise ModelError(
                "forward_features: these images end with different numbers of tokens, or train with tokens masked, "
                "which a tensor alone does not show. Possible: model(images), or prunesearch.models.trace. Use those."
            )
        return state.tokens_BNC

    def forward(
        self: Any,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        call: ModelCall | None = None,
    ) -> Tensor:
        """Image to logits."""
        check_methods(self, "model", type(self))
        state = self._features(x, attn_mask, is_causal, None if call is None else call.masked)
        logits = self._head(state)
        if call is not None:
            call.trace = Trace(logits, patches_of(self, state.tokens_BNC), state.present_Bn, state.counts)
        return logits

    def forward_head(self: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens to logits. Raises ModelError when pooling would need the sizes of merged tokens, or the mask."""
        plan = self._plan
        if (plan.merges and _weighs_patches(self)) or (plan.decisions_learn and _pools_over_patches(self)):
            raise ModelError(
                f"forward_head: this model pools over merged or masked tokens (global_pool={self.global_pool!r}), "
                f"whose sizes are not in its input. Possible: model(images). Call the whole model."
            )
        return super().forward_head(x, pre_logits=pre_logits)  # type: ignore[misc]

    def forward_intermediates(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Refused: feature maps need every token at its place."""
        raise ModelError(
            "forward_intermediates: the model carries a token schedule, and feature maps need every token in its "
            "place. Possible: a model without one. Call remove_schedule(model) first."
        )

    def _head(self: Any, state: TokenState) -> Tensor:
        weighs = state.size_Bn is not None and _weighs_patches(self)
        if weighs or (state.present_Bn is not None and _pools_over_patches(self)):
            return self.head(self.head_drop(self.fc_norm(_pool_by_size(self, state))))
        return super().forward_head(state.tokens_BNC)  # type: ignore[misc]

    def _features(
        self: Any, x: Tensor, attn_mask: Tensor | None, is_causal: bool, masked: bool | None = None
    ) -> TokenState:
        if attn_mask is not None or is_causal:
            raise ModelError(
                "forward: attn_mask and is_causal cannot be combined with a token schedule, whose blocks see fewer and "
                "fewer tokens. Call the model without them, or remove_schedule(model) first."
            )
        x = self.patch_embed(x)
        x = self._pos_embed(x)
        x = self.norm_pre(self.patch_drop(x))
        plan = plan_for(self._plan, x.shape[1] - self._plan.shape.prefix_tokens)
        run = Run(plan, getattr(self, PARTS, None), self.training, self.training if masked is None else masked)
        checkpointed = self.grad_checkpointing and not torch.jit.is_scripting()
        call = BlocksCall(run, checkpointed)
        check_takes_call(self.blocks, "model.blocks")
        x = self.blocks(x, call=call)
        check_was_called(call.left, "model.blocks")
        return call.left._replace(tokens_BNC=self.norm(x))  # type: ignore[union-attr]

    def _run_from(self: Any, tokens_BNC: Tensor, first: int) -> Tensor:
        plan = plan_for(self._plan, tokens_BNC.shape[1] - self._plan.shape.prefix_tokens)
        run, state = Run(plan, None, self.training, masked=False), TokenState(tokens_BNC)
        for index in range(first, len(self.blocks)):
            state = _run_block(index, self.blocks[index], run, state)
        return self._head(state._replace(tokens_BNC=self.norm(state.tokens_BNC)))


class ReducedVisionTransformer(_Reduced, VisionTransformer):
    """A VisionTransformer with a token schedule; made by `apply_schedule`, never constructed."""

    stands_for = VisionTransformer


class ReducedVisionTransformerDistilled(_Reduced, VisionTransformerDistilled):
    """A VisionTransformerDistilled with a token schedule; made by `apply_schedule`, never constructed."""

    stands_for = VisionTransformerDistilled


REDUCED: dict[type, type[Swapped]] = {
    kind.stands_for: kind for kind in (ReducedVisionTransformer, ReducedVisionTransformerDistilled)
}


MODULES = (
    "timm.models.vision_transformer",
    "timm.models.deit",
    "timm.models.vision_transformer_hybrid",
    "timm.models.vitamin",
    "prunesearch.models.digits_vit",
)
"""Python modules with functions that build models of these classes (among others)."""


def is_family(model: nn.Module) -> bool:
    """True for exactly VisionTransformer and VisionTransformerDistilled, with or without a schedule."""
    return timm_class(model) in REDUCED


def plan_of(model: Any, schedule: Schedule) -> Plan:
    """The schedule resolved for a model, which is not changed. Raises ModelError or ScheduleError."""
    plan = make_plan(schedule, shape_of(model))
    if (plan.merges or plan.decisions_learn) and model.global_pool == "prr":
        raise ModelError(
            "model: global_pool='prr' attends over the final tokens without room for the sizes of merged ones or for "
            "masked ones. Possible: drop, fuse or squeeze, by scores that do not learn. Choose one of those."
        )
    if plan.decisions_learn and not model.global_pool:
        raise ModelError(
            "model: global_pool='' returns tokens, of which images would have different numbers. Possible: a model "
            "that pools them, or keep and tokens with scores that do not learn. Choose one of those."
        )
    return plan


def places_of(model: Any, plan: Plan) -> Sequence[Place]:
    """The modules whose class is swapped."""
    places = [
        Place("model", model, REDUCED[timm_class(model)], calls=True),
        Place("model.blocks", model.blocks, ReducedBlocks, calls=True),
    ]
    learning = False
    for index, (block, block_plan) in enumerate(zip(model.blocks, plan.blocks, strict=True)):
        learning = learning or any(step.decisions_learn for step in block_plan.pre)
        listens = learning or bool(block_plan.listening)
        path = f"model.blocks[{index}]"
        places.append(Place(path, block, ReducedBlock, calls=listens or bool(block_plan.mid)))
        places.append(Place(f"{path}.attn", block.attn, AttendingAttention, calls=listens))
        learning = learning or any(step.decisions_learn for step in block_plan.mid)
    return places


def patch_tokens_of(model: Any) -> int:
    """Patch tokens of an image of the model's current size."""
    return model.patch_embed.num_patches


def block_inputs(model: Any, images: Tensor, blocks: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """See `prunesearch.models.block_inputs`."""
    inputs: dict[int, Tensor] = {}

    def keep(block: int, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs[block] = given[0]

    hooks = [model.blocks[block].register_forward_pre_hook(partial(keep, block)) for block in blocks]
    try:
        return model(images), inputs
    finally:
        for hook in hooks:
            hook.remove()


def size_keywords(module: str, size: int, channels: int) -> dict[str, Any]:
    """See `prunesearch.models.size_keywords`."""
    return {"img_size": size}


def adapted(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """See `prunesearch.models.adapted`. Resizes position embeddings too, as timm does for its own weights."""
    return checkpoint_filter_fn(state, model)


def run_from(model: Any, tokens_BNC: Tensor, first: int) -> Tensor:
    """See `prunesearch.models.run_from`."""
    return model._run_from(tokens_BNC, first)


def patches_of(model: Any, features: Tensor) -> Tensor:
    """See `prunesearch.models.patches_of`. A model that pools over patches applies its last norm after the pooling;
    here it is applied to each token."""
    return model.fc_norm(features[:, model.num_prefix_tokens :])


def input_size(model: Any) -> tuple[int, int, int]:
    """See `prunesearch.models.input_size`."""
    return (channels_of(model.patch_embed), *model.patch_embed.img_size)


def attend(
    attention: Attention,
    x_BNC: Tensor,
    bias_B11N: Tensor | None,
    shape: ModelShape,
    present_Bn: Tensor | None = None,
    most_gap: float | None = None,
    needs_keys: bool = False,
) -> tuple[Tensor, Attended]:
    """timm's Attention.forward that also returns what scorers read.

    With `most_gap` and `present_Bn`, attention is not fused: `masked_softmax` masks absent tokens and passes gradients
    to `present_Bn`. `bias_B11N` must then not mask them. Otherwise attention is computed as in timm.
    """
    images, tokens, _ = x_BNC.shape
    gate = gate_of(attention)
    opening = None if gate is None else gate(x_BNC).sigmoid()
    qkv = (
        attention.qkv(x_BNC).reshape(images, tokens, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    )
    query, key, value = qkv.unbind(0)
    query, key = attention.q_norm(query), attention.k_norm(key)
    bias = None if bias_B11N is None else bias_B11N.to(query.dtype)
    dropout = attention.attn_drop.p if attention.training else 0.0
    if most_gap is not None and present_Bn is not None:
        present_B11N = F.pad(present_Bn, (shape.prefix_tokens, 0), value=1.0)[:, None, None]
        logits = ((query * attention.scale) @ key.transpose(-2, -1)).float()
        logits = logits if bias is None else logits + bias.float()
        output = attention.attn_drop(masked_softmax(logits, present_B11N, most_gap)).to(value.dtype) @ value
        bias = torch.zeros_like(present_B11N, dtype=query.dtype) if bias is None else bias
        bias = bias.masked_fill(present_B11N == 0, -torch.inf)
    elif attention.fused_attn:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
    else:
        logits = (query * attention.scale) @ key.transpose(-2, -1)
        logits = logits if bias is None else logits + bias
        output = attention.attn_drop(logits.softmax(dim=-1)) @ value
    prefix, classes = shape.prefix_tokens, shape.class_tokens
    # before the projection, which would push the keys out of the cache
    keys_BnD = mean_keys(key, prefix) if needs_keys else None
    attended = Attended(query, key, value, output, bias, attention.scale, prefix, classes, present_Bn, keys_BnD)
    x_BNC = attention.norm(output.transpose(1, 2).flatten(2))
    x_BNC = x_BNC if opening is None else x_BNC * opening
    return attention.proj_drop(attention.proj(x_BNC)), attended


def masked_softmax(logits_BHNN: Tensor, present_B11N: Tensor, most_gap: float = MOST_GAP) -> Tensor:
    """Softmax over the present keys and the query's own, with gradients to presence (DynamicViT, eq. 8-10).

    Every token attends to itself, even an absent one, so that its row stays finite. Other absent keys get exactly 0.
    The gradient to the presence of an absent key is proportional to exp(its logit - the largest present logit). The
    exponent is cut at `most_gap` nats. The released code subtracts the largest logit over all keys and adds an epsilon;
    a large logit of an absent key then makes all present ones vanish.
    """
    itself_NN = torch.eye(logits_BHNN.shape[-1], dtype=present_B11N.dtype, device=present_B11N.device)
    seen_B1NN = present_B11N + (1 - present_B11N) * itself_NN
    largest = logits_BHNN.masked_fill(seen_B1NN == 0, -torch.inf).amax(dim=-1, keepdim=True).detach()
    weights_BHNN = (logits_BHNN - largest).clamp(max=most_gap).exp() * seen_B1NN
    return weights_BHNN / weights_BHNN.sum(dim=-1, keepdim=True)


def _refuse_to_be_traced() -> None:
    """Raise ModelError while PyTorch records a graph, which would fix the groups of the images it was recorded with."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        raise ModelError(
            "model: this schedule has thresholds, so each image keeps its own number of tokens, and a traced, compiled "
            "or exported graph would hold the numbers of the images it was made with. Possible: fixed counts. Run "
            "`prunesearch freeze` on the schedule file first, which turns thresholds into counts."
        )


def _is_distributed(blocks: nn.Module) -> bool:
    """Whether a block's parameters are gathered from other processes when it is called (FSDP).

    All processes must then call it equally often, so the batch is not split into groups.
    """
    kinds = [kind for module in (blocks, *blocks.children()) for kind in type(module).__mro__]
    return any(kind.__module__.startswith("torch.distributed.") for kind in kinds)


def _run_in_groups(blocks: Any, run: Run, state: TokenState) -> TokenState:
    """Run the blocks, and split the batch after stages with thresholds into groups of images with similar counts.

    So images with few tokens are not padded to the largest count.
    """
    prefix, most = run.plan.shape.prefix_tokens, 1 if _is_distributed(blocks) else MOST_GROUPS
    groups = [Group(None, state)]
    for index, (block, block_plan) in enumerate(zip(blocks, run.plan.blocks, strict=True)):
        groups = [Group(group.places_B, _run_block(index, block, run, group.state)) for group in groups]
        if any(step.stage.is_adaptive for step in (*block_plan.pre, *block_plan.mid)):
            parts = most // len(groups)
            groups = [part for group in groups for part in split_by_count(group, prefix, parts)]
    return join_groups(groups, prefix)


def _most_gap(plan: Plan) -> float:
    """`MOST_GAP` when the schedule has a predictor, else 0.

    Thresholds are single numbers, which the loss on the cost should control. With a gap of 10 nats the gradients of the
    other losses dominate, and accuracy falls (AS-ViT at half the cost of the digits ViT, after four epochs: 94.7 %,
    without a gap 96.2 %; benchmarks/masked_gradients.md).
    """
    return MOST_GAP if any(step.stage.learns_to_score for step in plan.steps) else 0.0


def _run_block(index: int, block: Any, run: Run, state: TokenState) -> TokenState:
    block_plan = run.plan.blocks[index]
    state, _ = _take_steps(block_plan.pre, state, state.evidence, run)
    x = state.tokens_BNC
    learning = state.present_Bn is not None and run.training
    most_gap = _most_gap(run.plan) if learning else None
    if state.bias_B11N is None:
        make_bias = _size_bias if learning else _attention_bias
        state = state._replace(bias_B11N=make_bias(state, run.plan))
    bias = state.bias_B11N
    if not block_plan.mid and not block_plan.listening and not learning:
        x = block(x) if bias is None else block(x, attn_mask=bias)
        return state._replace(tokens_BNC=x, evidence=())
    call, path = BlockCall(index, run, state, most_gap), f"model.blocks[{index}]"
    check_takes_call(block, path)
    x = block(x, attn_mask=bias, call=call)
    check_was_called(call.left, path)
    return call.left._replace(tokens_BNC=x, evidence=call.ahead)  # type: ignore[union-attr]


def _take_steps(
    steps: tuple[PlannedStep, ...], state: TokenState, evidence: tuple[Evidence, ...], run: Run
) -> tuple[TokenState, tuple[Evidence, ...]]:
    """Run steps in order. Those that read attention take their evidence from the front of `evidence`.

    Returns the new state and the evidence that is left.
    """
    prefix = run.plan.shape.prefix_tokens
    for planned in steps:
        if reads_attention(planned.stage):
            own, evidence = evidence[0], evidence[1:]
        else:
            own = _evidence(planned, state.tokens_BNC, None, state, run)
        parts = _parts_of(planned, run)
        part = None if parts is None else parts.reducer
        if not (planned.counts_differ or (run.masked and planned.decisions_learn)):
            state, evidence = take_step(planned.step, state, prefix, own, evidence, part)
            continue
        threshold = None if parts is None else parts.threshold
        state, evidence = take_masked_step(
            planned.step, state, prefix, own, evidence, part, threshold, planned.softness, sample=run.training
        )
        if not run.masked:
            state, evidence = compact(state, prefix, evidence)
    return state, evidence


def _evidence(planned: PlannedStep, x_BNC: Tensor, attended: Attended | None, state: TokenState, run: Run) -> Evidence:
    parts = _parts_of(planned, run)
    part = None if parts is None else parts.scorer
    patches_BnC = x_BNC[:, run.plan.shape.prefix_tokens :]
    return gather_evidence(planned.stage, patches_BnC, attended, run.training, state.present_Bn, part)


def _parts_of(planned: PlannedStep, run: Run) -> StageParts | None:
    if run.parts is None or planned.key not in run.parts:
        return None
    return run.parts[planned.key]  # type: ignore[return-value]


def _attention_bias(state: TokenState, plan: Plan) -> Tensor | None:
    """Bias on the logits of each key, (B, 1, 1, N): `_size_bias`, and -inf for empty slots. None when there is none."""
    bias_B11N = _size_bias(state, plan)
    if state.present_Bn is None:
        return bias_B11N
    empty_B11N = F.pad(state.present_Bn == 0, (plan.shape.prefix_tokens, 0))[:, None, None]
    if bias_B11N is None:
        bias_B11N = torch.zeros_like(empty_B11N, dtype=state.tokens_BNC.dtype)
    return bias_B11N.masked_fill(empty_B11N, -torch.inf)


def _size_bias(state: TokenState, plan: Plan) -> Tensor | None:
    """Bias of ToMe's proportional attention, (B, 1, 1, N): log(size), so that a token of s patches counts as s tokens.

    0 for slots of size 0. None without sizes.
    """
    size_Bn = state.size_Bn
    if size_Bn is None or not plan.log_size_bias:
        return None
    if state.present_Bn is not None:
        size_Bn = size_Bn.masked_fill(size_Bn == 0, 1.0)  # log(0) would make every gradient NaN
    bias_BN = torch.constant_pad_nd(size_Bn.log(), (plan.shape.prefix_tokens, 0))  # log(1) for prefix tokens
    return _attention_mask(bias_BN, state.tokens_BNC)


def _attention_mask(bias_BN: Tensor, like: Tensor) -> Tensor:
    """The bias as an attention mask, (B, 1, 1, N), in the dtype of the tokens.

    Outside torch.no_grad, torch.onnx.export fails on attention whose mask has gradients. A graph has none anyway.
    """
    bias_BN = bias_BN.detach() if in_onnx_export() else bias_BN
    return bias_BN[:, None, None, :].to(like.dtype)


def _log_size(size_BN: Tensor | None, present_BN: Tensor) -> Tensor:
    """log(size) of present tokens (0 without sizes) and -inf for empty slots.

    The size of an empty slot may be 0. It is replaced first, because log(0) would make every gradient NaN.
    """
    empty_BN = present_BN == 0
    bias_BN = torch.zeros_like(present_BN) if size_BN is None else size_BN.masked_fill(empty_BN, 1.0).log()
    return bias_BN.masked_fill(empty_BN, -torch.inf)


def _weighs_patches(model: Any) -> bool:
    return model.global_pool in ("avg", "avgmax", "map")


def _pools_over_patches(model: Any) -> bool:
    return _weighs_patches(model) or model.global_pool == "max"


def _pool_by_size(model: Any, state: TokenState) -> Tensor:
    """timm's pooling, to (B, C), with each token weighted by its size and empty slots left out."""
    prefix = model.num_prefix_tokens
    x_BNC, size_BN, present_BN = state.tokens_BNC, state.size_Bn, state.present_Bn
    size_BN = torch.ones_like(present_BN) if size_BN is None else size_BN  # type: ignore[arg-type]
    present_BN = torch.ones_like(size_BN) if present_BN is None else present_BN
    if model.pool_include_prefix:
        size_BN, present_BN = F.pad(size_BN, (prefix, 0), value=1.0), F.pad(present_BN, (prefix, 0), value=1.0)
    else:
        x_BNC = x_BNC[:, prefix:]
    empty_BN = present_BN == 0
    if model.global_pool == "map":
        bias_BN = _log_size(size_BN if model._plan.log_size_bias else None, present_BN)
        return model.attn_pool(x_BNC, attn_mask=_attention_mask(bias_BN, x_BNC))
    largest_BC = x_BNC.masked_fill(empty_BN[..., None], -torch.inf).amax(dim=1)
    if model.global_pool == "max":
        return largest_BC
    share_BN = size_BN * present_BN
    share_BN1 = (share_BN / share_BN.sum(dim=1, keepdim=True))[..., None]
    mean_BC = (x_BNC * share_BN1.to(x_BNC.dtype)).sum(dim=1)
    return mean_BC if model.global_pool == "avg" else 0.5 * (largest_BC + mean_BC)
