# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from llmd4rec_hf.models.dropout import Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_the_rate_is_dropped_and_the_rest_makes_up_for_it(rate, dtype):
    torch.manual_seed(0)
    inputs = torch.full((400, 500), 2.0, dtype=dtype)
    output = Dropout(rate)(inputs)
    assert output.dtype == dtype
    # Four standard deviations of a mean of 200,000.
    assert (output == 0).float().mean().item() == pytest.approx(rate, abs=0.0045)
    torch.testing.assert_close(output[output != 0].unique(), torch.tensor([2 / (1 - rate)], dtype=dtype))


def test_the_gradient_goes_where_the_numbers_went():
    torch.manual_seed(0)
    inputs = torch.ones(1000, requires_grad=True)
    output = Dropout(0.3)(inputs)
    output.sum().backward()
    assert torch.equal(inputs.grad, output.detach())


def test_the_seed_decides():
    inputs = torch.ones(100)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(Dropout(0.5)(inputs))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(("rate", "training", "expected"), [(0.0, True, 1.0), (1.0, True, 0.0), (0.5, False, 1.0)])
def test_nothing_is_drawn_where_nothing_is_open(rate, training, expected):
    inputs = torch.ones(10)
    before = torch.get_rng_state()
    assert torch.equal(Dropout(rate).train(training)(inputs), torch.full((10,), expected))
    assert torch.equal(torch.get_rng_state(), before)
