# SPDX-License-Identifier: Apache-2.0
"""The sampled loss against the loss over all items, and against plain autograd on the same sample."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd4rec_hf.distillation import (
    DistillationLoss,
    ListedScores,
    distillation_loss,
    draw_negatives,
    rank_weights,
    sampled_distillation_loss,
)
from llmd4rec_hf.errors import ConfigurationError


P, N, D, D_TEACHER = 9, 20, 4, 3


def problem(seed=0, positions=P, num_items=N):
    """Hidden states, item matrix and labels, then the teacher's hidden states and item matrix, in double precision."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        # Values that bfloat16 holds exactly.
        return torch.randn(*shape, generator=random).bfloat16().double()

    labels = torch.randint(1, num_items + 1, (positions,), generator=random)
    student, teacher = ((draw(positions, width), draw(num_items + 1, width)) for width in (D, D_TEACHER))
    return *student, labels, *teacher


def sampled(given, negatives, teacher=True, **options):
    """The loss in single precision, and its gradients for hidden states and for the whole item matrix."""
    hidden, items, labels, teacher_hidden, teacher_items = given
    hidden, items = (tensor.float().requires_grad_() for tensor in (hidden, items))
    rows = torch.cat([negatives, labels])
    pair = (teacher_hidden.float(), teacher_items.float()[rows]) if teacher else ()
    result = sampled_distillation_loss(
        hidden, items[rows], labels, *pair, negatives=negatives, num_items=len(items) - 1, **options
    )
    return result, torch.autograd.grad(result.loss, (hidden, items))


def estimated_rank(scores, target, others, stands_for):
    return 1 + round(stands_for * sum(scores[j].item() >= scores[target].item() for j in others))


def by_definition(given, negatives, teacher=True, *, temperature=1.0, kl_weight=1.0):
    """Position by position: the true item once, and each other item of the sample in place of many."""
    hidden, items, labels, teacher_hidden, teacher_items = given
    hidden, items = (tensor.clone().requires_grad_() for tensor in (hidden, items))
    num_items, cross_entropy, kl, agreement, ranks, weights = len(items) - 1, 0.0, 0.0, 0.0, [], []
    for i, y in enumerate(labels.tolist()):
        others = [j for j in negatives.tolist() if j != y]
        stands_for = (num_items - 1) / max(len(others), 1)
        ids, logs = torch.tensor([y, *others]), torch.tensor([0.0] + [math.log(stands_for)] * len(others)).double()
        scores, teacher_scores = items @ hidden[i], teacher_items @ teacher_hidden[i]
        cross_entropy = cross_entropy - (scores[ids] + logs).log_softmax(0)[0]
        ranks.append(estimated_rank(scores, y, others, stands_for))
        log_q, log_p = ((s[ids] / temperature + logs).log_softmax(0) for s in (scores, teacher_scores))
        teacher_rank = estimated_rank(teacher_scores, y, others, stands_for)
        weights.append(rank_weights(torch.tensor(ranks[-1]), torch.tensor(teacher_rank)).item())
        kl = kl + weights[-1] * temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        agreement += torch.minimum(log_q, log_p).exp().sum().item()
    count = len(labels)
    loss = (cross_entropy + kl_weight * kl if teacher else cross_entropy) / count
    parts = {"loss": loss, "cross_entropy": cross_entropy / count}
    if teacher:
        parts |= {"kl": kl / count, "weight_mean": sum(weights) / count, "agreement": agreement / count}
    return parts, ranks, torch.autograd.grad(loss, (hidden, items))


def assert_same(actual, grads, expected, expected_grads, **tolerance):
    for name, value in expected.items():
        torch.testing.assert_close(getattr(actual, name).item(), torch.as_tensor(value).item(), msg=name, **tolerance)
    for grad, value in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, value.float(), **tolerance)


