# SPDX-License-Identifier: Apache-2.0
"""A small training set whose teacher is cached, and what tests of caches do with it."""

from __future__ import annotations

import torch
from datasets import Dataset

from llmd4rec_hf.data import SequenceCollator
from llmd4rec_hf.models import SASRecConfig, SASRecModel


NUM_ITEMS, MAX_LENGTH = 9, 6
# Some shorter and some longer than what the teacher reads; row ids out of order and with gaps, as in a real split.
ROWS = {4: [1, 2, 3, 4], 0: [5, 6], 9: [9, 8, 7, 6, 5, 4, 3, 2, 1, 2, 3], 2: [3, 3, 1, 7, 8, 9, 2], 5: [2, 9, 4]}


def make_dataset(rows=ROWS):
    sequences = [list(items) for items in rows.values()]
    return Dataset.from_dict(
        {
            "user_id": [f"u{row}" for row in rows],
            "item_ids": sequences,
            "length": list(map(len, sequences)),
            "row_id": list(rows),
        }
    )


def make_teacher(seed=0, model=SASRecModel, config=SASRecConfig, width=8):
    """
    In double precision: the last bit of a state depends on the shape of the batch it was computed in, and so, but for
    this, would the comparison of what is stored (float32) with what is computed live.
    """
    torch.manual_seed(seed)
    return model(config(num_items=NUM_ITEMS, hidden_size=width, max_length=MAX_LENGTH)).double()


def collate(dataset=None, order=None, max_length=MAX_LENGTH):
    """A batch of some rows, or of all."""
    dataset = make_dataset() if dataset is None else dataset
    rows = dataset.select(order) if order is not None else dataset
    return SequenceCollator(max_length)(list(rows))


def lookup(cache, batch):
    return cache.lookup(batch["row_id"], batch["labels"], batch["attention_mask"])


@torch.no_grad()
def live(teacher, batch):
    was_training = teacher.training
    hidden = teacher.eval().encode(batch["item_ids"], batch["attention_mask"])[batch["labels"] != -100]
    teacher.train(was_training)
    return hidden.float()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-8])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
