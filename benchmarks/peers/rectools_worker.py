# SPDX-License-Identifier: Apache-2.0
"""
RecTools' SASRec with the full softmax (`loss="softmax"`), through its own `fit`.
Started by the benchmarks, in an environment of its own: see requirements.txt.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from turns import Turns


BATCH_SIZE = 128  # SASRecModel's default
# `fit` copies the trainer with its callbacks: neither of these could be copied.
options = json.loads(sys.argv.pop())
turns = Turns()


class Held(Callback):
    """Holds the training between two steps."""

    def on_train_start(self, trainer, module):
        versions = {name: version(name) for name in ("rectools", "torch", "pytorch-lightning")}
        items = module.torch_model.item_model.n_items - 1
        turns.next(batch_size=BATCH_SIZE, batch_of="histories", versions=versions, items=items)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        turns.next(int((batch["y"] != 0).sum()))


class Snapshots(Callback):
    """Keeps the weights and what training has taken, every few epochs: a pause would reset the optimizer."""

    kept: list = []  # of the class, because `fit` copies its callbacks

    def on_train_start(self, trainer, module):
        self.start = time.process_time()

    def on_train_epoch_end(self, trainer, module):
        epoch = trainer.current_epoch + 1
        if epoch % options["every"] == 0:
            start = time.process_time()
            state = copy.deepcopy(module.torch_model.state_dict())
            self.kept.append((epoch, start - self.start, state))
            self.start += time.process_time() - start


def validation_ndcg(model, dataset, targets: pd.Series) -> float:
    """NDCG@10 over all items but those of the history."""
    found = model.recommend(targets.index.to_numpy(), dataset, k=10, filter_viewed=True)
    hits = found[found[Columns.Item] == found[Columns.User].map(targets)]
    return sum(1 / math.log2(rank + 1) for rank in hits[Columns.Rank]) / len(targets)


def make_trainer() -> Trainer:
    """As `SASRecModel` makes its own, without end or for as many epochs as were asked for."""
    return Trainer(
        max_epochs=options.get("epochs", 10**6),
        callbacks=[Snapshots() if options["task"] == "until" else Held()],
        accelerator="auto" if options["gpu"] else "cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        enable_checkpointing=False,
        devices=1,
    )


def read_log(name: str) -> pd.DataFrame:
    """A part of the log with RecTools' columns."""
    log = pd.read_csv(Path(options["folder"]) / name)
    log[Columns.Weight] = 1
    log[Columns.Datetime] = pd.to_datetime(log.pop("timestamp"), unit="s")
    return log


def main() -> None:
    """Train without end, or for some epochs to find out when a goal was reached."""
    torch.set_num_threads(options["threads"])
    dataset = Dataset.construct(read_log("train.csv"))
    model = SASRecModel(
        n_blocks=options["layers"],
        n_heads=options["heads"],
        n_factors=options["width"],
        session_max_len=options["length"],
        dropout_rate=0.5,
        loss="softmax",
        batch_size=BATCH_SIZE,
        get_trainer_func=make_trainer,
    )
    model.fit(dataset)
    targets = read_log("validation.csv").groupby(Columns.User)[Columns.Item].last()
    curve = []
    for epoch, taken, state in Snapshots.kept:
        model.lightning_model.torch_model.load_state_dict(state)
        curve.append((epoch, taken, validation_ndcg(model, dataset, targets)))
        if curve[-1][2] >= options["goal"]:
            break
    turns.answer(curve)


if __name__ == "__main__":
    main()
