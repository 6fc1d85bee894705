# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest

from llmd4rec_hf.training import guard


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_that_all_processes_get_is_that_signal(monkeypatch, rank):
    """As schedulers send it; and a loss that is not finite on both is one of them."""
    state = SimpleNamespace(num_processes=2, process_index=rank, device="cpu")
    monkeypatch.setattr(guard, "PartialState", lambda: state)
    # The other process has the same, in its own row.
    monkeypatch.setattr(guard, "reduce", lambda mine, how: {"sum": mine + mine.flip(0)}[how])
    assert guard._max_over_processes([signal.SIGTERM, 1]) == [signal.SIGTERM, 1]
