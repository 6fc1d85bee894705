# SPDX-License-Identifier: Apache-2.0
"""Whether a processor is fast in the 16-bit numbers that it is asked to train in."""

from __future__ import annotations

import functools
import time

import torch


# Of scores: a chunk of positions, a narrow model, a block of items.
_SHAPE = (256, 64, 1024)


@functools.cache
def bf16_slowdown() -> float:
    """
    How many times as long as in float32 a matrix product takes this CPU in bf16. With instructions for it, a half or
    less; without, two to twenty times as long. Measured, in milliseconds, since a processor's flags do not tell:
    some that name such instructions are slower with them.
    """
    return _seconds(torch.bfloat16) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The best of a few calls, which other work on the machine disturbs least."""
    rows, inner, columns = _SHAPE
    left, right = torch.ones(rows, inner, dtype=dtype), torch.ones(columns, inner, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(left, right.T)
        times.append(time.perf_counter() - start)
    return min(times)
