# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmd4rec_hf import CRMArguments, target_ranks
from llmd4rec_hf.distillation import (
    confidence_weights,
    distillation_loss,
    rank_weights,
    register_weighting,
    weighting,
)
from llmd4rec_hf.errors import ConfigurationError


RANKS = st.integers(1, 300_000)
LOG_PROBABILITIES = st.floats(-60, 0, allow_nan=False, width=32)


def clip(value):
    return min(max(value, 0.0), 2.0)


def paper_w1(r_c, r_l):
    """How much the LLM listens to the CRM; `r_c` and `r_l` are their ranks of the true item."""
    return clip(1 + (r_l - r_c) / max(r_c, 1)) if r_l > r_c else clip(1 - (r_c - r_l) / max(r_l, 1))


def paper_w2(r_c, r_l):
    """How much the CRM listens to the LLM."""
    return clip(1 + (r_c - r_l) / max(r_l, 1)) if r_c > r_l else clip(1 - (r_l - r_c) / max(r_c, 1))


def pairs(limit):
    return torch.tensor(list(product(range(1, limit + 1), repeat=2))).T


@pytest.mark.parametrize(
    ("student", "teacher", "base", "weight"),
    [
        (1, 1, 1, 1.0),
        (3, 2, 1, 1.5),
        (2, 3, 1, 0.5),
        (3, 2, 0, 2.0),
        (2, 3, 0, 0.0),
        (2, 1, 0, 2.0),
        (6, 5, 1, 1.2),
        (5, 6, 1, 0.8),
        (6, 5, 0, 1.25),
        (100, 1, 1, 2.0),
        (1, 100, 1, 0.0),
    ],
)
def test_by_hand(student, teacher, base, weight):
    actual = rank_weights(torch.tensor([student]), torch.tensor([teacher]), base)
    assert actual.dtype == torch.float32
    assert actual.tolist() == [pytest.approx(weight)]


def test_base_1_is_the_default():
    assert rank_weights(torch.tensor([3]), torch.tensor([2])).item() == 1.5


@pytest.mark.parametrize("base", [0, 1])
def test_both_formulas_of_the_paper_by_enumeration(base):
    crm, llm = pairs(30)
    shifted = [(c + base - 1, m + base - 1) for c, m in zip(crm.tolist(), llm.tolist(), strict=True)]
    w1, w2 = (torch.tensor([formula(*pair) for pair in shifted]) for formula in (paper_w1, paper_w2))
    torch.testing.assert_close(rank_weights(llm, crm, base), w1)
    torch.testing.assert_close(rank_weights(crm, llm, base), w2)
    torch.testing.assert_close(w1 + w2, torch.full_like(w1, 2.0))


@pytest.mark.parametrize("base", [0, 1])
@given(student=RANKS, teacher=RANKS)
def test_properties_of_rank_weights(base, student, teacher):
    student, teacher = torch.tensor([student]), torch.tensor([teacher])
    weight = rank_weights(student, teacher, base).item()
    assert 0.0 <= weight <= 2.0
    assert weight + rank_weights(teacher, student, base).item() == pytest.approx(2.0, abs=1e-6)
    assert (weight > 1) == (student.item() > teacher.item())
    assert rank_weights(student, student, base).item() == 1.0


@pytest.mark.parametrize("base", [-1, 2, 0.5, None])
def test_unknown_base(base):
    with pytest.raises(ConfigurationError, match="rank_base must be 0 or 1"):
        rank_weights(torch.tensor([1]), torch.tensor([1]), base)


def test_confidence_by_hand():
    student, teacher = torch.tensor([0.2, 0.5, 0.75]), torch.tensor([0.2, 0.25, 0.25])
    torch.testing.assert_close(
        confidence_weights(student.log(), teacher.log()), torch.tensor([1.0, 2 * 0.25 / 0.75, 0.5])
    )


@given(LOG_PROBABILITIES, LOG_PROBABILITIES)
def test_properties_of_confidence_weights(student, teacher):
    student, teacher = torch.tensor([student]), torch.tensor([teacher])
    weight = confidence_weights(student, teacher)
    assert 0.0 <= weight.item() <= 2.0
    torch.testing.assert_close(weight + confidence_weights(teacher, student), torch.tensor([2.0]))
    assert confidence_weights(student, student).item() == 1.0


# --- weightings of one's own -----------------------------------------------------------------------------------------


@pytest.fixture
def own_weighting():
    # A name that no block of the documentation registers: those run in the same process.
    register_weighting("of_this_test", lambda student, teacher: 3 * (teacher.log_probs > -1.0) * (teacher.ranks == 1))
    yield "of_this_test"
    del weighting.WEIGHTINGS["of_this_test"]


def test_a_weighting_of_ones_own_weighs(own_weighting):
    torch.manual_seed(0)
    hidden, items, labels = torch.randn(6, 4), torch.randn(9, 4), torch.tensor([1, 2, 3, 4, 5, 8])
    teacher = torch.randn(6, 4)
    teacher[:2] = 5 * items[labels[:2]]
    plain = [
        distillation_loss(hidden[[i]], items, labels[[i]], teacher[[i]], items, weighting="none", temperature=2.0)
        for i in range(6)
    ]
    log_probs = (teacher @ items[1:].T / 2.0).log_softmax(dim=1)[range(6), labels - 1]
    ranks = target_ranks(teacher, items, labels)
    weights = [3.0 * (value > -1.0 and rank == 1) for value, rank in zip(log_probs.tolist(), ranks, strict=True)]
    assert 0 < sum(weights) < 18
    loss = distillation_loss(hidden, items, labels, teacher, items, weighting=own_weighting, temperature=2.0)
    expected = sum(weight * part.kl for weight, part in zip(weights, plain, strict=True)) / 6
    torch.testing.assert_close(loss.kl, torch.as_tensor(expected))
    assert loss.weight_mean.item() == pytest.approx(sum(weights) / 6)


def test_the_trainers_take_its_name(own_weighting, tmp_path):
    assert CRMArguments(str(tmp_path), weighting=own_weighting, report_to="none").weighting == own_weighting
    with pytest.raises(ConfigurationError, match="must be one of .*'of_this_test'"):
        CRMArguments(str(tmp_path), weighting="unsure", report_to="none")


def test_a_name_is_taken_once(own_weighting):
    with pytest.raises(ConfigurationError, match="already"):
        register_weighting("rank", lambda student, teacher: student.ranks)
