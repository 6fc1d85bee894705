# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from llmd4rec_hf.training import precision


def test_the_slowdown_is_a_quotient_of_times(monkeypatch):
    seconds = {torch.bfloat16: 0.6, torch.float32: 0.2}
    monkeypatch.setattr(precision, "_seconds", seconds.__getitem__)
    assert precision.bf16_slowdown.__wrapped__() == 0.6 / 0.2


def test_the_best_of_several_products_is_taken(monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 12.0, 20.0, 29.0, 30.0, 39.0, 40.0, 49.0])
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(clock))
    assert precision._seconds(torch.float32) == 2.0
