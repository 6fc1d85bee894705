# SPDX-License-Identifier: Apache-2.0
"""The loss against a teacher that lists its best items, as the distribution that the lists stand for."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from dense_loss import WEIGHTINGS, LargestResult, N, assert_same, chunked, dense, problem
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd4rec_hf.distillation import DistillationLoss, ListedScores, distillation_loss
from llmd4rec_hf.errors import ConfigurationError


def with_lists(given, size):
    """
    The problem with, as `lists`, the best items of its teacher. For the oracle the teacher becomes the distribution
    that those stand for, written out: its hidden states are log-probabilities, its item matrix is the identity.
    """
    num_items = len(given.items) - 1
    log_probs = (given.teacher_hidden @ given.teacher_items[1:].T).log_softmax(dim=1)
    best = log_probs.topk(size, dim=1)
    mass = (1 - best.values.exp().sum(dim=1, keepdim=True)).clamp_min(0)
    spread = (mass / max(num_items - size, 1)).log().clamp_min(-1e30).expand(-1, num_items)
    dense_scores = spread.scatter(1, best.indices, best.values)
    given.lists = ListedScores(best.indices + 1, best.values.float())
    given.teacher_hidden = dense_scores
    given.teacher_items = torch.cat([torch.zeros(1, num_items), torch.eye(num_items)]).double()
    return given


def by_lists(given, **options):
    hidden, items = (tensor.detach().float().requires_grad_() for tensor in (given.hidden, given.items))
    result = distillation_loss(hidden, items, given.labels, teacher_lists=given.lists, **options)
    return result, torch.autograd.grad(result.loss, (hidden, items))


def test_a_list_by_hand():
    """
    Three items. The teacher gives the first one half, and so a quarter to each of the others; the student gives a
    third to all: KL = 1/2 log 3/2 + 1/2 log 3/4. Both rank the second item last, since ties count against it.
    """
    lists = ListedScores(torch.tensor([[1]]), torch.tensor([[0.5]]).log())
    result = distillation_loss(torch.zeros(1, 2), torch.ones(4, 2), torch.tensor([2]), teacher_lists=lists)
    assert result.kl.item() == pytest.approx(0.5 * math.log(9 / 8))
    assert result.agreement.item() == pytest.approx(5 / 6)
    assert (result.student_ranks.item(), result.teacher_ranks.item(), result.weight_mean.item()) == (3, 3, 1)


@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5, 3.0])
@pytest.mark.parametrize("size", [1, 5])
def test_lists_are_the_distribution_they_stand_for(size, temperature, weighting, chunk_size):
    given = with_lists(problem(seed=1), size)
    options = {"temperature": temperature, "weighting": weighting, "kl_weight": 0.7}
    actual, grads = by_lists(given, chunk_size=chunk_size, **options)
    assert_same(actual, grads, dense(given, **options), given.labels, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_lists_of_all_items_are_the_teacher(temperature):
    given = problem(seed=2)
    expected = chunked(given, temperature=temperature)
    actual = by_lists(with_lists(given, N), temperature=temperature)
    for field in fields(DistillationLoss):
        torch.testing.assert_close(getattr(actual[0], field.name), getattr(expected[0], field.name))
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    positions=st.integers(1, 9),
    num_items=st.integers(1, 12),
    share=st.floats(0, 1),
    temperature=st.floats(0.3, 4),
    weighting=st.sampled_from(WEIGHTINGS),
)
def test_any_lists(seed, positions, num_items, share, temperature, weighting):
    size = max(1, round(share * num_items))
    given = with_lists(problem(seed, positions, num_items, ignored=()), size)
    options = {"temperature": temperature, "weighting": weighting}
    actual, grads = by_lists(given, **options)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert actual.kl.item() >= -1e-5
    assert 0 <= actual.agreement.item() <= 1 + 1e-6
    # The logarithm of a small rest is rounded less finely in single precision than in the oracle's double.
    if (given.teacher_hidden.amin(dim=1) > math.log(1e-4)).all() or size == num_items:
        assert_same(actual, grads, dense(given, **options), given.labels, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
def test_lists_that_leave_nothing_over(temperature, weighting):
    """The true item has the probability 0 at the first position, and at the second the teacher is certain of it."""
    given = problem(seed=3, positions=2, ignored=())
    given.labels = torch.tensor([9, 4])
    given.lists = ListedScores(torch.tensor([[1, 2], [4, 0]]), torch.tensor([[0.75, 0.25], [1.0, 1.0]]).log())
    given.teacher_hidden = given.lists.dense(N).double()
    given.teacher_items = torch.cat([torch.zeros(1, N), torch.eye(N)]).double()
    options = {"temperature": temperature, "weighting": weighting}
    actual, grads = by_lists(given, **options)
    assert_same(actual, grads, dense(given, **options), given.labels, rtol=1e-5, atol=1e-5)
    assert actual.teacher_ranks.tolist() == [N, 1]


def test_an_item_that_is_not_listed_ranks_last_and_is_not_listened_to():
    """The student ranks the true item first: of a teacher that says nothing about it the rank weights take nothing."""
    items = torch.eye(9)[:, :8]
    lists = ListedScores(torch.tensor([[1, 2], [3, 2]]), torch.tensor([[0.4, 0.3], [0.4, 0.3]]).log())
    hidden = 2 * items[[3, 3]]
    result = distillation_loss(hidden, items, torch.tensor([3, 3]), teacher_lists=lists)
    assert result.student_ranks.tolist() == [1, 1]
    assert result.teacher_ranks.tolist() == [8, 1]
    assert result.weight_mean.item() == 0.5  # 0 and 1


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_hundred_of_two_thousand_items_are_close_to_all_of_them_and_would_not_be_if_renormalised(temperature):
    """A flat teacher, whose best hundred hold less than half of its probability."""
    given = problem(seed=4, positions=40, num_items=2000, scale=0.7, ignored=())
    options = {"temperature": temperature, "weighting": "none"}
    whole, (_, whole_gradient) = chunked(given, **options)
    lists = with_lists(given, 100).lists
    held = lists.log_probs.exp().sum(dim=1, keepdim=True)
    assert 0.1 < held.mean() < 0.6
    listed, (_, gradient) = by_lists(given, **options)
    given.lists = ListedScores(lists.ids, lists.log_probs - held.log())
    renormalised, (_, renormalised_gradient) = by_lists(given, **options)
    assert abs(listed.kl - whole.kl) < 0.2 * abs(renormalised.kl - whole.kl)
    assert (gradient - whole_gradient).norm() < 0.2 * (renormalised_gradient - whole_gradient).norm()


def test_lists_and_autocast():
    given = with_lists(problem(seed=5, positions=60, num_items=300, scale=0.7), 20)
    expected, expected_grads = by_lists(given, temperature=2.0, weighting="none")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, grads = by_lists(given, temperature=2.0, weighting="none")
    torch.testing.assert_close(actual.kl, expected.kl, rtol=2e-3, atol=2e-3)
    for grad, value in zip(grads, expected_grads, strict=True):
        assert (grad - value).norm() < 1e-2 * value.norm()


def test_positions_times_items_is_never_held_for_lists():
    given = with_lists(problem(positions=64, num_items=200), 10)
    with LargestResult() as largest:
        by_lists(given, chunk_size=8)
    assert largest.elements == 8 * 201 < 64 * 200


def test_lists_stay_as_they_are():
    given = with_lists(problem(), 4)
    ids, log_probs = given.lists.ids.clone(), given.lists.log_probs.clone()
    by_lists(given, temperature=2.0)
    assert torch.equal(given.lists.ids, ids) and torch.equal(given.lists.log_probs, log_probs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_lists": ListedScores(torch.ones(2, 3).long(), torch.zeros(2, 3))}, "must be 3, one per .* got 2"),
        ({"teacher_lists": ListedScores(torch.full((3, 1), 5), torch.zeros(3, 1))}, r"lists items 5\.\.5 .* 1\.\.4:"),
        ({"teacher_lists": ListedScores(torch.full((3, 1), -1), torch.zeros(3, 1))}, r"lists items -1\.\.-1"),
        ({"teacher_hidden": torch.zeros(3, 4), "teacher_item_matrix": torch.zeros(5, 4)}, "take the place of"),
    ],
)
def test_errors_of_lists(changes, message):
    arguments = {
        "hidden": torch.zeros(3, 2),
        "item_matrix": torch.zeros(5, 2),
        "labels": torch.tensor([1, 2, 4]),
        "teacher_lists": ListedScores(torch.tensor([[1], [4], [0]]), torch.full((3, 1), -1.0)),
    }
    distillation_loss(**arguments)
    with pytest.raises(ConfigurationError, match=message):
        distillation_loss(**arguments | changes)
