# SPDX-License-Identifier: Apache-2.0
"""
RecTools' SASRec with the full softmax (`loss="softmax"`), through its own `fit`.
Started by the benchmarks, in an environment of its own: see requirements.txt.
"""

from __future__ import annotations

import json
import sys
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


def make_trainer() -> Trainer:
    """As `SASRecModel` makes its own, without end."""
    return Trainer(
        max_epochs=10**6,
        callbacks=[Held()],
        accelerator="auto" if options["gpu"] else "cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        enable_checkpointing=False,
        devices=1,
    )


def main() -> None:
    """Train without end."""
    torch.set_num_threads(options["threads"])
    log = pd.read_csv(Path(options["folder"]) / "train.csv")
    log[Columns.Weight] = 1
    log[Columns.Datetime] = pd.to_datetime(log.pop("timestamp"), unit="s")
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
    model.fit(Dataset.construct(log))


if __name__ == "__main__":
    main()
