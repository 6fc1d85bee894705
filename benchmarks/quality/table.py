# SPDX-License-Identifier: Apache-2.0
"""
The table of all results that `run.py` wrote: means over seeds, and what distillation brought each model.

    python benchmarks/quality/table.py > benchmarks/quality/README.md
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
import yaml

from llmd4rec_hf.evaluation.results import still_rising
from llmd4rec_hf.run_results import late_gain


HERE = Path(__file__).parent
RESULTS = HERE / "results"
METRIC = "ndcg@10"
SLICES = ("short histories", "rare items")
SPECIFICATION = yaml.safe_load((HERE / "models.yaml").read_text())


def read_results() -> dict[str, dict[str, list[tuple[dict, np.ndarray]]]]:
    """Per data set and model, one result and the test users' ranks per seed, in the order of `models.yaml`."""
    found: dict = {}
    for folder in sorted(path for path in RESULTS.glob("*") if path.is_dir()):
        runs = defaultdict(list)
        for name in SPECIFICATION["models"]:
            for path in sorted(folder.glob(f"{name}-seed*.json")):
                runs[name].append(
                    (json.loads(path.read_text()), np.load(path.with_suffix(".npy"), allow_pickle=False))
                )
        found[folder.name] = dict(runs)
    return found


def per_user(ranks: np.ndarray) -> np.ndarray:
    """NDCG@10 of each user."""
    ranks = ranks.astype(np.float64)
    return (ranks <= 10) / np.log2(ranks + 1)


def compare(
    model: list[tuple[dict, np.ndarray]], control: list[tuple[dict, np.ndarray]]
) -> tuple[float, float] | None:
    """
    The relative gain in NDCG@10 over the seeds that both have, and the two-sided p of a paired test over users: is the
    mean difference, averaged over those seeds, zero? With thousands of users the statistic is normal.
    """
    of_control = {result["seed"]: ranks for result, ranks in control}
    pairs = [(ranks, of_control[result["seed"]]) for result, ranks in model if result["seed"] in of_control]
    if not pairs:
        return None
    mine, theirs = (np.mean([per_user(ranks) for ranks in of], axis=0) for of in zip(*pairs, strict=True))
    deviation = (mine - theirs).std(ddof=1)
    statistic = abs((mine - theirs).mean()) / deviation * math.sqrt(len(mine)) if deviation else 0.0
    return mine.mean() / theirs.mean() - 1, math.erfc(statistic / math.sqrt(2))


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def _seeds(results: list[dict]) -> str:
    """How many there are, and of how many the training ended while they were still getting better."""
    trainings = [result["training"] for result in results if result["training"]]
    rising = sum(still_rising(late_gain(training["history"])) for training in trainings)
    return f"{len(results)}, {rising} rising" if rising else str(len(results))


def _row(name: str, runs: dict) -> str:
    results = [result for result, _ in runs[name]]
    tests = [result["test"] for result in results]
    own = SPECIFICATION["models"][name]
    controls = [runs[control] for control in own.get("controls", []) if control in runs]
    gains = [found for control in controls if (found := compare(runs[name], control))]
    slices = [statistics.mean(r["slices"][part][METRIC] for r in results) for part in SLICES]
    seconds = [result["training"]["seconds"] for result in results if result["training"]]
    kept = [test["keep"][METRIC] for test in tests if "keep" in test]
    cells = [
        own["title"],
        _seeds(results),
        _spread([test["mask"]["hr@10"] for test in tests]),
        _spread([test["mask"][METRIC] for test in tests]),
        ", ".join(f"{gain:+.1%}" for gain, _ in gains),
        ", ".join(f"{p:.1g}" for _, p in gains),
        *(f"{value:.4f}" for value in slices),
        _spread(kept) if kept else "",
        f"{max(seconds) / 60:.0f}" if seconds else "",
        f"{results[0]['parameters'] / 1e6:.1f} M" if results[0]["parameters"] else "",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print all tables."""
    print((HERE / "introduction.md").read_text().rstrip())
    heads = ["model", "seeds", "HR@10", "NDCG@10", "gain", "p", "short", "rare", "NDCG@10, seen kept", "min", "size"]
    for dataset, runs in read_results().items():
        print(f"\n## {dataset}\n")
        print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
        for name in runs:
            print(_row(name, runs))


if __name__ == "__main__":
    main()
