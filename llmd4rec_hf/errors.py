# SPDX-License-Identifier: Apache-2.0
"""The errors a user can mend. Each message says what was wrong, where, and what to do."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """An error of a library cut to one line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class LLMD4RecError(Exception):
    """Base class: catch it to catch every error of this package that a user can mend."""


class DataError(LLMD4RecError, ValueError):
    """The interaction log, the catalogue, a batch or a black box's answer is not what it should be."""


class UnknownItemsError(DataError):
    """
    Items that a vocabulary does not hold.

    Args:
        what (`str`): how many there are, and which is the first.
        remedy (`str`, *optional*): what to do, by the names that whoever asked knows.
    """

    def __init__(self, what: str, remedy: str | None = None):
        super().__init__(what if remedy is None else f"{what}; {remedy}")
        self.what = what

    def with_remedy(self, remedy: str) -> UnknownItemsError:
        """The same error for somebody who knows other names."""
        return UnknownItemsError(self.what, remedy)


class ConfigurationError(LLMD4RecError, ValueError):
    """Arguments that are out of range, contradict each other, or do not fit the models or the data."""


class CacheError(LLMD4RecError, RuntimeError):
    """A teacher cache is missing, torn, or was made from another teacher, catalogue or data set."""


class RunStateError(LLMD4RecError, RuntimeError):
    """The state of a run on disk is damaged or belongs to another configuration."""


class StorageError(LLMD4RecError, OSError):
    """The disk is full, or a folder cannot be written to."""


class TrainingError(LLMD4RecError, RuntimeError):
    """Training cannot go on as it is, for example because the loss is not finite."""


class RunInterrupted(LLMD4RecError):
    """
    A signal has asked for a stop; everything is saved.

    Args:
        message (`str`): where it stopped, and how to go on.
        signal_number (`int`, *optional*, defaults to 15): the signal.
    """

    def __init__(self, message: str, signal_number: int = 15):
        super().__init__(message)
        self.signal_number = signal_number
