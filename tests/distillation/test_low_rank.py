# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from llmd4rec_hf.distillation import low_rank
from llmd4rec_hf.distillation.low_rank import reduce_teacher, score_errors


@pytest.fixture
def teacher():
    """300 positions and 80 items of width 20 whose scores fall off quickly, and share a large constant."""
    random = torch.Generator().manual_seed(0)
    scale = 0.6 ** torch.arange(20)
    hidden = torch.randn(300, 20, generator=random) * scale + 1
    items = torch.randn(81, 20, generator=random) + 3
    items[0] = 1e6
    return hidden, items


def moment(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.double().T @ hidden.double() / len(hidden)


def centred_scores(hidden: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    scores = hidden.double() @ items[1:].double().T
    return scores - scores.mean(dim=1, keepdim=True)


def test_without_tolerance_the_scores_are_the_same(teacher):
    hidden, items = teacher
    reduced = reduce_teacher(moment(hidden), items, 0.0)
    scores = centred_scores(hidden @ reduced.projection, reduced.item_matrix)
    torch.testing.assert_close(scores, centred_scores(hidden, items), atol=1e-4, rtol=1e-4)
    assert reduced.error == 0.0
    assert reduced.item_matrix[0].abs().max() == 0


@pytest.mark.parametrize("max_error", [2.0, 0.5, 0.1, 0.01])
def test_the_error_is_the_stated_one_and_within_the_tolerance(teacher, max_error):
    hidden, items = teacher
    reduced = reduce_teacher(moment(hidden), items, max_error)
    difference = centred_scores(hidden @ reduced.projection, reduced.item_matrix) - centred_scores(hidden, items)
    assert difference.square().mean().sqrt().item() == pytest.approx(reduced.error, rel=1e-2)
    assert reduced.error <= max_error
    assert reduced.projection.shape[1] < 20


def test_no_other_factorisation_of_the_rank_is_closer(teacher):
    """Eckart and Young: the singular values left out of the score matrix itself."""
    hidden, items = teacher
    reduced = reduce_teacher(moment(hidden), items, 0.3)
    singular = torch.linalg.svdvals(centred_scores(hidden, items))
    rank = reduced.projection.shape[1]
    best = (singular[rank:].square().sum() / (300 * 80)).sqrt()
    assert reduced.error == pytest.approx(best.item(), rel=1e-6)
    one_less = (singular[rank - 1 :].square().sum() / (300 * 80)).sqrt()
    assert one_less > 0.3


def test_a_teacher_that_says_nothing_keeps_one_dimension():
    reduced = reduce_teacher(torch.zeros(4, 4), torch.randn(6, 4), 0.0)
    assert reduced.projection.shape == (4, 1)
    assert reduced.error == 0.0


@pytest.mark.parametrize("width", [5, 7])
def test_item_vectors_spread_scores_as_far_as_they_are_asked_to(teacher, width):
    """Hidden states of unit components give an item's score the root mean square of its vector's length."""
    hidden, items = teacher
    vectors = reduce_teacher(moment(hidden), items, max_rank=5).item_vectors(width, 2.0)
    assert vectors.shape == (81, width)
    assert vectors[1:].square().sum(dim=1).mean().sqrt().item() == pytest.approx(2.0)
    assert not vectors[0].any() and not vectors[:, 5:].any()


def test_a_large_catalogue_is_taken_in_parts(teacher, monkeypatch):
    hidden, items = teacher
    whole = reduce_teacher(moment(hidden), items, 0.1)
    monkeypatch.setattr(low_rank, "_ITEMS_AT_A_TIME", 7)
    parts = reduce_teacher(moment(hidden), items, 0.1)
    assert parts.error == pytest.approx(whole.error)
    torch.testing.assert_close(
        centred_scores(hidden @ parts.projection, parts.item_matrix),
        centred_scores(hidden @ whole.projection, whole.item_matrix),
    )


def test_score_errors_by_hand():
    """Scores (0, 0) and (log 3, 0) against (log 3, 0) and, shifted by a constant, itself."""
    items = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0]])
    log_3 = torch.tensor(3.0).log()
    hidden = torch.tensor([[0.0, 0.0], [log_3, 0.0]])
    other = torch.tensor([[log_3, 0.0], [log_3 + 5, 5.0]])
    error, kl = score_errors(hidden, items, other, items)
    assert error == pytest.approx(float(log_3) / 2 / 2**0.5, rel=1e-5)
    # KL((1/2, 1/2) || (3/4, 1/4)) = log(2 / sqrt(3)), and 0.
    assert kl == pytest.approx(torch.log(2 / torch.tensor(3.0).sqrt()).item() / 2, rel=1e-5)


def test_score_errors_in_parts(teacher, monkeypatch):
    hidden, items = teacher
    whole = score_errors(hidden, items, hidden * 1.1, items)
    monkeypatch.setattr(low_rank, "_SCORES_AT_A_TIME", 81 * 7)
    assert score_errors(hidden, items, hidden * 1.1, items) == pytest.approx(whole)
    assert whole[0] > 0.1
