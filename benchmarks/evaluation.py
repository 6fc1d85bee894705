# SPDX-License-Identifier: Apache-2.0
"""
Full-ranking evaluation of SASRec in users per second: ours through `trainer.evaluate` beside RecBole's own, whole
evaluations of the test split in turns. Ours leaves out seen items, RecBole does not (its default for sequential
models); both report hit rate, NDCG and MRR at 5, 10 and 20.

    python benchmarks/evaluation.py --dataset FOLDER --peers_python PEERS/bin/python
"""

from __future__ import annotations

import argparse
import tempfile
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
    own_command,
    peer_command,
)
from peers.turns import Turns, ratios, show, take_turns

from llmd4rec_hf import CRMArguments, CRMTrainer
from llmd4rec_hf.data import data_hash


def evaluate_ours(options) -> None:
    """The worker of ours."""
    _, vocabulary, splits = load(options.dataset)
    args = CRMArguments(**common_arguments(options.folder, options.bf16))
    turns = Turns(batch_size=args.per_device_eval_batch_size, items=len(vocabulary))
    trainer = CRMTrainer(make_sasrec(len(vocabulary)), args, eval_dataset=splits["test"])
    turns.next()
    while True:
        trainer.evaluate()
        turns.next(len(splits["test"]))


def main() -> None:
    """Measure, print ratios, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_options(parser, seconds=None, repeats=3)
    parser.add_argument("--peers_python", help="of the environment that benchmarks/peers/requirements.txt describes")
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        evaluate_ours(options)
    facts, _, splits = load(options.dataset)
    facts["test_hash"] = data_hash(splits["test"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = {"ours": own_command(options, folder), "ours bf16": own_command(options, folder, "--bf16")}
        if options.peers_python:
            export(splits, folder)
            commands["RecBole"] = peer_command(options.peers_python, "recbole", "evaluate", folder, options.threads)
        results = take_turns(commands, 0, options.repeats, options.threads)
    found = ratios(results, "RecBole" if options.peers_python else "ours")
    show(results, found, "users")
    hide_path(options.peers_python)
    write_result("evaluation", {"dataset": facts, "sizes": SIZES, "ratios": found, "variants": results})


if __name__ == "__main__":
    main()