def test_two_negatives_by_hand():
    """exp(score) is 1 for the true items 1 and 7, 2 for item 3 and 1 for item 7."""
    negatives, labels = torch.tensor([3, 7]), torch.tensor([1, 7])
    vectors = torch.tensor([2.0, 1.0, 1.0, 1.0]).log()[:, None]
    result = sampled_distillation_loss(torch.ones(2, 1), vectors, labels, negatives=negatives, num_items=10)
    # The first: 3 and 7 stand for the other nine. The second: 7 is its own, so 3 alone stands for nine.
    expected = math.log(1 + 9 / 2 * (2 + 1)) + math.log(1 + 9 * 2)
    assert result.cross_entropy.item() == pytest.approx(expected / 2)
    assert result.student_ranks.tolist() == [10, 10]
    assert result.teacher_ranks is None


def test_ranks_are_rounded_estimates():
    vectors = torch.tensor([3.0, 1.0, 0.0, 2.0])[:, None]
    labels, negatives = torch.tensor([9]), torch.tensor([1, 2, 3])
    result = sampled_distillation_loss(torch.ones(1, 1), vectors, labels, negatives=negatives, num_items=11)
    assert result.student_ranks.tolist() == [1 + 3]  # one of three is better, and each stands for 10 / 3


@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("weighting", ["rank", "confidence", "none"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_sample_of_all_items_gives_the_full_loss(teacher, weighting, temperature):
    given = problem()
    options = {"temperature": temperature, "weighting": weighting, "kl_weight": 0.7, "num_items_in_batch": 5}
    negatives = torch.randperm(N, generator=torch.Generator().manual_seed(0)) + 1
    actual, grads = sampled(given, negatives, teacher, **options)
    hidden, items = (tensor.float().requires_grad_() for tensor in given[:2])
    pair = [tensor.float() for tensor in given[3:]] if teacher else []
    expected = distillation_loss(hidden, items, given[2], *pair, **options)
    for field in fields(DistillationLoss):
        torch.testing.assert_close(getattr(actual, field.name), getattr(expected, field.name), msg=field.name)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.loss, (hidden, items)), atol=1e-6, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    positions=st.integers(1, 12),
    size=st.integers(1, N),
    chunk_size=st.none() | st.integers(1, 12),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    teacher=st.booleans(),
)
def test_against_autograd_on_the_same_sample(seed, positions, size, chunk_size, temperature, teacher):
    given, negatives = problem(seed, positions), draw_negatives(N, size, seed)
    actual, grads = sampled(given, negatives, teacher, temperature=temperature, kl_weight=0.5, chunk_size=chunk_size)
    parts, ranks, expected_grads = by_definition(given, negatives, teacher, temperature=temperature, kl_weight=0.5)
    assert_same(actual, grads, parts, expected_grads, atol=2e-5, rtol=2e-4)
    assert actual.student_ranks.tolist() == ranks


def test_over_all_samples_the_mean_normaliser_is_that_of_the_catalogue():
    """Every sample of 3 out of 7 items once, so there is no chance in it."""
    given = problem(num_items=7)
    hidden, items, labels = (given[0].float(), given[1].float(), given[2])
    scores = hidden @ items.T
    own = scores.gather(1, labels[:, None]).squeeze(1)
    for position in range(P):
        one = [tensor[[position]] for tensor in (hidden, labels)]
        normalisers = []
        for chosen in itertools.combinations(range(1, 8), 3):
            negatives = torch.tensor(chosen)
            vectors = items[torch.cat([negatives, one[1]])]
            loss = sampled_distillation_loss(one[0], vectors, one[1], negatives=negatives, num_items=7).loss
            normalisers.append((loss + own[position]).exp().item())
        truth = scores[position, 1:].exp().sum().item()
        assert sum(normalisers) / len(normalisers) == pytest.approx(truth, rel=1e-5)


