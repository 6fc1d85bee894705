# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd4rec_hf.data import ItemVocabulary, SequenceCollator, load_interactions, split_leave_one_out
from llmd4rec_hf.errors import ConfigurationError, DataError


def rows(*sequences):
    return [{"item_ids": items, "row_id": row, "user_id": "u"} for row, items in enumerate(sequences)]


def test_by_hand():
    batch = SequenceCollator()(rows([5, 6, 7, 8], [9, 4]))
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "item_ids": [[5, 6, 7], [9, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[6, 7, 8], [4, -100, -100]],
        "row_id": [0, 1],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_the_newest_positions_stay():
    batch = SequenceCollator(max_length=2)(rows([1, 2, 3, 4], [5, 6]))
    assert batch["item_ids"].tolist() == [[2, 3], [5, 0]]
    assert batch["labels"].tolist() == [[3, 4], [6, -100]]


@pytest.mark.parametrize(("multiple", "width"), [(None, 3), (2, 4), (3, 3), (8, 8)])
def test_pad_to_multiple_of(multiple, width):
    batch = SequenceCollator(max_length=3, pad_to_multiple_of=multiple)(rows([1, 2, 3, 4, 5], [5, 6]))
    assert {batch[name].shape for name in ("item_ids", "labels", "attention_mask")} == {(2, width)}
    assert batch["attention_mask"].sum().item() == 4


@given(st.lists(st.lists(st.integers(1, 99), min_size=2, max_size=9), min_size=1, max_size=6), st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_is_the_plain_definition(sequences, max_length):
    batch = SequenceCollator(max_length)(rows(*sequences))
    for items, ids, mask, labels in zip(
        sequences, batch["item_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist(), strict=True
    ):
        inputs, targets = items[:-1][-max_length:], items[1:][-max_length:]
        padding = len(ids) - len(inputs)
        assert ids == inputs + [0] * padding
        assert mask == [1] * len(inputs) + [0] * padding
        assert labels == targets + [-100] * padding
    assert len(ids) == min(max_length, max(map(len, sequences)) - 1)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_rows_of_any_kind(kind):
    batch = SequenceCollator()(rows(kind([1, 2, 3]), kind([4, 5])))
    assert batch["item_ids"].tolist() == [[1, 2], [4, 0]]


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_rows_of_a_split(form):
    log = load_interactions(pd.DataFrame({"user_id": [1] * 5 + [2] * 4, "item_id": [1, 2, 3, 4, 5, 2, 3, 4, 5]}))
    train = split_leave_one_out(log, ItemVocabulary.from_interactions(log))["train"].with_format(form)
    batch = SequenceCollator()([train[0], train[1]])
    assert batch["labels"].tolist() == [[2, 3], [3, -100]]
    assert batch["row_id"].tolist() == [0, 1]


def test_row_id_is_optional():
    assert set(SequenceCollator()([{"item_ids": [1, 2]}])) == {"item_ids", "attention_mask", "labels"}


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "no rows"),
        (rows([1, 2], [3]), r"row 1 of the batch \(row_id 1\) has fewer than 2 items"),
        ([{"item_ids": []}], "row 0 of the batch has fewer than 2 items"),
        (rows([1, 2], [3, 0, 4]), r"row 1 of the batch \(row_id 1\) holds the id 0"),
        (rows([1, -2], [3, 4]), "row 0 of the batch .* holds the id -2"),
        (rows([1, 2], [0, 4]), "row 1 of the batch"),
    ],
)
def test_bad_rows(features, message):
    with pytest.raises(DataError, match=message):
        SequenceCollator()(features)


@pytest.mark.parametrize("options", [{"max_length": 0}, {"pad_to_multiple_of": 0}])
def test_bad_options(options):
    with pytest.raises(ConfigurationError, match="must be 1 or more"):
        SequenceCollator(**options)
