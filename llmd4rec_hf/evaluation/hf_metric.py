# SPDX-License-Identifier: Apache-2.0
"""The ranking metrics as an `evaluate.Metric`. Kept apart so that only those who use it import `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

import evaluate
from datasets import Features, Value

from .ranking import ranking_metrics


_DESCRIPTION = "Hit rate, NDCG and MRR at k for next-item recommendation, from the rank of the one true item per row."

_INPUTS_DESCRIPTION = """
Args:
    predictions (`list[int]`): rank of each row's true item from 1, as `llmd4rec_hf.target_ranks` gives it.
    ks (`Sequence[int]`): the cut-offs, by default (5, 10, 20).
Returns:
    `dict[str, float]` with the keys hr@k, ndcg@k and mrr@k for each k.
"""

_CITATION = """\
@article{jarvelin2002cumulated,
  title   = {Cumulated gain-based evaluation of {IR} techniques},
  author  = {J{\\"a}rvelin, Kalervo and Kek{\\"a}l{\\"a}inen, Jaana},
  journal = {ACM Transactions on Information Systems},
  volume  = {20},
  number  = {4},
  pages   = {422--446},
  year    = {2002},
}
"""


class RankingMetric(evaluate.Metric):
    """[`ranking_metrics`] behind the interface of `evaluate`.

    Its predictions are ranks and there are no references: a rank already says where the true item stands, and
    passing score matrices through `evaluate` would write positions x items to disk. References that are passed
    anyway are ignored, so that it can be combined with metrics that need them.

    Example:

    ```python
    >>> metric = RankingMetric(keep_in_memory=True)
    >>> metric.add_batch(predictions=target_ranks(hidden, item_matrix, labels))
    >>> metric.compute(ks=(10,))
    {'hr@10': ..., 'ndcg@10': ..., 'mrr@10': ...}
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            # Not integers, to which a rank of 1.9 would become one of 1 without a word.
            features=Features({"predictions": Value("float64")}),
            reference_urls=["https://doi.org/10.1145/582415.582418"],
        )

    def _compute(self, predictions: Sequence[int], ks: Sequence[int] = (5, 10, 20)) -> dict[str, float]:
        return ranking_metrics(predictions, ks)
