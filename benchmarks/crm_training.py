# SPDX-License-Identifier: Apache-2.0
"""
Training SASRec with the full softmax: ours through CRMTrainer beside RecBole's and RecTools' own training loops, in
supervised positions (next items predicted) per second. The same data, width, layers, heads, length and dropout; each
with its own customary batch. Each variant is a process that works for some seconds while the others wait.

    python benchmarks/crm_training.py --dataset FOLDER --peers_python PEERS/bin/python
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from pathlib import Path

import torch
from common import write_result
from peers.turns import Turns, ratios, show, take_turns
from transformers import set_seed

from llmd4rec_hf import (
    CRMArguments,
    CRMTrainer,
    ItemVocabulary,
    SASRecConfig,
    SASRecModel,
    load_interactions,
    split_leave_one_out,
)
from llmd4rec_hf.data import data_hash, describe_interactions, make_demo


PEERS = Path(__file__).parent / "peers"
SIZES = {"width": 64, "layers": 2, "heads": 1, "length": 50}


def load(dataset: str):
    """The log's facts with the hash of its training rows, the vocabulary, and the splits."""
    interactions = make_demo()[0] if dataset == "demo" else load_interactions(dataset)
    vocabulary = ItemVocabulary.from_interactions(interactions)
    splits = split_leave_one_out(interactions, vocabulary)
    facts = {**describe_interactions(interactions), "train_hash": data_hash(splits["train"])}
    return facts, vocabulary, splits


def in_turns(trainer_class, turns: Turns):
    """A trainer that is held between two steps, and counts its supervised positions."""

    class InTurns(trainer_class):
        positions = 0

        def training_step(self, model, inputs, num_items_in_batch=None):
            turns.next(self.positions)
            self.positions = int((inputs["labels"] != -100).sum())
            return super().training_step(model, inputs, num_items_in_batch)

    return InTurns


def make_sasrec(num_items: int) -> SASRecModel:
    """SASRec of random weights: what a step costs does not depend on them."""
    set_seed(0)
    config = SASRecConfig(
        num_items=num_items,
        hidden_size=SIZES["width"],
        num_layers=SIZES["layers"],
        num_heads=SIZES["heads"],
        max_length=SIZES["length"],
    )
    return SASRecModel(config)


def common_arguments(folder: str | Path, bf16: bool = False) -> dict:
    """Arguments of training for a measurement: the defaults, without end and without files."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": 10**6,
        "bf16": bf16,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def train_ours(options) -> None:
    """The worker of ours."""
    _, vocabulary, splits = load(options.dataset)
    args = CRMArguments(**common_arguments(options.folder, options.bf16))
    facts = {"batch_size": args.per_device_train_batch_size, "batch_of": "histories", "items": len(vocabulary)}
    trainer = in_turns(CRMTrainer, Turns(**facts))(make_sasrec(len(vocabulary)), args, splits["train"])
    trainer.train()


def export(splits, folder: Path) -> None:
    """The data as the peers read it: RecBole splits the whole log itself, RecTools is given the parts."""
    (folder / "log").mkdir()
    names = ["user_id", "item_id", "timestamp"]
    header = ["user_id:token", "item_id:token", "timestamp:float"]
    _write_rows(splits["test"], folder / "log" / "log.inter", header, "\t")
    _write_rows(splits["train"], folder / "train.csv", names, ",")
    _write_rows(splits["validation"], folder / "validation.csv", names, ",")


def _write_rows(split, path: Path, header: list[str], delimiter: str) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(header)
        for row, items in zip(split["row_id"], split["item_ids"], strict=True):
            writer.writerows((row, item, time) for time, item in enumerate(items))


def peer_command(python: str, name: str, task: str, folder: Path, threads: int) -> list[str]:
    """A peer's worker in its own environment."""
    words = {"task": task, "folder": str(folder), "threads": threads, "gpu": torch.cuda.is_available(), **SIZES}
    return [python, str(PEERS / f"{name}_worker.py"), json.dumps(words)]


def own_command(options, folder: Path, *words: str) -> list[str]:
    """A worker of the script that is running."""
    threads = str(options.threads)
    shared = ["--dataset", options.dataset, "--threads", threads, "--folder", str(folder)]
    return [sys.executable, sys.argv[0], "--worker", *shared, *words]


def hide_path(python: str | None) -> None:
    """Keep the place of the peers' interpreter out of the command that a result states."""
    sys.argv = ["PEERS/bin/python" if word == python else word for word in sys.argv]


def add_shared_options(parser: argparse.ArgumentParser, seconds: float | None, repeats: int) -> None:
    """Options of every benchmark whose variants take turns."""
    parser.add_argument("--dataset", default="demo", help="folder or file of a log (default: the built-in data)")
    if seconds is not None:
        parser.add_argument(
            "--seconds", type=float, default=seconds, help="of one turn at least (default: %(default)s)"
        )
    parser.add_argument("--repeats", type=int, default=repeats, help="turns of each variant (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each variant (default: %(default)s)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)


def main() -> None:
    """Measure, print ratios, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_options(parser, seconds=4, repeats=5)
    parser.add_argument("--peers_python", help="of the environment that benchmarks/peers/requirements.txt describes")
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        train_ours(options)
    facts, _, splits = load(options.dataset)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = {"ours": own_command(options, folder), "ours bf16": own_command(options, folder, "--bf16")}
        if options.peers_python:
            export(splits, folder)
            for peer, title in (("recbole", "RecBole"), ("rectools", "RecTools")):
                commands[title] = peer_command(options.peers_python, peer, "train", folder, options.threads)
        results = take_turns(commands, options.seconds, options.repeats, options.threads)
    found = {}
    for base in list(results)[2:] or ["ours"]:
        own = {name: results[name] for name in ("ours", "ours bf16", base)}
        found |= ratios(own, base)
    show(results, found, "positions")
    hide_path(options.peers_python)
    write_result("crm_training", {"dataset": facts, "sizes": SIZES, "ratios": found, "variants": results})


if __name__ == "__main__":
    main()
