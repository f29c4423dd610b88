"""Facts of scores and verbs that a study stores, so that schedules can be exported without importing plug-ins.

They are stored once, when the study begins. A default that changes later does not change what was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from prunesearch.config import Options, Scalar, SpaceConfig, as_options
from prunesearch.errors import StudyError
from prunesearch.schedule import Schedule, Stage, unused_options
from prunesearch.shape import ModelShape
from prunesearch.space.choices import blocks_of
from prunesearch.tokens import REDUCERS, SCORERS, Reducer, Scorer


@dataclass(frozen=True)
class Word:
    """Facts of a score or a verb: its options with their defaults, and whether it has a learned part."""

    options: Options = ()
    learns: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """The scores and verbs of a study, by name."""

    scores: tuple[tuple[str, Word], ...] = ()
    reduces: tuple[tuple[str, Word], ...] = ()


def vocabulary_of(space: SpaceConfig, starts: Iterable[Schedule], shape: ModelShape) -> Vocabulary:
    """The scores and verbs of a space and its start schedules, for a model. Their plug-ins must be imported."""
    blocks, stages = blocks_of(space), [stage for schedule in starts for stage in schedule.stages]
    scores = {score for block in blocks for score in block.score} | {stage.score for stage in stages}
    reduces = {verb for block in blocks for verb in block.reduce} | {stage.reduce for stage in stages}
    return Vocabulary(_words(SCORERS, scores, shape), _words(REDUCERS, reduces, shape))


def written_out(schedule: Schedule, vocabulary: Vocabulary) -> Schedule:
    """The schedule with all options of its scores and verbs written out, defaults included."""
    return replace(
        schedule,
        stages=tuple(
            replace(stage, options=as_options({**_defaults(stage, vocabulary), **dict(stage.options)}))
            for stage in schedule.stages
        ),
    )


def learns(schedule: Schedule, vocabulary: Vocabulary) -> bool:
    """Whether the schedule needs trained weights of its own. Works without its plug-ins."""
    words = [_of_stage(stage, vocabulary) for stage in schedule.stages]
    if all(len(found) == 1 + (stage.score != "none") for stage, found in zip(schedule.stages, words, strict=True)):
        return any(word.learns for found in words for word in found)
    return schedule.needs_weights  # of a study that stored no words


def refuse_other_defaults(before: Vocabulary, now: Vocabulary, study: str) -> None:
    """Raise StudyError when an option of a score or verb has another default than when the study began."""
    changed = []
    for kind, old, new in (("score", before.scores, now.scores), ("verb", before.reduces, now.reduces)):
        for name, word in old:
            today = dict(dict(new).get(name, word).options)
            changed += [
                f"{kind} {name}: {option}: {value!r} -> {today.get(option, 'gone')!r}"
                for option, value in word.options
                if option not in today or today[option] != value
            ]
    if changed:
        raise StudyError(
            f"study {study!r}: defaults of its options are not what they were when it began ({'; '.join(changed)}), so "
            f"that its numbers could not be compared. Possible: the plug-in as it was, or a new study. Bring the old "
            f"one back, or change name."
        )


def _words(
    registry: Mapping[str, Scorer] | Mapping[str, Reducer], names: Iterable[str], shape: ModelShape
) -> tuple[tuple[str, Word], ...]:
    entries = [registry[name] for name in sorted(names) if name in registry]
    return tuple((entry.name, Word(as_options(entry.options), entry.learns(shape))) for entry in entries)


def _of_stage(stage: Stage, vocabulary: Vocabulary) -> list[Word]:
    scores, reduces = dict(vocabulary.scores), dict(vocabulary.reduces)
    return [words[name] for words, name in ((scores, stage.score), (reduces, stage.reduce)) if name in words]


def _defaults(stage: Stage, vocabulary: Vocabulary) -> dict[str, Scalar]:
    options = [pair for word in _of_stage(stage, vocabulary) for pair in word.options]
    return {name: value for name, value in options if name not in unused_options(stage)}