def test_with_more_negatives_the_loss_approaches_the_full_one():
    given = problem(num_items=2000)
    hidden, items, labels, *teacher = (t.float() if t.is_floating_point() else t for t in given)
    full = distillation_loss(hidden, items, labels, *teacher, temperature=2.0, weighting="none")

    def error(size):
        drawn = [draw_negatives(2000, size, seed) for seed in range(20)]
        found = [sampled(given, negatives, temperature=2.0, weighting="none")[0] for negatives in drawn]
        return torch.tensor([[s.cross_entropy - full.cross_entropy, s.kl - full.kl] for s in found]).abs().mean(dim=0)

    assert (error(1000) < error(50) / 2).all()


def test_autocast_rounds_matrix_products_alone():
    given, negatives = problem(), draw_negatives(N, 8, 0)
    expected, expected_grads = sampled(given, negatives, temperature=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        actual, grads = sampled(given, negatives, temperature=2.0)
    assert actual.loss.dtype == torch.float32
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-2, atol=0)
    for grad, value in zip(grads, expected_grads, strict=True):
        assert (grad - value).norm() / value.norm() < 2e-2


def test_nothing_to_learn_gives_zero_and_gradients():
    actual, grads = sampled(problem(positions=0), draw_negatives(N, 3, 0))
    assert actual.loss == 0
    assert not any(grad.any() for grad in grads)


def test_no_gradient_is_kept_where_none_is_wanted():
    hidden, items, labels = problem()[:3]
    negatives = draw_negatives(N, 3, 0)
    with torch.no_grad():
        vectors = items.requires_grad_()[torch.cat([negatives, labels])]
        assert not sampled_distillation_loss(
            hidden, vectors, labels, negatives=negatives, num_items=N
        ).loss.requires_grad


@settings(deadline=None)
@given(num_items=st.integers(1, 30_000), share=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_draws_are_different_items(num_items, share, seed):
    size = max(1, round(share * num_items))
    drawn = draw_negatives(num_items, size, seed)
    assert drawn.dtype == torch.long
    assert len(set(drawn.tolist())) == len(drawn) == size
    assert 1 <= drawn.min() and drawn.max() <= num_items
    assert torch.equal(drawn, draw_negatives(num_items, size, seed))


def test_draws_reach_every_item_alike_and_follow_the_seed():
    counts = sum(torch.bincount(draw_negatives(10, 3, (1, step)), minlength=11) for step in range(3000))
    assert counts[0] == 0
    assert (counts[1:] - 900).abs().max() < 125  # five standard deviations
    assert not torch.equal(draw_negatives(1000, 10, (1, 2)), draw_negatives(1000, 10, (2, 1)))


@pytest.mark.parametrize("size", [0, 6])
def test_a_sample_that_cannot_be_drawn(size):
    with pytest.raises(ConfigurationError, match=rf"A sample of 5 items holds 1\.\.5 of them, got {size}"):
        draw_negatives(5, size, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([1, 2])}, r"hidden must be \(P, d\), labels \(P,\)"),
        ({"hidden": torch.zeros(1, 3, 2)}, r"hidden must be \(P, d\)"),
        ({"negatives": torch.tensor([[1, 2]])}, r"negatives \(k,\)"),
        ({"negatives": torch.tensor([1])}, r"item_vectors must be of shape \(4, 2\).*got \(5, 2\)"),
        ({"negatives": torch.tensor([]), "item_vectors": torch.zeros(3, 2)}, "there must be one at least"),
        ({"item_vectors": torch.zeros(5, 3)}, r"item_vectors must be of shape \(5, 2\)"),
        ({"teacher_hidden": None}, "give both or neither"),
        ({"teacher_hidden": torch.zeros(2, 4)}, r"of shapes \(3, 4\) and \(5, 4\), got \(2, 4\) and \(5, 4\)"),
        ({"teacher_item_vectors": torch.zeros(6, 4)}, r"got \(3, 4\) and \(6, 4\)"),
        ({"labels": torch.tensor([1, 0, 2])}, r"labels must be in 1\.\.4, got 0\.\.2"),
        ({"labels": torch.tensor([1, -100, 2])}, r"labels must be in 1\.\.4, got -100\.\.2"),
        ({"temperature": 0}, "temperature must be positive and finite, got 0"),
        ({"temperature": float("inf")}, "temperature must be positive and finite, got inf"),
        ({"chunk_size": -1}, "chunk_size must be at least 1, or left out, got -1"),
        ({"weighting": "ranks"}, "weighting must be one of rank, confidence, none.*, got 'ranks'"),
        ({"rank_base": 2}, "rank_base must be 0 or 1"),
    ],
)
def test_errors(changes, message):
    arguments = {
        "hidden": torch.zeros(3, 2),
        "item_vectors": torch.zeros(5, 2),
        "labels": torch.tensor([1, 2, 4]),
        "teacher_hidden": torch.zeros(3, 4),
        "teacher_item_vectors": torch.zeros(5, 4),
        "negatives": torch.tensor([3, 4]),
        "num_items": 4,
    }
    sampled_distillation_loss(**arguments)
    with pytest.raises(ConfigurationError, match=message):
        sampled_distillation_loss(**arguments | changes)


