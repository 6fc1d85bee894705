# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmd4rec_hf.distillation.stored_rows import EXACT_WIDTH, pack, row_type, unpack


def wide(*numbers: float) -> torch.Tensor:
    """A row of 200 that begins with these."""
    row = torch.zeros(1, 200)
    row[0, : len(numbers)] = torch.tensor(numbers)
    return row


@pytest.mark.parametrize(("width", "size"), [(64, 256), (128, 512), (129, 262), (1024, 2052)])
def test_bytes_per_row(width, size):
    assert row_type(width).itemsize == size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_narrow_rows_are_exact(dtype):
    hidden = torch.randn(5, EXACT_WIDTH).to(dtype)
    assert torch.equal(unpack(pack(hidden)), hidden.float())


def test_codes_by_hand():
    rows = pack(wide(2.0, -1.0, 1e-9))
    assert rows["scale"].item() == pytest.approx(2 / 32767)
    assert rows["codes"][0, :4].tolist() == [32767, -16384, 0, 0]
    assert unpack(rows)[0, :3].tolist() == pytest.approx([2.0, -1.00003, 0.0], abs=1e-5)


def test_rows_have_their_own_scales():
    hidden = torch.cat([wide(1e6, 1.0), wide(1e-6), wide()])
    stored = unpack(pack(hidden))
    assert stored[:, 0].tolist() == pytest.approx([1e6, 1e-6, 0.0])
    assert not stored[2].any()


@given(st.integers(0, 2**31), st.floats(-30, 30))
def test_the_error_is_half_a_step(seed, exponent):
    hidden = torch.randn(7, 150, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    largest = hidden.abs().amax(dim=1, keepdim=True)
    assert ((unpack(pack(hidden)) - hidden).abs() <= largest / 32767 * 0.505).all()


@pytest.mark.parametrize("width", [3, 131])
def test_no_rows(width):
    rows = pack(torch.zeros(0, width))
    assert rows.dtype == row_type(width)
    assert unpack(rows).shape == (0, width)


@pytest.mark.parametrize("width", [3, 130, 131])
def test_one_row(width):
    """Of an odd width its records are not aligned, and a single one counts as contiguous all the same."""
    hidden = torch.randn(2, width)
    assert torch.equal(unpack(pack(hidden)[[1]]), unpack(pack(hidden))[1:])


def test_rows_survive_a_file_without_pickle(tmp_path):
    hidden = torch.randn(4, 131)
    np.save(tmp_path / "rows.npy", pack(hidden), allow_pickle=False)
    rows = np.load(tmp_path / "rows.npy", mmap_mode="r", allow_pickle=False)
    assert torch.equal(unpack(rows[[2, 0]]), unpack(pack(hidden[[2, 0]])))
