# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace

import pytest

from llmd4rec_hf.training.progress import PhaseProgress


@pytest.mark.parametrize(
    ("metric", "greater", "best"),
    [
        ("ndcg@10", None, 3.0),
        ("ndcg@10", True, 3.0),
        ("loss", None, 1.0),
        ("loss", False, 1.0),
        ("regret", False, 1.0),
    ],
)
def test_the_best_is_the_lowest_of_what_should_be_low(metric, greater, best):
    shown = []
    progress = PhaseProgress("CRM", metric)
    progress.bar = SimpleNamespace(set_postfix_str=shown.append)
    args, state = SimpleNamespace(greater_is_better=greater), SimpleNamespace(best_metric=3.0, epoch=2)
    progress.on_evaluate(args, state, None, metrics={f"eval_{metric}": 1.0})
    assert shown == [f"epoch 2, {metric} 1.0000, best {best:.4f}"]
