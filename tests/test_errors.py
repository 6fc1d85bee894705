# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import pickle
from pathlib import Path

import pytest

from llmd4rec_hf import processes
from llmd4rec_hf.errors import LLMD4RecError, StorageError, UnknownItemsError, first_line
from llmd4rec_hf.files import storage_errors_named


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  it is so\nand so"), "it is so"),
        (OSError(), "OSError"),
        (KeyError("name"), "'name'"),
    ],
)
def test_an_error_of_a_library_is_cut_to_one_line(error, line):
    assert first_line(error) == line


def test_unknown_items_with_another_remedy():
    error = UnknownItemsError("2 items are unknown", "leave them out")
    assert str(error) == "2 items are unknown; leave them out"
    assert str(error.with_remedy("skip them")) == "2 items are unknown; skip them"


def all_kinds(kind: type = LLMD4RecError) -> list[type]:
    return [kind, *(deeper for below in kind.__subclasses__() for deeper in all_kinds(below))]


@pytest.fixture
def another(monkeypatch):
    """Lets this process be the second of two, and the first one send a kind of error and a text."""

    class Both:
        num_processes = 2

    def sends(kind, text):
        monkeypatch.setattr(processes, "PartialState", Both)
        monkeypatch.setattr(processes, "gather_object", lambda mine: [(None, (kind, text)), *mine])

    return sends


@pytest.mark.parametrize("kind", all_kinds())
def test_another_process_raises_the_same_kind(another, kind):
    """Of each error a process sends kind and text to the others."""
    another(kind, "it went wrong")
    with pytest.raises(kind, match="process 0: it went wrong"):
        processes.on_every_process(lambda: None)


def test_of_several_failures_the_first_is_that_of_all(another, monkeypatch):
    another(LLMD4RecError, "the second")
    others = processes.gather_object([])
    monkeypatch.setattr(
        processes, "gather_object", lambda mine: [(None, (LLMD4RecError, "the first")), *others, *mine]
    )
    with pytest.raises(LLMD4RecError, match="process 0: the first"):
        processes.on_every_process(lambda: None)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_another_process_too_knows_a_disk_that_cannot_be_written_to(another, number):
    another(*pickle.loads(pickle.dumps(processes._portable(OSError(number, "no way", "state.json")))))
    with (
        pytest.raises(StorageError, match=r"write to run \(.*process 0: no way: state.json\). Make room"),
        storage_errors_named(Path("run"), "Make room."),
    ):
        processes.on_every_process(lambda: None)
