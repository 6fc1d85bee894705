# SPDX-License-Identifier: Apache-2.0
"""
How long each library's SASRec with the full softmax trains until it ranks well: processor time of training alone, on
one thread, until the validation NDCG@10 (leave-one-out, full ranking, seen items masked) first reaches a goal. The
same data, width, layers, heads, length and dropout; learning rate 1e-3; each with its own customary batch and loop.

    python benchmarks/time_to_quality.py --dataset FOLDER --goal 0.05 --peers_python PEERS/bin/python
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from common import write_result
from crm_training import (
    SIZES,
    add_shared_options,
    common_arguments,
    export,
    hide_path,
    load,
    make_sasrec,
    peer_command,
)
from transformers import TrainerCallback

from llmd4rec_hf import CRMArguments, CRMTrainer


METRIC = "eval_ndcg@10"
EVERY = 2  # epochs between two evaluations


class Until(TrainerCallback):
    """Notes what training has taken at each evaluation, and ends it at the goal."""

    def __init__(self, goal: float):
        self.goal, self.taken, self.curve = goal, 0.0, []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.taken += time.process_time() - self.start
        control.should_evaluate = round(state.epoch) % EVERY == 0

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.curve.append((round(state.epoch), self.taken, metrics[METRIC]))
        control.should_training_stop = metrics[METRIC] >= self.goal


def train_ours(options, bf16: bool) -> list[tuple[int, float, float]]:
    """Epochs, seconds of training and validation NDCG@10, one per evaluation."""
    _, vocabulary, splits = load(options.dataset)
    until = Until(options.goal)
    with tempfile.TemporaryDirectory() as folder:
        args = CRMArguments(**common_arguments(folder, bf16) | {"num_train_epochs": options.epochs})
        model = make_sasrec(len(vocabulary))
        CRMTrainer(model, args, splits["train"], splits["validation"], callbacks=[until]).train()
    return until.curve


def train_peer(options, name: str, folder: Path) -> list[list[float]]:
    """Likewise, by a peer's worker."""
    command = peer_command(options.peers_python, name, "until", folder, options.threads)
    words = json.loads(command[-1]) | {"goal": options.goal, "epochs": options.epochs, "every": EVERY}
    output = subprocess.run([*command[:-1], json.dumps(words)], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def reached(curve, goal: float) -> dict:
    """When the goal was reached, if it was, and the best of all."""
    hit = next((point for point in curve if point[2] >= goal), None)
    return {
        "epochs": hit and hit[0],
        "processor_seconds": hit and hit[1],
        "best": max(value for _, _, value in curve),
        "curve": curve,
    }


def main() -> None:
    """Train each until the goal, print times and ratios, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_options(parser, seconds=None, repeats=1)
    parser.add_argument("--goal", type=float, required=True, help="validation NDCG@10")
    parser.add_argument("--epochs", type=int, default=100, help="at most (default: %(default)s)")
    parser.add_argument("--peers_python", help="of the environment that benchmarks/peers/requirements.txt describes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts, _, splits = load(options.dataset)
    curves = {"ours": train_ours(options, False), "ours bf16": train_ours(options, True)}
    if options.peers_python:
        with tempfile.TemporaryDirectory() as name:
            export(splits, Path(name))
            for peer, title in (("recbole", "RecBole"), ("rectools", "RecTools")):
                curves[title] = train_peer(options, peer, Path(name))
    results = {name: reached(curve, options.goal) for name, curve in curves.items()}
    base = results["ours"]["processor_seconds"]
    for name, result in results.items():
        seconds = result["processor_seconds"]
        last = result["curve"][-1]
        took = f"{seconds:9.1f} s, {seconds / base:6.1f} times ours" if seconds else f"not in {last[1]:.1f} s"
        print(f"{name:10s} {took}   {result['epochs'] or last[0]} epochs, best {result['best']:.4f}")
    hide_path(options.peers_python)
    write_result("time_to_quality", {"dataset": facts, "sizes": SIZES, "goal": options.goal, "variants": results})


if __name__ == "__main__":
    main()
