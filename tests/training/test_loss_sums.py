# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from llmd4rec_hf.training.loss_sums import LOSS_SUMS_NAME, LossSums


# Two processes that have the same.
ACCELERATOR = SimpleNamespace(reduce=lambda sums, how: {"sum": 2 * sums, "mean": sums}[how])


@pytest.fixture
def sums():
    """Of two batches of 4 and 6 positions, whose loss was divided by 10 each time."""
    sums = LossSums(torch.device("cpu"))
    for positions, scale in ((4, 1.0), (6, 2.0)):
        values = {"cross_entropy": 0.5 * scale, "kl": 0.25 * scale, "weight_mean": scale, "agreement": 0.5 * scale}
        parts = SimpleNamespace(**{name: torch.tensor(value) for name, value in values.items()})
        sums.add(parts, positions, 10.0, has_teacher=True)
    return sums


def test_means_by_hand(sums):
    """(0.5 + 1) * 10 / 10 positions, and so on; (4 * 1 + 6 * 2) / 10 for what is a mean itself."""
    expected = {"cross_entropy": 1.5, "kl": 0.75, "weight_mean": 1.6, "agreement": 0.8}
    assert sums.take_means(ACCELERATOR) == pytest.approx(expected)
    assert sums.take_means(ACCELERATOR) == {}


def test_sums_are_those_of_all_processes(sums):
    found = sums.over_processes(ACCELERATOR)
    assert found["positions"] == 20
    assert found["cross_entropy"] == pytest.approx(30)


def test_without_a_teacher_there_is_the_cross_entropy_alone():
    sums = LossSums(torch.device("cpu"))
    sums.add(SimpleNamespace(cross_entropy=torch.tensor(0.5)), 4, torch.tensor(10), has_teacher=False)
    assert sums.take_means(ACCELERATOR) == {"cross_entropy": 1.25}


@pytest.mark.parametrize(("is_main", "share"), [(True, 1), (False, 0)])
def test_the_sums_of_a_checkpoint_are_taken_up_by_one_process(sums, tmp_path, is_main, share):
    (tmp_path / LOSS_SUMS_NAME).write_text(json.dumps({"cross_entropy": 6.0, "positions": 4.0}))
    sums.resume(tmp_path, is_main)
    assert sums.over_processes(ACCELERATOR) == {"cross_entropy": 12.0 * share, "positions": 8.0 * share}
    sums.resume(tmp_path / "another Trainer's", is_main)
    assert sums.over_processes(ACCELERATOR) == {}
