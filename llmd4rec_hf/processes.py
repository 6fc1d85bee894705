# SPDX-License-Identifier: Apache-2.0
"""Several processes that act as one: they agree on what they read, and fail together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from .errors import LLMD4RecError


T = TypeVar("T")


def on_every_process(work: Callable[[], T]) -> T:
    """
    Run `work` on every process. If it fails on one of them it fails on all, with that one's error.

    Every process must call it, and `work` must not communicate: a process that waits inside it for one that has
    failed would wait for ever.
    """
    return _together(work)[0]


def on_main_process(work: Callable[[], T]) -> T:
    """Run `work` on the main process alone, and give its result, or its error, to all."""
    if PartialState().is_main_process:
        return _together(work, share=True)[0]
    return _together(lambda: None, share=True)[1]


def _together(work: Callable[[], T], share: bool = False) -> tuple[T, T | None]:
    """This process's own result and, with `share`, that of the main process."""
    state = PartialState()
    if state.num_processes == 1:
        return work(), None
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    outcomes = gather_object([(result if share else None, None if failure is None else _portable(failure))])
    failed = [rank for rank, (_, error) in enumerate(outcomes) if error is not None]
    if failed:
        kind, message = outcomes[failed[0]][1]
        raise (failure or kind(f"process {failed[0]}: {message}"))
    return result, outcomes[0][0]


def _portable(error: Exception) -> tuple[Callable[[str], Exception], str]:
    """An error as another process can raise it: those of this package and the system's as they are, others by name."""
    if isinstance(error, LLMD4RecError):
        return type(error), str(error)
    if isinstance(error, OSError) and error.errno is not None:
        # By its number a full disk and its like are told from others.
        return partial(OSError, error.errno), error.strerror + (f": {error.filename}" if error.filename else "")
    return RuntimeError, f"{type(error).__name__}: {error}"
