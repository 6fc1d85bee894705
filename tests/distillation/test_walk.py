# SPDX-License-Identifier: Apache-2.0
"""What the loss holds in memory, and that where it is cut changes nothing."""

from __future__ import annotations

import pytest
import torch
from dense_loss import D, LargestResult, N, chunked, problem

from llmd4rec_hf.distillation import walk
from llmd4rec_hf.distillation.walk import default_chunk_size


@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_positions_times_items_is_never_held(teacher, temperature):
    positions, num_items, chunk_size = 64, 200, 8
    given = problem(positions=positions, num_items=num_items)
    with LargestResult() as largest:
        chunked(given, teacher, chunk_size=chunk_size, temperature=temperature)
    assert largest.elements == chunk_size * num_items < positions * num_items


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_chunks_slices_and_blocks_change_nothing(monkeypatch, temperature, teacher, precision):
    """What is chosen by size for large problems, forced upon a small one: none of them divides it evenly."""
    given = problem(seed=14)
    half = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16")
    with half:
        expected, expected_grads = chunked(given, teacher, temperature=temperature)
        monkeypatch.setitem(walk._SLICE_BYTES, "cpu", 2 * 4 * N)  # two rows
        monkeypatch.setattr(walk, "_SCORE_BLOCK_BYTES", 3 * 4 * D)  # three items
        monkeypatch.setattr(walk, "_GRADIENT_BLOCK_BYTES", 5 * 4 * D)  # five
        actual, grads = chunked(given, teacher, temperature=temperature, chunk_size=5)
    rounding = {"rtol": 2e-2, "atol": 2e-3} if precision == "bfloat16" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(grads, expected_grads, **rounding)
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.agreement, expected.agreement)
    assert torch.equal(actual.student_ranks, expected.student_ranks)


def test_default_chunk_size():
    assert default_chunk_size(12_000, "cpu") == (12 << 20) // 48_000
    assert default_chunk_size(10_000_000, "cpu") == 64
    assert default_chunk_size(12_000, "cuda") > default_chunk_size(12_000, torch.device("cpu"))
