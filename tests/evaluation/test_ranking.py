# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llmd4rec_hf.errors import ConfigurationError, DataError
from llmd4rec_hf.evaluation import ranking
from llmd4rec_hf.evaluation.ranking import TIES, ranking_metrics, score_targets, target_ranks


def small_problem(rows=23, items=17, dim=4, seed=0):
    """Vectors of small whole numbers: scores are exact in any type, and many of them tie."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-2, 3, (rows, dim), generator=generator).float()
    item_matrix = torch.randint(-2, 3, (items + 1, dim), generator=generator).float()
    labels = torch.randint(1, items + 1, (rows,), generator=generator)
    seen = torch.randint(0, items + 1, (rows, 5), generator=generator)
    return hidden, item_matrix, labels, seen


def brute_force_rank(hidden, item_matrix, label, seen, ties):
    """The definition, one item at a time, in plain Python."""
    scores = [sum(h * w for h, w in zip(hidden, vector, strict=True)) for vector in item_matrix]
    others = [i for i in range(1, len(scores)) if i != label and i not in seen]
    greater = sum(scores[i] > scores[label] for i in others)
    equal = sum(scores[i] == scores[label] for i in others)
    return 1 + greater + {"pessimistic": equal, "optimistic": 0, "mean": math.ceil(equal / 2)}[ties]


class TestTargetRanks:
    @pytest.mark.parametrize("ties", TIES)
    @pytest.mark.parametrize("mask_seen", [False, True])
    def test_equals_brute_force(self, ties, mask_seen):
        hidden, item_matrix, labels, seen = small_problem()
        ranks = target_ranks(hidden, item_matrix, labels, seen=seen if mask_seen else None, ties=ties)
        expected = [
            brute_force_rank(h, item_matrix.tolist(), y, s if mask_seen else [], ties)
            for h, y, s in zip(hidden.tolist(), labels.tolist(), seen.tolist(), strict=True)
        ]
        assert ranks.dtype == torch.long
        assert ranks.tolist() == expected

    def test_the_problem_above_has_ties_and_seen_targets(self):
        hidden, item_matrix, labels, seen = small_problem()
        by_ties = {ties: target_ranks(hidden, item_matrix, labels, ties=ties) for ties in TIES}
        assert (by_ties["optimistic"] < by_ties["mean"]).any()
        assert (by_ties["mean"] < by_ties["pessimistic"]).any()
        assert (seen == labels[:, None]).any()

    @pytest.mark.parametrize(("ties", "expected"), [("pessimistic", 5), ("optimistic", 2), ("mean", 4)])
    def test_ties_by_hand(self, ties, expected):
        item_matrix = torch.tensor([[0.0], [7.0], [3.0], [3.0], [3.0], [3.0], [1.0]])  # one above, three equal
        assert target_ranks(torch.ones(1, 1), item_matrix, torch.tensor([4]), ties=ties).tolist() == [expected]

    def test_a_constant_model_ranks_last_wherever_the_target_stands(self):
        labels = torch.arange(1, 8)
        assert target_ranks(torch.zeros(7, 3), torch.randn(8, 3), labels).tolist() == [7] * 7

    def test_rank_does_not_depend_on_the_order_of_items(self):
        hidden, item_matrix, labels, _ = small_problem()
        order = torch.randperm(len(item_matrix) - 1, generator=torch.Generator().manual_seed(1)) + 1
        shuffled = torch.cat([item_matrix[:1], item_matrix[order]])
        new_labels = order.argsort()[labels - 1] + 1
        assert torch.equal(target_ranks(hidden, shuffled, new_labels), target_ranks(hidden, item_matrix, labels))

    @pytest.mark.parametrize("padding", [1e30, -1e30, math.nan, math.inf])
    def test_padding_row_is_never_ranked(self, padding):
        hidden, item_matrix, labels, seen = small_problem()
        expected = score_targets(hidden, item_matrix, labels, seen=seen)
        item_matrix[0] = padding
        result = score_targets(hidden, item_matrix, labels, seen=seen)
        assert torch.equal(result.ranks, expected.ranks)
        assert torch.equal(result.nll, expected.nll)

    def test_seen_items_leave_the_ranking_and_the_target_stays(self):
        item_matrix = torch.tensor([[0.0], [5.0], [4.0], [3.0], [2.0]])
        hidden, labels = torch.ones(3, 1), torch.tensor([3, 3, 3])
        seen = torch.tensor([[0, 0, 0], [1, 0, 0], [3, 2, 2]])  # nothing; one above; itself and one above, twice
        assert target_ranks(hidden, item_matrix, labels, seen=seen).tolist() == [3, 2, 2]

    def test_a_target_in_seen_keeps_its_score_when_it_is_negative(self):
        item_matrix = torch.tensor([[0.0], [-1.0], [-2.0], [-3.0]])
        seen = torch.tensor([[1, 3]])
        assert target_ranks(torch.ones(1, 1), item_matrix, torch.tensor([3]), seen=seen).tolist() == [2]

    @pytest.mark.parametrize("chunk_size", [1, 2, 22, 23, 1000])
    def test_chunks_change_nothing(self, chunk_size):
        hidden, item_matrix, labels, seen = small_problem()
        whole = score_targets(hidden, item_matrix, labels, seen=seen)
        chunked = score_targets(hidden, item_matrix, labels, seen=seen, chunk_size=chunk_size)
        assert torch.equal(chunked.ranks, whole.ranks)
        assert torch.allclose(chunked.nll, whole.nll)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_types_are_scored_in_single_precision(self, dtype):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(50, 8, generator=generator).to(dtype)
        item_matrix = torch.randn(3001, 8, generator=generator).to(dtype)
        labels = torch.randint(1, 3001, (50,), generator=generator)
        expected = target_ranks(hidden.float(), item_matrix.float(), labels)
        assert torch.equal(target_ranks(hidden, item_matrix, labels), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(target_ranks(hidden, item_matrix, labels), expected)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_non_finite_scores_are_an_error_that_names_the_row(self, value):
        hidden, item_matrix, labels, _ = small_problem()
        hidden[6] = value
        with pytest.raises(DataError, match=r"Non-finite scores in 1 of 23 rows, the first is row 6\."):
            target_ranks(hidden, item_matrix.abs() + 1, labels, chunk_size=4)

    def test_a_single_item_that_is_not_finite_is_an_error(self):
        hidden, item_matrix, labels, _ = small_problem()
        item_matrix[9, 0] = math.nan
        with pytest.raises(ValueError, match="Non-finite scores in 23 of 23 rows"):
            target_ranks(hidden, item_matrix, labels)

    @pytest.mark.parametrize("value", [math.inf, -math.inf])
    def test_nor_may_a_single_score_be_infinite(self, value):
        item_matrix = torch.ones(5, 1)
        item_matrix[3] = value
        with pytest.raises(DataError, match="Non-finite scores in 2 of 2 rows"):
            target_ranks(torch.ones(2, 1), item_matrix, torch.tensor([1, 2]))

    def test_a_row_that_is_more_than_a_chunk_may_hold(self, monkeypatch):
        hidden, item_matrix, labels, _ = small_problem()
        expected = target_ranks(hidden, item_matrix, labels)
        monkeypatch.setattr(ranking, "_CHUNK_BYTES", 4 * 17)
        assert torch.equal(target_ranks(hidden, item_matrix, labels), expected)

    def test_no_rows(self):
        result = score_targets(torch.empty(0, 4), torch.randn(5, 4), torch.empty(0, dtype=torch.long))
        assert result.ranks.shape == (0,)
        assert result.ranks.dtype == torch.long
        assert result.nll.shape == (0,)

    def test_arguments_are_left_as_they_were(self):
        arguments = small_problem()
        copies = [argument.clone() for argument in arguments]
        hidden, item_matrix, labels, seen = arguments
        target_ranks(hidden.requires_grad_(), item_matrix.requires_grad_(), labels, seen=seen)
        assert all(torch.equal(after, before) for after, before in zip(arguments, copies, strict=True))

    @pytest.mark.parametrize("label", [-100, 0, 18])
    def test_labels_outside_the_catalogue(self, label):
        hidden, item_matrix, labels, _ = small_problem()
        labels[3] = label
        with pytest.raises(DataError, match=rf"1 labels lie outside 1\.\.17, the first is {label}"):
            target_ranks(hidden, item_matrix, labels)

    @pytest.mark.parametrize("item", [-1, 18])
    def test_seen_items_outside_the_catalogue(self, item):
        hidden, item_matrix, labels, seen = small_problem()
        seen[3, 2] = item
        with pytest.raises(DataError, match=rf"0\.\.17 \(0 pads\), found {item}"):
            target_ranks(hidden, item_matrix, labels, seen=seen)

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            (((3, 4), (6, 5), (3,), (3, 2)), r"hidden \(P, d\) and item_matrix \(N \+ 1, d\)"),
            (((3, 1, 4), (6, 4), (3,), (3, 2)), r"hidden \(P, d\)"),
            (((3, 4), (1, 4), (3,), (3, 2)), "at least one item"),
            (((3, 4), (6, 4), (2,), (3, 2)), "one label per row"),
            (((3, 4), (6, 4), (3,), (2, 2)), r"seen \(P, S\)"),
            (((3, 4), (6, 4), (3,), (3,)), r"seen \(P, S\)"),
        ],
    )
    def test_shapes_that_do_not_fit(self, shapes, message):
        hidden, item_matrix, labels, seen = (torch.ones(shape) for shape in shapes)
        with pytest.raises(DataError, match=message):
            target_ranks(hidden, item_matrix, labels.long(), seen=seen.long())

    @pytest.mark.parametrize("options", [{"ties": "random"}, {"chunk_size": 0}])
    def test_unknown_options(self, options):
        hidden, item_matrix, labels, _ = small_problem()
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            target_ranks(hidden, item_matrix, labels, **options)


class TestScoreTargets:
    @pytest.mark.parametrize("mask_seen", [False, True])
    def test_likelihood_is_the_cross_entropy_over_all_items(self, mask_seen):
        hidden, item_matrix, labels, seen = small_problem()
        logits = (hidden @ item_matrix.T)[:, 1:]
        expected = torch.nn.functional.cross_entropy(logits, labels - 1, reduction="none")
        result = score_targets(hidden, item_matrix, labels, seen=seen if mask_seen else None, chunk_size=5)
        torch.testing.assert_close(result.nll, expected)
        assert result.nll.dtype == torch.float32


class TestRankingMetrics:
    # By hand: 1/log2(2) = 1, 1/log2(4) = 0.5, 1/log2(8) = 1/3.
    EXPECTED = {
        "hr@1": 1 / 4,
        "ndcg@1": 1 / 4,
        "mrr@1": 1 / 4,
        "hr@5": 2 / 4,
        "ndcg@5": (1 + 1 / 2) / 4,
        "mrr@5": (1 + 1 / 3) / 4,
        "hr@7": 3 / 4,
        "ndcg@7": (1 + 1 / 2 + 1 / 3) / 4,
        "mrr@7": (1 + 1 / 3 + 1 / 7) / 4,
    }

    @pytest.mark.parametrize("container", [list, np.array, torch.tensor])
    def test_by_hand(self, container):
        metrics = ranking_metrics(container([1, 3, 7, 1000]), ks=(1, 5, 7))
        assert metrics == pytest.approx(self.EXPECTED)
        assert list(metrics) == list(self.EXPECTED)
        assert all(type(value) is float for value in metrics.values())

    def test_default_cut_offs(self):
        assert list(ranking_metrics([1])) == [f"{name}@{k}" for k in (5, 10, 20) for name in ("hr", "ndcg", "mrr")]

    def test_a_rank_at_the_cut_off_counts_and_the_next_does_not(self):
        assert ranking_metrics([10, 11], ks=(10,)) == pytest.approx(
            {"hr@10": 0.5, "ndcg@10": 0.5 / math.log2(11), "mrr@10": 0.05}
        )

    @pytest.mark.parametrize("empty", [[], torch.empty(0, dtype=torch.long)])
    def test_no_ranks(self, empty):
        with pytest.raises(DataError, match="no ranks"):
            ranking_metrics(empty)

    @pytest.mark.parametrize("rank", [0, -100, math.nan])
    def test_ranks_below_one(self, rank):
        with pytest.raises(DataError, match=f"Ranks start at 1, found {rank}"):
            ranking_metrics([1, rank])

    def test_cut_off_below_one(self):
        with pytest.raises(ConfigurationError, match="at least 1"):
            ranking_metrics([1], ks=(5, 0))
