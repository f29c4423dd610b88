"""Load the items of a data set in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import BaseContext
from pickle import PicklingError
from types import ModuleType
from typing import Any

from torch.utils.data import DataLoader, Dataset

from prunesearch.errors import DataError


def load(
    source: Dataset[Any], batches: Iterable[list[int]], collate: Callable[[list[Any]], Any], loaders: int
) -> Iterator[Any]:
    """For each list of indices what `collate` makes of its items, decoded by `loaders` processes (0: by this one).

    Raises DataError when the data set cannot be sent to other processes, and the DataErrors of its items.
    """
    context = _context() if loaders else None
    if loaders:
        source, collate = _Guarded(source), partial(_collated, collate)
    try:
        with warnings.catch_warnings(), _main_hidden():
            # PyTorch warns before it raises, and advises to fork
            warnings.filterwarnings("ignore", message="Got pickle error")
            # two processes share one core well enough; leaving this context makes Python forget that it has warned
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            batches = iter(
                DataLoader(
                    source,
                    batch_sampler=batches,
                    num_workers=loaders,
                    collate_fn=collate,
                    multiprocessing_context=context,
                    worker_init_fn=_end_with_parent if loaders else None,
                )
            )
        return _raised(batches)
    except (PicklingError, AttributeError, TypeError) as error:
        raise DataError(
            f"data.loaders: the data set cannot be sent to the {loaders} processes that decode images ({error}). "
            f"Possible: a class and functions that a module has by name, without open files. Write loaders: 0 under "
            f"data, or keep what cannot be sent out of the data set."
        ) from error


class _Guarded(Dataset[Any]):
    """A data set that gives DataErrors instead of raising them. PyTorch would add the traceback of its process."""

    def __init__(self, source: Dataset[Any]) -> None:
        self._source = source

    def __getitem__(self, index: int) -> Any:
        try:
            return self._source[index]
        except DataError as error:
            return error


def _collated(collate: Callable[[list[Any]], Any], items: list[Any]) -> Any:
    return next((item for item in items if isinstance(item, DataError)), None) or collate(items)


def _raised(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches, until one is an error."""
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch


@contextmanager
def _main_hidden() -> Iterator[None]:
    """Processes that start here do not import the main module: a script without `if __name__ == "__main__"` would run
    anew in each of them. What is defined in the main module cannot be sent then."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _end_with_parent(loader: int) -> None:
    """End this loading process when the process that asked for it has ended, even by a kill.

    PyTorch watches the process that forked this one. That is the fork server, which lives as long as its children do.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "it runs in a loading process"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _context() -> BaseContext:
    """How the processes start. They are not forked from this one, which has threads: a fork copies their locks as they
    are, and shares the offsets of open files."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # the server imports this once; each process would take seconds for it
    context.set_forkserver_preload(["prunesearch.evaluate.data"])
    return context
