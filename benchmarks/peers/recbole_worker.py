# SPDX-License-Identifier: Apache-2.0
"""
RecBole's SASRec with the full softmax (`loss_type: CE`), through RecBole's own loaders, Trainer and evaluation.
Started by the benchmarks, in an environment of its own: see requirements.txt.
"""

from __future__ import annotations

import json
import sys
import time
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


@torch.no_grad()
def validation_ndcg(model, loader) -> float:
    """NDCG@10 over all items but those of the history, which RecBole itself would rank too."""
    model.eval()
    total = count = 0
    for batch, *_ in loader:
        scores = model.full_sort_predict(batch).view(len(batch), -1)
        target = batch[model.POS_ITEM_ID].unsqueeze(1)
        own = scores.gather(1, target)
        scores.scatter_(1, batch[model.ITEM_SEQ], -torch.inf)[:, 0] = -torch.inf
        ranks = (scores >= own).sum(dim=1) + (scores.gather(1, target) < own).squeeze(1)
        total += ((ranks <= 10) / torch.log2(ranks + 1.0)).sum().item()
        count += len(batch)
    return total / count


def train_until(trainer, train, valid, goal: float, epochs: int, every: int) -> list[tuple[int, float, float]]:
    """Epochs, processor seconds of training and validation NDCG@10, one per evaluation, until the goal."""
    taken, curve = 0.0, []
    for epoch in range(1, epochs + 1):
        start = time.process_time()
        trainer._train_epoch(train, epoch - 1)
        taken += time.process_time() - start
        if epoch % every == 0:
            curve.append((epoch, taken, validation_ndcg(trainer.model, valid)))
            if curve[-1][2] >= goal:
                break
    return curve


def main() -> None:
    """Train or evaluate without end, or train until a goal."""
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
    train, valid, test = data_preparation(config, create_dataset(config))
    model = SASRec(config, train.dataset).to(config["device"])
    trainer = Trainer(config, model)
    if options["task"] == "until":
        turns.answer(train_until(trainer, train, valid, *(options[name] for name in ("goal", "epochs", "every"))))
        return
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
