# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from llmd4rec_hf import processes
from llmd4rec_hf.errors import LLMD4RecError, UnknownItemsError, first_line


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


@pytest.mark.parametrize("kind", all_kinds())
def test_another_process_raises_the_same_kind(monkeypatch, kind):
    """Of each error a process sends kind and text to the others."""

    class Other:
        num_processes = 2

    monkeypatch.setattr(processes, "PartialState", Other)
    monkeypatch.setattr(processes, "gather_object", lambda mine: [(None, (kind, "it went wrong")), *mine])
    with pytest.raises(kind, match="process 0: it went wrong"):
        processes.on_every_process(lambda: None)
