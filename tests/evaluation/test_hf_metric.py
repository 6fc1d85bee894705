# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys

import datasets
import evaluate
import pytest
import torch

from llmd4rec_hf.errors import DataError
from llmd4rec_hf.evaluation.hf_metric import RankingMetric
from llmd4rec_hf.evaluation.ranking import ranking_metrics


RANKS = [1, 3, 7, 1000]


class RowCount(evaluate.Metric):
    """A metric that does need references, to be combined with."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"rows": len(references)}


class TestRankingMetric:
    def test_equals_the_function(self):
        assert RankingMetric(keep_in_memory=True).compute(predictions=RANKS) == ranking_metrics(RANKS)

    def test_cut_offs(self):
        metric = RankingMetric(keep_in_memory=True)
        assert metric.compute(predictions=torch.tensor(RANKS), ks=(1, 7)) == ranking_metrics(RANKS, ks=(1, 7))

    def test_ranks_between_whole_numbers_are_not_rounded(self):
        halves = [1.5, 6.5]
        assert RankingMetric(keep_in_memory=True).compute(predictions=halves) == ranking_metrics(halves)

    def test_batches_through_a_file(self, tmp_path):
        metric = RankingMetric(cache_dir=str(tmp_path))
        metric.add_batch(predictions=torch.tensor(RANKS[:3]))
        metric.add(prediction=RANKS[3])
        assert metric.compute() == ranking_metrics(RANKS)

    def test_can_be_used_again(self):
        metric = RankingMetric(keep_in_memory=True)
        metric.compute(predictions=[20])
        assert metric.compute(predictions=RANKS) == ranking_metrics(RANKS)

    def test_combined_with_a_metric_that_needs_references(self):
        combined = evaluate.combine([RankingMetric(keep_in_memory=True), RowCount(keep_in_memory=True)])
        combined.add_batch(predictions=RANKS, references=[0, 0, 0, 0])
        assert combined.compute() == {**ranking_metrics(RANKS), "rows": 4}

    def test_ranks_below_one(self):
        with pytest.raises(DataError, match="Ranks start at 1"):
            RankingMetric(keep_in_memory=True).compute(predictions=[0])


def test_the_package_imports_neither_evaluate_nor_numba():
    code = "import sys, llmd4rec_hf, llmd4rec_hf.distillation; sys.exit(bool({'evaluate', 'numba'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
