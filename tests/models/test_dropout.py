# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from llmd4rec_hf.models.dropout import Dropout, use_cheap_masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_the_rate_is_dropped_and_the_rest_makes_up_for_it(rate, dtype):
    torch.manual_seed(0)
    inputs = torch.full((400, 500), 2.0, dtype=dtype)
    output = Dropout(rate)(inputs)
    assert output.dtype == dtype
    # Four standard deviations of a mean of 200,000.
    assert (output == 0).float().mean().item() == pytest.approx(rate, abs=0.0045)
    # The rate is rounded to 16 bits.
    expected = torch.tensor([2 / (1 - round(rate * 2**16) / 2**16)], dtype=dtype)
    torch.testing.assert_close(output[output != 0].unique(), expected)


def test_numbers_are_dropped_one_by_one():
    """Four of them share a draw: none tells of another."""
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(100_000, 4)) != 0).float()
    correlations = torch.corrcoef(kept.T) - torch.eye(4)
    assert correlations.abs().max() < 4 * 100_000**-0.5
    between_draws = torch.corrcoef(torch.stack([kept[:-1, 3], kept[1:, 0]]))[0, 1]
    assert abs(between_draws) < 4 * 100_000**-0.5


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 0, 4)])
def test_any_shape(shape):
    torch.manual_seed(0)
    output = Dropout(0.5)(torch.ones(shape))
    assert output.shape == shape
    assert set(output.flatten().tolist()) <= {0.0, 2.0}


def test_rates_at_the_ends_of_what_bits_can_say():
    inputs = torch.ones(1000)
    assert torch.equal(Dropout(1e-9)(inputs), inputs)
    assert Dropout(1 - 1e-9)(inputs).isfinite().all()


def test_a_compiler_sees_torchs_own():
    compiled = torch.compile(Dropout(0.5), backend="eager", fullgraph=True)
    assert set(compiled(torch.ones(100)).tolist()) == {0.0, 2.0}


def test_inputs_that_do_not_lie_in_a_row():
    torch.manual_seed(0)
    inputs = torch.arange(1.0, 13).view(3, 4).T
    output = Dropout(0.5)(inputs)
    kept = output != 0
    assert 0 < kept.sum() < 12
    assert torch.equal(output[kept], 2 * inputs[kept])


def test_a_models_own_dropouts_are_exchanged():
    class Other(nn.Dropout):
        pass

    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.3)), "b": Other(0.4)}).eval()
    use_cheap_masks(model)
    assert type(model["a"][1]) is Dropout and type(model["b"]) is Other
    assert model["a"][1].p == 0.3 and not model["a"][1].training


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
