"""One pass of a ViT with a schedule: what its families share.

The classes of the model, of each block and of its attention are swapped for subclasses. Each is called as a module,
with a tensor, and returns a tensor, as in timm. Whatever else a step needs or returns is passed in a `call`, an object
that hooks, FSDP and mixed precision do not change. Without a call the subclasses run timm's own code.

A family has one subclass of `Reduced` for its model, of `SteppingBlock` for its block and of `AttendingAttention` for
its attention. Letters in tensor names as in `tokens/inputs.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prunesearch.errors import ModelError
from prunesearch.models.masked_step import Group, compact, join_groups, split_by_count, take_masked_step
from prunesearch.models.plan import PARTS, BlockPlan, Plan, PlannedStep, StageParts, plan_for
from prunesearch.models.step import Evidence, TokenState, gather_evidence, mean_keys, returned, take_step, with_tokens
from prunesearch.models.swap import (
    Place,
    Swapped,
    check_methods,
    check_takes_call,
    ours,
    refuse_pruning,
    refuse_replacement,
    timm_class,
)
from prunesearch.models.trace import ModelCall, Trace
from prunesearch.models.vit_shape import channels_of, pools_prefix
from prunesearch.models.vit_shape import patch_tokens_of as patch_tokens_of
from prunesearch.schedule import momentum_of
from prunesearch.shape import ModelShape
from prunesearch.tokens.inputs import Attended
from prunesearch.tokens.select import in_onnx_export

MOST_GROUPS = 8
"""Most groups into which a batch is split when its images have different counts; measured in benchmarks/adaptive.md."""
MOST_GAP = 10.0
"""Bound in nats on the gap between the logit of an absent key and the largest present one, in gradients to predictors.
Gaps of 17 nats and more occur when few tokens stay. Without the bound one image would then outweigh a whole batch."""


Heads = tuple[Tensor, Tensor, Tensor]
"""Query, key and value, (B, H, N, D) each."""


class Positions(Protocol):
    """What the blocks of a model read by the places of its tokens, in one pass; for models whose attention does.

    grid_n2: row and column of each patch token of the image, fp32. in_attention: the attention of a block adds a bias
    of its own, so it must know the places itself once tokens have moved.
    """

    grid_n2: Tensor
    in_attention: bool

    def found(self, place_Bn2: Tensor | None) -> Tensor | None:
        """What is looked up once for these places, until the next step. None: every token is at its own place."""

    def keywords(self, index: int, found: Tensor | None) -> dict[str, Any]:
        """The keywords with which block `index` is called."""


class Taps:
    """What a pass keeps besides its result: the tokens after some blocks, with all that are away back in their places.

    stop: the block after which the pass ends. found: (B, N, C) by block; set by the pass.
    """

    def __init__(self, blocks: Collection[int], stop: int | None) -> None:
        self.blocks, self.stop = blocks, stop
        self.found: dict[int, Tensor] = {}


class Run(NamedTuple):
    """One forward pass. masked: tokens stay in their slots from the first learned decision on, as in training. taps:
    what it keeps besides its result."""

    plan: Plan
    parts: nn.ModuleDict | None
    training: bool
    masked: bool
    positions: Positions | None = None
    taps: Taps | None = None


class BlockCall:
    """Passed to a block that runs steps, and to its attention, besides the tokens.

    most_gap: for `masked_softmax`, when the attention must pass gradients to earlier decisions; else None.
    in_attention: whether the attention gets the call too.
    The attention sets `attended`. The block sets `left`, its state before the MLP, and `ahead`, the evidence of later
    stages. This is no dataclass, because FSDP would copy it and look for tensors in it.
    """

    def __init__(self, index: int, run: Run, state: TokenState, most_gap: float | None, in_attention: bool) -> None:
        self.index, self.run, self.state, self.most_gap, self.in_attention = index, run, state, most_gap, in_attention
        self.plan: BlockPlan = run.plan.blocks[index]
        self.attended: Attended | None = None
        self.left: TokenState | None = None
        self.ahead: tuple[Evidence, ...] = ()

    @property
    def path(self) -> str:
        """Where the block is, for messages."""
        return f"model.blocks[{self.index}]"


class SteppingBlock(Swapped):
    """A block of timm. With a call, it runs the steps of the schedule between attention and MLP.

    The first three functions say what timm's block does: here it normalises before each half and scales by layers. They
    also take a block of timm's class in place of `self`.
    """

    def before_attention(self: Any, x_BNC: Tensor) -> Tensor:
        """What the attention gets."""
        return self.norm1(x_BNC)

    def after_attention(self: Any, x_BNC: Tensor, added_BNC: Tensor) -> Tensor:
        """The tokens with what the attention returns."""
        return x_BNC + self.drop_path1(self.ls1(added_BNC))

    def mlp_half(self: Any, x_BNC: Tensor) -> Tensor:
        """The tokens after the MLP."""
        return x_BNC + self.drop_path2(self.ls2(self.mlp(self.norm2(x_BNC))))

    def forward(self: Any, x: Tensor, *args: Any, call: BlockCall | None = None, **given: Any) -> Tensor:
        """Tokens (B, N, C) to tokens (B, N', C)."""
        if call is None:
            return timm_class(self).forward(self, x, *args, **given)
        if call.in_attention:
            if "forward" in self.attn.__dict__:
                check_takes_call(self.attn, call.path + ".attn")
            added = self.attn(self.before_attention(x), *args, call=call, **given)
            if call.attended is None:
                refuse_replacement(call.path + ".attn")
        else:
            added = self.attn(self.before_attention(x), *args, **given)
        x = self.after_attention(x, added)
        evidence = [
            _evidence(step, x, call.attended, call.state, call.run, "keys" if step.remembers else "all")
            for step in call.plan.listening
        ]
        state, ahead = with_tokens(call.state, x), tuple(evidence)
        if call.plan.remembering is not None:
            state = _remembered(call.plan.remembering, state, call.attended, call.run)
        if call.plan.mid:
            state, ahead = _take_steps(call.plan.mid, state, ahead, call.run)
        call.left, call.ahead, x = state, ahead, state.tokens_BNC
        del added, evidence, state  # and the keys of the attention: the MLP then writes to memory in the cache
        call.attended = None
        return self.mlp_half(x)


class GammaBlock(SteppingBlock):
    """A block that scales by `gamma_1` and `gamma_2`, if it has them."""

    def after_attention(self: Any, x_BNC: Tensor, added_BNC: Tensor) -> Tensor:
        """The tokens with what the attention returns."""
        return x_BNC + self.drop_path1(added_BNC if self.gamma_1 is None else self.gamma_1 * added_BNC)

    def mlp_half(self: Any, x_BNC: Tensor) -> Tensor:
        """The tokens after the MLP."""
        added_BNC = self.mlp(self.norm2(x_BNC))
        return x_BNC + self.drop_path2(added_BNC if self.gamma_2 is None else self.gamma_2 * added_BNC)


class PostNormBlock(SteppingBlock):
    """A block that normalises what its halves return."""

    def before_attention(self: Any, x_BNC: Tensor) -> Tensor:
        """What the attention gets: the tokens as they are."""
        return x_BNC

    def after_attention(self: Any, x_BNC: Tensor, added_BNC: Tensor) -> Tensor:
        """The tokens with what the attention returns."""
        return x_BNC + self.drop_path1(self.norm1(added_BNC))

    def mlp_half(self: Any, x_BNC: Tensor) -> Tensor:
        """The tokens after the MLP."""
        return x_BNC + self.drop_path2(self.norm2(self.mlp(x_BNC)))


def heads_of_fused(attention: Any, x_BNC: Tensor) -> Heads:
    """Query, key and value of an attention that keeps the biases of its one matrix apart (EVA, BEiT)."""
    if attention.q_bias is None:
        return split_heads(attention, attention.qkv(x_BNC))
    bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    if attention.qkv_bias_separate:
        return split_heads(attention, attention.qkv(x_BNC) + bias)
    return split_heads(attention, F.linear(x_BNC, attention.qkv.weight, bias))


def split_heads(attention: Any, qkv: Tensor) -> Heads:
    """Query, key and value from what one matrix gives, (B, N, 3 H D)."""
    query, key, value = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


class AttendingAttention(Swapped):
    """An attention of timm. With a call, it sets `call.attended` for scorers."""

    def heads_of(self: Any, x_BNC: Tensor, **given: Any) -> Heads:
        """Query, key and value, as they meet in the attention. given: the keywords of the forward."""
        raise NotImplementedError

    def bias_of(self: Any, given: Mapping[str, Any], found: Tensor | None) -> Tensor | None:
        """What is added to the logits, (B, 1, 1, N) or (B or 1, H, N, N). found: see `Positions`."""
        bias: Tensor | None = given.get("attn_mask")
        return bias

    def forward(self: Any, x: Tensor, *args: Any, call: BlockCall | None = None, **given: Any) -> Tensor:
        """Tokens (B, N, C) to what is added to them, (B, N, C)."""
        if call is None:
            return timm_class(self).forward(self, x, *args, **given)
        bias, shape = self.bias_of(given, call.state.found), call.run.plan.shape
        present_Bn, needs_keys = call.state.present_Bn, call.plan.needs_keys
        x, call.attended = attend(self, x, bias, shape, present_Bn, call.most_gap, needs_keys, **given)
        return x


def attend(
    attention: Any,
    x_BNC: Tensor,
    bias: Tensor | None,
    shape: ModelShape,
    present_Bn: Tensor | None = None,
    most_gap: float | None = None,
    needs_keys: bool = False,
    **given: Any,
) -> tuple[Tensor, Attended]:
    """timm's attention that also returns what scorers read.

    attention: of timm's class or of ours. given: the keywords of its forward.
    With `most_gap` and `present_Bn`, attention is not fused: `masked_softmax` masks absent tokens and passes gradients
    to `present_Bn`. `bias` must then not mask them. Otherwise attention is computed as in timm.
    """
    if isinstance(attention, AttendingAttention):
        query, key, value = attention.heads_of(x_BNC, **given)
    else:
        query, key, value = ours(attention).heads_of(attention, x_BNC, **given)
    bias = None if bias is None else bias.to(query.dtype)
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
    output_BNA = output.transpose(1, 2).flatten(2)
    norm, gate = attention._modules.get("norm"), attention._modules.get("gate")  # not every class has them
    output_BNA = output_BNA if norm is None else norm(output_BNA)
    output_BNA = output_BNA if gate is None else output_BNA * gate(x_BNC).sigmoid()
    return attention.proj_drop(attention.proj(output_BNA)), attended


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
    gap_BHNN = logits_BHNN - largest
    # not clamp, which in torch 2.15 also stops the gradient where a gap equals the bound, as that of the largest key
    # does when the bound is 0
    gap_BHNN = gap_BHNN.masked_fill(gap_BHNN > most_gap, most_gap)
    weights_BHNN = gap_BHNN.exp() * seen_B1NN
    return weights_BHNN / weights_BHNN.sum(dim=-1, keepdim=True)


class Reduced(Swapped):
    """The forward pass of a model with a schedule."""

    _plan: Plan

    def stem(self: Any, x: Tensor) -> tuple[Tensor, Positions | None]:
        """Image to the tokens that the first block gets, and what its blocks read by their places.

        It also takes a model of timm's class in place of `self`.
        """
        raise NotImplementedError

    def run_blocks(self: Any, run: Run, state: TokenState) -> TokenState:
        """The tokens of the stem to the state after the last block."""
        checkpointed = self.grad_checkpointing and not torch.jit.is_scripting()
        return run_blocks(self.blocks, run, state, checkpointed)

    def forward_features(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Image to normalised tokens (B, N at the end, C). Raises ModelError when images end with different counts."""
        state = self._features(x, attn_mask, is_causal)
        if state.present_Bn is not None:
            raise ModelError(
                "forward_features: these images end with different numbers of tokens, or train with tokens masked, "
                "which a tensor alone does not show. Possible: model(images), prunesearch.models.trace, or a schedule "
                "whose tokens are back at the end. Use one of the first two, or write until: end."
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

    def forward_head(self: Any, x: Tensor, pre_logits: bool = False, **given: Any) -> Tensor:
        """Tokens to logits. Raises ModelError when pooling would need the sizes of merged tokens, or the mask.

        given: further keywords of timm's function.
        """
        plan = self._plan
        masks = plan.decisions_learn and given.get("patch_valid") is None
        if not plan.all_return and ((plan.merges and _weighs_patches(self)) or (masks and _pools_over_patches(self))):
            raise ModelError(
                f"forward_head: this model pools over merged or masked tokens (global_pool={self.global_pool!r}), "
                f"whose sizes are not in its input. Possible: model(images). Call the whole model."
            )
        return super().forward_head(x, pre_logits=pre_logits, **given)  # type: ignore[misc]

    def forward_intermediates(
        self: Any,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """What timm's function gives, with every token in its place: the features of blocks, as (B, C, rows, columns)
        or (B, tokens, C), and the final tokens.

        After a block within stages, tokens that are away are in the places, and have the values, that they would return
        with there. Raises ModelError when a stage has no `until`.
        """
        if not self._plan.all_return:
            raise ModelError(
                "forward_intermediates: tokens leave by this schedule for good, and feature maps need every token in "
                "its place. Possible: stages with `until`, the last ones with until: end, or a model without a "
                "schedule. Write until: end, or call remove_schedule(model) first."
            )
        if output_fmt not in ("NCHW", "NLC"):
            raise ModelError(f"output_fmt is {output_fmt!r}. Possible: NCHW, NLC. Write one of them.")
        check_methods(self, "model", type(self))
        refuse_patch_dropout(self)
        taken, last = feature_take_indices(len(self.blocks), indices)
        taps = Taps(tuple(taken), last if stop_early else None)
        state = self._features(x, attn_mask, is_causal, taps=taps)
        found = [self.norm(taps.found[index]) if norm else taps.found[index] for index in sorted(set(taken))]
        prefix = self.num_prefix_tokens
        prefixes, maps = [one[:, :prefix] for one in found], [one[:, prefix:] for one in found]
        if output_fmt == "NCHW":
            height, width = self.grid(x.shape[-2], x.shape[-1])
            maps = [one.transpose(1, 2).reshape(one.shape[0], -1, height, width) for one in maps]
        if output_dict:
            named: dict[str, Any] = {"image_intermediates": maps}
            if prefix and return_prefix_tokens:
                named["image_intermediates_prefix"] = prefixes
            return named if intermediates_only else {**named, "image_features": state.tokens_BNC}
        shown = list(zip(maps, prefixes, strict=True)) if prefix and return_prefix_tokens else maps
        return shown if intermediates_only else (state.tokens_BNC, shown)

    def grid(self: Any, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patches of an image of this size in pixels."""
        rows, columns = self.patch_embed.dynamic_feat_size((height, width))
        return rows, columns

    def prune_intermediate_layers(self: Any, indices: int | list[int] = 1, *args: Any, **given: Any) -> Any:
        """timm's. Raises ModelError when it would take blocks away, because the schedule counts them."""
        _, last = feature_take_indices(len(self.blocks), indices)
        if last < len(self.blocks) - 1:
            refuse_pruning()
        return super().prune_intermediate_layers(indices, *args, **given)  # type: ignore[misc]

    def _head(self: Any, state: TokenState) -> Tensor:
        if self._plan.ends_masked or state.present_Bn is not None:
            check_pools(self)  # again, because reset_classifier may have changed it
        weighs = state.size_Bn is not None and _weighs_patches(self)
        if weighs or (state.present_Bn is not None and _pools_over_patches(self)):
            return self.head(self.head_drop(self.fc_norm(_pool_by_size(self, state))))
        return super().forward_head(state.tokens_BNC)  # type: ignore[misc]

    def _features(
        self: Any,
        x: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        masked: bool | None = None,
        taps: Taps | None = None,
    ) -> TokenState:
        if attn_mask is not None or is_causal:
            raise ModelError(
                "forward: attn_mask and is_causal cannot be combined with a token schedule, whose blocks see fewer and "
                "fewer tokens. Call the model without them, or remove_schedule(model) first."
            )
        state = self._state(x, self.training if masked is None else masked, taps)
        return state._replace(tokens_BNC=self.norm(state.tokens_BNC))

    def _state(self: Any, x: Tensor, masked: bool, taps: Taps | None = None) -> TokenState:
        """The state after the last block. masked, taps: as in `Run`."""
        tokens_BNC, positions = self.stem(x)
        plan = plan_for(self._plan, tokens_BNC.shape[1] - self._plan.shape.prefix_tokens)
        run = Run(plan, getattr(self, PARTS, None), self.training, masked, positions, taps)
        return self.run_blocks(run, TokenState(tokens_BNC))

    def positions(self: Any) -> Positions | None:
        """What the blocks read by the places of the tokens, for images of the model's own size."""
        return None

    def run_from(self: Any, tokens_BNC: Tensor, first: int) -> Tensor:
        """See `prunesearch.models.run_from`."""
        plan = plan_for(self._plan, tokens_BNC.shape[1] - self._plan.shape.prefix_tokens)
        run, state = Run(plan, None, self.training, False, self.positions()), TokenState(tokens_BNC)
        for index in range(first, len(self.blocks)):
            state = run_block(index, self.blocks[index], run, state)
        state = back_by(len(self.blocks), run, state)
        return self._head(state._replace(tokens_BNC=self.norm(state.tokens_BNC)))


def refuse_patch_dropout(model: Any) -> None:
    """Raise ModelError for timm's patch dropout, which acts in training."""
    if model.training and getattr(model, "patch_drop", None) is not None:  # not every class has it
        raise ModelError(
            "model: patch_drop_rate drops patch tokens at random in training, which a schedule does not count. "
            "Possible: one of them. Build the model with patch_drop_rate=0."
        )


def check_plan(plan: Plan, model: Any) -> Plan:
    """Refuse what no ViT can do. Raises ModelError."""
    if plan.ends_masked:
        check_pools(model)
    return plan


def check_pools(model: Any) -> None:
    """Raise ModelError for a model that returns tokens, when images have different numbers of them."""
    if not model.global_pool:
        raise ModelError(
            "model: global_pool='' returns tokens, of which images would have different numbers. Possible: a model "
            "that pools them, or keep and tokens with scores that do not learn. Choose one of those."
        )


def block_places(model: Any, plan: Plan, in_attention: bool = False) -> list[Place]:
    """The blocks and attentions, whose classes are swapped. in_attention: see `Positions`."""
    places, learning, moved = [], False, False
    for index, (block, block_plan) in enumerate(zip(model.blocks, plan.blocks, strict=True)):
        learning = learning or any(step.decisions_learn for step in block_plan.pre)
        moved = moved or (in_attention and bool(block_plan.pre))
        listens = learning or moved or block_plan.listens
        path = f"model.blocks[{index}]"
        places.append(Place(path, block, ours(block), calls=listens or bool(block_plan.mid)))
        places.append(Place(f"{path}.attn", block.attn, ours(block.attn), calls=listens))
        learning = learning or any(step.decisions_learn for step in block_plan.mid)
        moved = moved or (in_attention and bool(block_plan.mid))
    return places


def patches_of(model: Any, features: Tensor) -> Tensor:
    """See `prunesearch.models.patches_of`. A model that pools over patches applies its last norm after the pooling;
    here it is applied to each token."""
    return model.fc_norm(features[:, model.num_prefix_tokens :])


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


def run_from(model: Any, tokens_BNC: Tensor, first: int) -> Tensor:
    """See `prunesearch.models.run_from`."""
    return model.run_from(tokens_BNC, first)


def input_size(model: Any) -> tuple[int, int, int]:
    """See `prunesearch.models.input_size`."""
    return (channels_of(model.patch_embed), *model.patch_embed.img_size)


def size_keywords(module: str, size: int, channels: int) -> dict[str, Any]:
    """See `prunesearch.models.size_keywords`."""
    return {"img_size": size}


# --- the blocks of a pass -----------------------------------------------------------------------------------------


def run_blocks(blocks: Iterable[nn.Module], run: Run, state: TokenState, checkpointed: bool) -> TokenState:
    """Run all blocks with their steps. checkpointed: keep only what enters a block for the backward pass."""
    if run.plan.counts_differ and not run.masked:
        refuse_to_be_recorded(
            "model: this schedule has thresholds, so each image keeps its own number of tokens, and a traced, compiled "
            "or exported graph would hold the numbers of the images it was made with. Possible: fixed counts. Run "
            "`prunesearch freeze` on the schedule file first, which turns thresholds into counts."
        )
        return _run_in_groups(list(blocks), run, state)
    for index, block in enumerate(blocks):
        if checkpointed:
            state = checkpoint(run_block, index, block, run, state, use_reentrant=False)
        else:
            state = run_block(index, block, run, state)
        if run.taps is not None and _tapped(run.taps, index, [Group(None, state)], run):
            break
    return back_by(run.plan.shape.depth, run, state)


def _tapped(taps: Taps, index: int, groups: list[Group], run: Run) -> bool:
    """Keep the tokens after a block, if asked for. True when the pass ends there."""
    if index in taps.blocks:
        back = _back_together(groups, run.plan.shape.depth, run)
        taps.found[index] = join_groups(back, run.plan.shape.prefix_tokens).tokens_BNC
    return index == taps.stop


def back_by(block: int, run: Run, state: TokenState) -> TokenState:
    """The state with all tokens back that return before a block; by the number of blocks: all that ever return."""
    while state.away and state.away[-1].until <= block:
        state = returned(state, run.plan.shape.prefix_tokens)
    return state


def run_block(index: int, block: Any, run: Run, state: TokenState) -> TokenState:
    """Run a block with the steps before it and inside it."""
    block_plan, positions = run.plan.blocks[index], run.positions
    if state.away:
        state = back_by(index, run, state)
    if block_plan.pre:
        state, _ = _take_steps(block_plan.pre, state, state.evidence, run)
        state = state._replace(evidence=()) if state.evidence else state
    x = state.tokens_BNC
    learning = state.present_Bn is not None and run.training
    most_gap = _most_gap(run.plan) if learning else None
    if state.bias_B11N is None:
        has_empty = state.present_Bn is not None and not learning
        bias_B11N = _bias_with_empty(state, run.plan) if has_empty else _size_bias(state, run.plan)
        if bias_B11N is not None:
            state = state._replace(bias_B11N=bias_B11N)
    keywords = {} if state.bias_B11N is None else {"attn_mask": state.bias_B11N}
    in_attention = block_plan.listens or learning
    if positions is not None:
        if state.found is None:
            state = state._replace(found=positions.found(state.place_Bn2))
        keywords |= positions.keywords(index, state.found)
        # attention itself must know where the tokens are, because they have moved
        in_attention = in_attention or (positions.in_attention and state.place_Bn2 is not None)
    if not (block_plan.mid or in_attention):
        return with_tokens(state, block(x, **keywords))
    call = BlockCall(index, run, state, most_gap, in_attention)
    if "forward" in block.__dict__:
        check_takes_call(block, call.path)
    x = block(x, call=call, **keywords)
    if call.left is None:
        refuse_replacement(call.path)
    left = with_tokens(call.left, x)
    return left._replace(evidence=call.ahead) if call.ahead else left


def refuse_to_be_recorded(why: str) -> None:
    """Raise ModelError with these words while PyTorch records a graph: by tracing, compiling or exporting.

    The question and the error stay in one function. torch.compile without `fullgraph` compiles helpers on their own,
    and a helper that only asked would be compiled to True, for eager calls as well.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        raise ModelError(why)


def is_distributed(blocks: Sequence[nn.Module]) -> bool:
    """Whether a block's parameters are gathered from other processes when it is called (FSDP).

    All processes must then call it equally often, so the batch is not split into groups.
    """
    kinds = [kind for module in blocks for kind in type(module).__mro__]
    return any(kind.__module__.startswith("torch.distributed.") for kind in kinds)


def _run_in_groups(blocks: Sequence[nn.Module], run: Run, state: TokenState) -> TokenState:
    """Run the blocks, and split the batch after stages with thresholds into groups of images with similar counts.

    So images with few tokens are not padded to the largest count.
    """
    prefix, most = run.plan.shape.prefix_tokens, 1 if is_distributed(blocks) else MOST_GROUPS
    groups = [Group(None, state)]
    for index, (block, block_plan) in enumerate(zip(blocks, run.plan.blocks, strict=True)):
        groups = _back_together(groups, index, run)
        groups = [Group(group.places_B, run_block(index, block, run, group.state)) for group in groups]
        if any(step.stage.is_adaptive for step in (*block_plan.pre, *block_plan.mid)):
            parts = most // len(groups)
            groups = [part for group in groups for part in split_by_count(group, prefix, parts)]
        if run.taps is not None and _tapped(run.taps, index, groups, run):
            break
    groups = _back_together(groups, run.plan.shape.depth, run)
    return join_groups(groups, prefix)


def _back_together(groups: list[Group], block: int, run: Run) -> list[Group]:
    """The groups with the tokens back that return before a block. They are then one group: what made them differ is
    over, or will be split anew."""
    away = groups[0].state.away
    if not away or away[-1].until > block:
        return groups
    prefix = run.plan.shape.prefix_tokens
    back = [Group(group.places_B, back_by(block, run, group.state)) for group in groups]
    state, _ = compact(join_groups(back, prefix), prefix, ())
    return [Group(None, state)]


def _most_gap(plan: Plan) -> float:
    """`MOST_GAP` when the schedule has a predictor, else 0.

    Thresholds are single numbers, which the loss on the cost should control. With a gap of 10 nats the gradients of the
    other losses dominate, and accuracy falls (AS-ViT at half the cost of the digits ViT, after four epochs: 94.7 %,
    without a gap 96.2 %; benchmarks/masked_gradients.md).
    """
    return MOST_GAP if any(step.stage.learns_to_score for step in plan.steps) else 0.0


def _take_steps(
    steps: tuple[PlannedStep, ...], state: TokenState, evidence: tuple[Evidence, ...], run: Run
) -> tuple[TokenState, tuple[Evidence, ...]]:
    """Run steps in order. Those that read attention take their evidence from the front of `evidence`.

    Returns the new state and the evidence that is left.
    """
    prefix = run.plan.shape.prefix_tokens
    for planned in steps:
        counts, at_home = state.counts, state.place_Bn2 is None
        if run.positions is not None and at_home:
            state = state._replace(place_Bn2=run.positions.grid_n2.expand(state.tokens_BNC.shape[0], -1, -1))
        if planned.reads_attention:
            own, evidence = evidence[0], evidence[1:]
        elif planned.remembers:
            own = Evidence()
        else:
            own = _evidence(planned, state.tokens_BNC, None, state, run)
        if planned.remembers:
            own = own._replace(scores_Bn=state.memory_Bn)
        parts = None if run.parts is None else _parts_of(planned, run.parts)
        part = None if parts is None else parts.reducer
        masks = planned.counts_differ or (run.masked and planned.decisions_learn)
        if masks:
            threshold = None if parts is None else parts.threshold
            state, evidence = take_masked_step(
                planned.step, state, prefix, own, evidence, part, threshold, planned.softness, sample=run.training
            )
        else:
            state, evidence = take_step(planned.step, state, prefix, own, evidence, part)
            if counts:
                count_B = torch.full_like(counts[0], planned.step.after)
                state = state._replace(counts=(*counts, count_B))
        if at_home and planned.step.until is not None:
            state = _back_home(state)
        if masks and not run.masked:
            state, evidence = compact(state, prefix, evidence)
    return state, evidence


def _remembered(planned: PlannedStep, state: TokenState, attended: Attended | None, run: Run) -> TokenState:
    """The state with the running mean of scores after the attention of a block."""
    scores_Bn = _evidence(planned, state.tokens_BNC, attended, state, run, "scores").scores_Bn
    before_Bn = state.memory_Bn
    assert scores_Bn is not None
    if before_Bn is not None:
        scores_Bn = before_Bn + (1 - momentum_of(planned.stage)) * (scores_Bn - before_Bn)
        if state.present_Bn is not None:  # what is absent keeps what it had, in case it comes back
            scores_Bn = torch.where(state.present_Bn > 0, scores_Bn, before_Bn)
    return state._replace(memory_Bn=scores_Bn)


def _back_home(state: TokenState) -> TokenState:
    """The state whose tokens return to their own places, when they leave next from there."""
    return state._replace(away=(*state.away[:-1], state.away[-1]._replace(place_Bn2=None)))


def _evidence(
    planned: PlannedStep,
    x_BNC: Tensor,
    attended: Attended | None,
    state: TokenState,
    run: Run,
    wanted: Literal["all", "scores", "keys"] = "all",
) -> Evidence:
    parts = None if run.parts is None else _parts_of(planned, run.parts)
    part = None if parts is None else parts.scorer
    patches_BnC = x_BNC[:, run.plan.shape.prefix_tokens :]
    stage, present_Bn = planned.step.stage, state.present_Bn
    return gather_evidence(stage, patches_BnC, attended, run.training, present_Bn, part, wanted)


def _parts_of(planned: PlannedStep, parts: nn.ModuleDict) -> StageParts | None:
    key = planned.key
    return parts[key] if key in parts else None  # type: ignore[return-value]  # noqa: SIM401


# --- sizes and masks ----------------------------------------------------------------------------------------------


def _bias_with_empty(state: TokenState, plan: Plan) -> Tensor:
    """Bias on the logits of each key, (B, 1, 1, N): `_size_bias`, and -inf for empty slots."""
    assert state.present_Bn is not None
    bias_B11N = _size_bias(state, plan)
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
    bias_BN = bias_BN.detach() if bias_BN.requires_grad and in_onnx_export() else bias_BN
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
    if pools_prefix(model):
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
