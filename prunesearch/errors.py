"""Every error that prunesearch raises on purpose, in one tree.

    PruneSearchError
    ├── UserError             the caller can mend it; the command line prints it and exits 2
    │   ├── FileError         a YAML file is missing, unreadable or has mistakes (all of them are listed)
    │   ├── UnknownNameError  a name that no registry knows (score, reduce, metric, sampler, preset, ...)
    │   ├── ScheduleError     a schedule that is wrong in itself or does not fit the model
    │   ├── ModelError        a model that prunesearch cannot change, or that cannot be built
    │   ├── DataError         a data set that cannot be opened or does not fit the model
    │   ├── StudyError        a study that cannot be opened or continued, or cannot answer a question
    │   ├── DeviceError       a device profile, runtime or exported file that cannot be made or does not fit
    │   ├── MissingLibraryError  a library that an extra of prunesearch brings is not installed
    │   └── ResourceError     more workers, CPUs or GPUs asked for than there are
    └── RunError              the run itself failed (nothing feasible, storage lost, ...); exits 1

A message has four parts, in this order: where it is, what was given, what is possible, what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class PruneSearchError(Exception):
    """Base of all errors raised on purpose."""


class UserError(PruneSearchError):
    """Something the caller gave cannot be used as it is."""


class _WithProblems(UserError):
    """An error that reports several mistakes at once; `problems` holds one line each."""

    def __init__(self, place: str, problems: Sequence[str]) -> None:
        self.place = place
        self.problems = tuple(problems)
        super().__init__(place, self.problems)  # both arguments, so that the error pickles

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"{self.place}: {self.problems[0]}"
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        return f"{self.place}: {len(self.problems)} mistakes\n{lines}"


class FileError(_WithProblems):
    """A file is missing, unreadable, or has mistakes."""


class UnknownNameError(UserError):
    """A name that no registry knows."""


class ScheduleError(_WithProblems):
    """A schedule is wrong in itself, or does not fit the model it is meant for."""


class ModelError(UserError):
    """A model that cannot be built, or whose forward pass prunesearch does not know."""


class DataError(UserError):
    """A data set that cannot be opened, or does not fit the model."""


class StudyError(UserError):
    """A study that cannot be opened or continued, or cannot answer a question."""


class DeviceError(UserError):
    """A device profile, a runtime or an exported file that cannot be made, or does not fit."""


class MissingLibraryError(UserError, ImportError):
    """A library that an extra of prunesearch brings is not installed. Some imports raise it: an ImportError too."""


class ResourceError(UserError):
    """More workers, CPUs or GPUs were asked for than there are."""


class UntrainedWarning(UserWarning):
    """A schedule with untrained scores or queries was applied."""


class RunError(PruneSearchError):
    """The run failed although its input was fine."""