# --- teachers that list their best items -----------------------------------------------------------------------------


def with_lists(given, size):
    """The teacher's best items, and the problem with the distribution that they stand for in place of its own."""
    *student, teacher_hidden, teacher_items = given
    best = (teacher_hidden @ teacher_items[1:].T).log_softmax(dim=1).topk(size, dim=1)
    lists = ListedScores(best.indices + 1, best.values.float())
    return lists, (*student, lists.dense(N).double(), torch.cat([torch.zeros(1, N), torch.eye(N)]).double())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("size", [1, 5, N])
@pytest.mark.parametrize("chunk_size", [4, None])
def test_lists_are_the_distribution_they_stand_for(size, temperature, chunk_size):
    lists, given = with_lists(problem(seed=8), size)
    hidden, items, labels = given[:3]
    hidden, items = (tensor.float().requires_grad_() for tensor in (hidden, items))
    negatives = draw_negatives(N, 8, seed=1)
    options = {"temperature": temperature, "kl_weight": 0.7}
    actual = sampled_distillation_loss(
        hidden,
        items[torch.cat([negatives, labels])],
        labels,
        negatives=negatives,
        num_items=N,
        teacher_lists=lists,
        chunk_size=chunk_size,
        **options,
    )
    expected, _, gradients = by_definition(given, negatives, **options)
    actual_gradients = torch.autograd.grad(actual.loss, (hidden, items))
    assert_same(actual, actual_gradients, expected, gradients, rtol=1e-4, atol=1e-5)


def test_lists_and_a_sample_of_all_items_give_the_full_loss():
    lists, (hidden, items, labels, *_) = with_lists(problem(seed=9), 4)
    hidden, items, negatives = hidden.float(), items.float(), torch.arange(N) + 1
    rows = items[torch.cat([negatives, labels])]
    options = {"teacher_lists": lists, "temperature": 2.0}
    actual = sampled_distillation_loss(hidden, rows, labels, negatives=negatives, num_items=N, **options)
    expected = distillation_loss(hidden, items, labels, **options)
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.kl, expected.kl)
    assert torch.equal(actual.teacher_ranks, expected.teacher_ranks)


@pytest.mark.parametrize(
    ("lists", "changes", "message"),
    [
        (ListedScores(torch.ones(1, 2).long(), torch.zeros(1, 2)), {}, "must be 2, one per position, got 1"),
        (ListedScores(torch.full((2, 1), N + 1), torch.zeros(2, 1)), {}, f"lists items {N + 1}"),
        (
            ListedScores(torch.ones(2, 1).long(), torch.zeros(2, 1)),
            {"teacher_hidden": torch.ones(2, 3), "teacher_item_vectors": torch.ones(3, 3)},
            "take the place of",
        ),
    ],
)
def test_errors_of_lists(lists, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        sampled_distillation_loss(
            torch.ones(2, 4),
            torch.ones(3, 4),
            torch.tensor([1, 2]),
            negatives=torch.tensor([3]),
            num_items=N,
            teacher_lists=lists,
            **changes,
        )
