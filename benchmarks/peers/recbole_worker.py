# SPDX-License-Identifier: Apache-2.0
"""
RecBole's SASRec with the full softmax (`loss_type: CE`), through RecBole's own loaders, Trainer and evaluation.
Started by the benchmarks, in an environment of its own: see requirements.txt.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from turns import Turns


class Held:
    """A loader whose batches are handed out one turn after the other."""

    def __init__(self, loader, turns: Turns):
        self.loader = loader
        self.turns = turns
        self.count = 0

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __iter__(self):
        for batch in self.loader:
            self.turns.next(self.count)
            # One row per prefix of a history, with one target.
            self.count = len(batch)
            yield batch


def main() -> None:
    """Train or evaluate, without end."""
    options = json.loads(sys.argv.pop())  # RecBole reads what is in sys.argv
    torch.set_num_threads(options["threads"])
    turns = Turns()
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec
    from recbole.trainer import Trainer
    from recbole.utils import init_seed

    folder = Path(options["folder"])
    settings = {
        "data_path": str(folder),
        "checkpoint_dir": str(folder / "saved"),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
        "metrics": ["Hit", "NDCG", "MRR"],
        "topk": [5, 10, 20],
        "valid_metric": "NDCG@10",
        "MAX_ITEM_LIST_LENGTH": options["length"],
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "hidden_size": options["width"],
        "inner_size": options["width"],
        "n_layers": options["layers"],
        "n_heads": options["heads"],
        "show_progress": False,
        "state": "ERROR",
        "use_gpu": options["gpu"],
    }
    config = Config(model="SASRec", dataset="log", config_dict=settings)
    init_seed(0, True)
    train, _, test = data_preparation(config, create_dataset(config))
    model = SASRec(config, train.dataset).to(config["device"])
    trainer = Trainer(config, model)
    facts = {"versions": {name: version(name) for name in ("recbole", "torch", "numpy")}, "items": model.n_items - 1}
    if options["task"] == "evaluate":
        turns.next(batch_size=config["eval_batch_size"], **facts)
        while True:
            trainer.evaluate(test, load_best_model=False)
            turns.next(len(test.dataset))
    held = Held(train, turns)
    turns.next(batch_size=config["train_batch_size"], batch_of="prefixes", **facts)
    for epoch in range(10**6):
        trainer._train_epoch(held, epoch)


if __name__ == "__main__":
    main()
