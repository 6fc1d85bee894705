# SPDX-License-Identifier: Apache-2.0
"""
The demo over several seeds: both distilled models beside their controls, as means over the seeds.

    python benchmarks/demo_seeds.py --seeds 42 43 44

Options that it does not know go to examples/train.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from common import write_result


TRAIN = Path(__file__).parent.parent / "examples" / "train.py"
MODELS = ("llm", "llm_without_distillation", "crm", "crm_without_distillation")
METRIC = "ndcg@10"


def run(seed: int, folder: Path, words: list[str]) -> dict:
    """One whole run; one that is there already is only read."""
    command = [sys.executable, str(TRAIN), "--output_dir", str(folder / f"seed-{seed}"), "--seed", str(seed), *words]
    subprocess.run(command, check=True)
    return json.loads((folder / f"seed-{seed}" / "results.json").read_text())


def main() -> None:
    """Run every seed, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo_seeds"))
    options, words = parser.parse_known_args()
    results = {seed: run(seed, options.output_dir, words) for seed in options.seeds}
    table = {}
    for model in MODELS:
        values = [result["final"][model]["test"][METRIC] for result in results.values()]
        table[model] = {"mean": statistics.mean(values), "deviation": statistics.stdev(values), "values": values}
    for model, row in table.items():
        base = table.get(f"{model}_without_distillation")
        gain = f"   {row['mean'] / base['mean'] - 1:+.1%} against its control" if base else ""
        print(f"{model:26s} test {METRIC} {row['mean']:.4f} (deviation {row['deviation']:.4f}){gain}")
    first = next(iter(results.values()))
    facts = {"dataset": first["dataset"], "protocol": first["protocol"], "metric": f"test {METRIC}"}
    seconds = {seed: sum(result["seconds"].values()) for seed, result in results.items()}
    write_result("demo_seeds", {**facts, "seeds": options.seeds, "models": table, "training_seconds": seconds})


if __name__ == "__main__":
    main()
