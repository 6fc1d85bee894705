# SPDX-License-Identifier: Apache-2.0
"""
Training a SASRec on catalogues of 100 thousand to 10 million items: the loss over all items, as far as that goes, and
over a sample of them (`num_sampled_items`). Time of a step through CRMTrainer, optimizer included, and peak resident
memory of the whole training; each in a process of its own.

    python benchmarks/large_catalogue.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

import numpy as np
import torch
from common import in_own_process, peak_bytes, write_result
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed

from llmd4rec_hf import CRMArguments, CRMTrainer, SASRecConfig, SASRecModel


WIDTH, ROWS, LENGTH, SAMPLE = 64, 32, 9, 4096
# (items, whether the loss is over a sample, steps); the first two steps allocate and are not counted.
RUNS = (
    (100_000, False, 12),
    (100_000, True, 40),
    (1_000_000, False, 6),
    (1_000_000, True, 40),
    (10_000_000, True, 40),
)
WARM_UP = 2


class StepClock(TrainerCallback):
    """Wall and processor time at the end of each step."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append((time.perf_counter(), time.process_time()))

    def medians(self) -> dict[str, float]:
        """Of the steps that count."""
        wall, processor = np.diff(self.ends[WARM_UP - 1 :], axis=0).T
        return {"seconds": statistics.median(wall), "processor_seconds": statistics.median(processor)}


def make_rows(items: int, steps: int) -> Dataset:
    """Random histories, as many as the steps need."""
    count = ROWS * steps
    histories = np.random.default_rng(0).integers(1, items + 1, (count, LENGTH))
    return Dataset.from_dict({"item_ids": list(histories), "length": [LENGTH] * count, "row_id": list(range(count))})


def train(items: int, sampled: bool, steps: int) -> dict:
    """Time of a step and peak memory. Called in a process of its own."""
    set_seed(0)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        args = CRMArguments(
            folder,
            max_steps=steps,
            num_sampled_items=SAMPLE if sampled else None,
            per_device_train_batch_size=ROWS,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        model = SASRecModel(SASRecConfig(num_items=items, hidden_size=WIDTH))
        trainer = CRMTrainer(model, args, make_rows(items, steps), callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {**clock.medians(), "peak_bytes": peak_bytes()}


def measure(items: int, sampled: bool, steps: int, threads: int) -> dict:
    """[`train`] in a process of its own."""
    words = ["--items", str(items), "--steps", str(steps), "--threads", str(threads)]
    found = in_own_process(__file__, *words, *(["--sampled"] if sampled else []))
    print(
        f"{items:>10,} items  {f'{SAMPLE:,} sampled' if sampled else 'all':13s} "
        f"{found['processor_seconds'] * 1e3:8.1f} ms of processor time a step  {found['peak_bytes'] / 2**30:5.2f} GiB"
    )
    return {"items": items, "sampled_items": SAMPLE if sampled else None, "steps": steps, **found}


def main() -> None:
    """Measure every size, or, in its own process, one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--items", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--sampled", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.items:
        print(json.dumps(train(options.items, options.sampled, options.steps)))
        return
    runs = [measure(*run, options.threads) for run in RUNS]
    by_size = {run["items"]: run["processor_seconds"] for run in runs if run["sampled_items"]}
    ratio = by_size[10_000_000] / by_size[1_000_000]
    print(f"a step on 10 million items takes {ratio:.2f} times that on one million")
    sizes = {"width": WIDTH, "rows": ROWS, "positions": ROWS * (LENGTH - 1)}
    write_result("large_catalogue", {"sizes": sizes, "processor_time_10m_to_1m": ratio, "runs": runs})


if __name__ == "__main__":
    main()
