# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd4rec_hf import ListedScores
from llmd4rec_hf.distillation.listed_scores import LOG_ZERO
from llmd4rec_hf.errors import ConfigurationError


def listed(ids, probabilities) -> ListedScores:
    return ListedScores(torch.tensor(ids), torch.tensor(probabilities).log())


def probabilities(lists, num_items):
    return lists.dense(num_items).exp()


def test_what_is_left_over_is_spread_over_the_others():
    """Three tenths over three items; with a shorter list, six tenths over four."""
    lists = listed([[4, 2], [5, 0]], [[0.5, 0.2], [0.4, 0.9]])
    expected = torch.tensor([[0.1, 0.2, 0.1, 0.5, 0.1], [0.15, 0.15, 0.15, 0.15, 0.4]])
    torch.testing.assert_close(probabilities(lists, 5), expected)
    torch.testing.assert_close(lists.rest(5).exp(), torch.tensor([[0.1], [0.15]]))


def test_a_list_is_not_renormalised():
    assert probabilities(listed([[1, 2]], [[0.03, 0.01]]), 100)[0, :2].tolist() == pytest.approx([0.03, 0.01])


def test_an_empty_list_says_nothing():
    torch.testing.assert_close(probabilities(listed([[0, 0]], [[0.3, 0.9]]), 4), torch.full((1, 4), 0.25))


@pytest.mark.parametrize("left", [0.0, 1e-7, -5e-4])
def test_nothing_left_over_but_rounding(left):
    lists = listed([[3, 1]], [[0.75, 0.25 - left]])
    scores = lists.dense(4)
    assert scores[0, [1, 3]].tolist() == [torch.tensor(LOG_ZERO).item()] * 2
    assert scores.exp()[0].tolist() == pytest.approx([0.25 - left, 0, 0.75, 0])


def test_an_item_listed_with_the_probability_zero():
    lists = listed([[3, 1]], [[0.5, 0.0]])
    assert probabilities(lists, 3)[0].tolist() == pytest.approx([0, 0.5, 0.5])
    assert torch.isfinite(lists.dense(3)).all()


def test_all_items_listed():
    lists = listed([[2, 3, 1]], [[0.5, 0.3, 0.2]])
    assert probabilities(lists, 3)[0].tolist() == pytest.approx([0.2, 0.5, 0.3])


@pytest.mark.parametrize("fill", [7.0, float("nan"), float("inf"), -float("inf")])
def test_what_fills_up_a_list_never_matters(fill):
    lists = listed([[2, 0]], [[0.4, 0.5]])
    expected = lists.dense(3).clone()
    lists.log_probs[0, 1] = fill
    assert torch.equal(lists.dense(3), expected)


def test_half_precision_becomes_single():
    lists = ListedScores(torch.tensor([[2]]), torch.tensor([[-1.5]]).bfloat16())
    assert lists.dense(3).dtype == torch.float32
    assert lists.dense(3)[0, 1].item() == -1.5


@settings(deadline=None, max_examples=100)
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=9),
    rest=st.floats(0, 3),
    more=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_it_is_always_a_distribution(weights, rest, more, seed):
    num_items, k = len(weights) + more, len(weights)
    ids = torch.randperm(num_items, generator=torch.Generator().manual_seed(seed))[:k] + 1
    given = torch.tensor(weights) / (sum(weights) + (rest if more else 0))
    dense = probabilities(ListedScores(ids[None], given.log()[None]), num_items)[0]
    assert dense.sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(dense[ids - 1], given)
    others = torch.ones(num_items, dtype=torch.bool).index_fill(0, ids - 1, False)
    assert len(dense[others].unique()) <= 1


@pytest.mark.parametrize("size", [1, 3, 7])
def test_some_items_of_each_position(size):
    random = torch.Generator().manual_seed(size)
    ids = torch.stack([torch.randperm(7, generator=random)[:size] + 1 for _ in range(5)])
    ids[0, -1] = 0
    lists = ListedScores(ids, (torch.rand(5, size, generator=random) / size).log())
    items = torch.randint(1, 8, (5, 20), generator=random)
    assert torch.equal(lists.at(items, 7), lists.dense(7).gather(1, items - 1))


def test_some_positions():
    lists = listed([[1], [2], [3]], [[0.1], [0.2], [0.3]])
    assert len(lists) == 3
    for index in (slice(1, 3), torch.tensor([False, True, True]), torch.tensor([1, 2])):
        assert lists[index].ids.tolist() == [[2], [3]]
        assert lists[index].log_probs.exp().flatten().tolist() == pytest.approx([0.2, 0.3])


@pytest.mark.parametrize(
    "shapes", [((2, 3), (2, 2)), ((2, 3), (3, 3)), ((3,), (3,)), ((1, 2, 3), (1, 2, 3)), ((2, 0), (2, 0))]
)
def test_shapes(shapes):
    with pytest.raises(ConfigurationError, match=r"ids and log_probs must both be \(P, k\), .* got"):
        ListedScores(torch.ones(shapes[0]).long(), torch.zeros(shapes[1]))


def test_the_logarithm_of_zero_stays_a_number():
    zero = torch.tensor(LOG_ZERO)
    assert zero.exp() == 0
    assert zero * zero.exp() == 0
    assert zero - zero == 0
    assert math.isfinite((zero / 1e-6 / math.log(2)).item())
