# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmd4rec_hf.data import (
    ItemVocabulary,
    data_hash,
    load_interactions,
    split_by_ratio,
    split_by_time,
    split_leave_one_out,
)
from llmd4rec_hf.data.sequences import item_id_range
from llmd4rec_hf.errors import ConfigurationError, DataError


def log(sequences, times=None):
    """A log from `{user: items}`; the items' times are 0, 1, ... unless given."""
    table = [
        (user, item, time)
        for user, items in sequences.items()
        for item, time in zip(items, (times or {}).get(user, range(len(items))), strict=True)
    ]
    return load_interactions(pd.DataFrame(table, columns=["user_id", "item_id", "timestamp"]))


def split(interactions, function=split_leave_one_out, **options):
    return function(interactions, ItemVocabulary.from_interactions(interactions), **options)


def by_user(dataset):
    return dict(zip(dataset["user_id"], dataset["item_ids"], strict=True))


class TestLeaveOneOut:
    def test_by_hand(self):
        # Item ids 10, 20, ... are 1, 2, ... inside.
        splits = split(log({"v": [30, 10, 20], "u": [10, 20, 30, 40, 50], "w": [10, 20], "x": [50, 50, 10, 10]}))
        assert by_user(splits["train"]) == {"u": [1, 2, 3], "x": [5, 5]}
        assert by_user(splits["validation"]) == {"u": [1, 2, 3, 4], "v": [3, 1], "x": [5, 5, 1]}
        assert by_user(splits["test"]) == {"u": [1, 2, 3, 4, 5], "v": [3, 1, 2], "x": [5, 5, 1, 1]}
        assert splits["train"]["row_id"] == [0, 2]
        assert splits["test"]["row_id"] == splits["validation"]["row_id"] == [0, 1, 2]
        assert splits["test"]["length"] == [5, 3, 4]

    def test_columns(self):
        for dataset in split(log({1: [1, 2, 3, 4]})).values():
            assert dataset.column_names == ["user_id", "item_ids", "length", "row_id"]
            assert dataset.features["item_ids"].feature.dtype == "int32"
            assert dataset.features["row_id"].dtype == "int64"

    def test_min_length(self, caplog):
        splits = split(log({1: [1, 2, 3, 4], 2: [1, 2, 3, 4, 5]}), min_length=5)
        assert splits["test"]["user_id"] == [2]
        assert splits["test"]["row_id"] == [0]
        assert "1 of 2 users left out" in caplog.text

    def test_ties_keep_file_order(self):
        assert by_user(split(log({1: [4, 2, 3, 1]}, {1: [5, 5, 5, 4]}))["test"]) == {1: [1, 4, 2, 3]}

    def test_rows_in_any_order_give_the_same_split(self):
        interactions = log({1: [1, 2, 3, 4], 2: [4, 3, 2, 1]})
        shuffled = interactions.shuffle(seed=1)
        assert split(shuffled)["test"].to_dict() == split(interactions)["test"].to_dict()

    @given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1, max_size=8))
    @settings(deadline=None, max_examples=40)
    def test_is_the_plain_definition(self, sequences):
        kept = [items for items in sequences if len(items) >= 3]
        assume(kept)
        interactions = log(dict(enumerate(sequences)))
        vocabulary = ItemVocabulary.from_interactions(interactions)
        splits = split_leave_one_out(interactions, vocabulary)
        for name, end in (("train", -2), ("validation", -1), ("test", None)):
            expected = {row: items[:end] for row, items in enumerate(kept) if len(items[:end]) >= 2}
            rows = zip(splits[name]["row_id"], splits[name]["item_ids"], strict=True)
            assert {row: vocabulary.decode(items) for row, items in rows} == expected
            assert splits[name]["length"] == list(map(len, expected.values()))

    def test_errors(self):
        with pytest.raises(DataError, match="no user has 3 interactions"):
            split(log({1: [1, 2], 2: [1]}))
        with pytest.raises(DataError, match="need at least 3"):
            split(log({1: [1, 2, 3]}), min_length=2)
        with pytest.raises(DataError, match="not in the vocabulary, first 3"):
            split_leave_one_out(log({1: [1, 2, 3]}), ItemVocabulary([1, 2]))


class TestByTime:
    def test_by_hand(self):
        interactions = log(
            {"a": [1, 2, 3, 4, 5, 6], "b": [1, 2, 3], "c": [4, 5], "d": [6, 6], "e": [2, 3]},
            {"a": [0, 1, 10, 11, 20, 21], "b": [0, 9, 20], "c": [9, 19], "d": [10, 20], "e": [10, 11]},
        )
        splits = split(interactions, split_by_time, validation_time=10, test_time=20)
        assert by_user(splits["train"]) == {"a": [1, 2], "b": [1, 2]}
        # c has one item before 10 and so no pair to train on, but a history; d and e have none before 10.
        assert by_user(splits["validation"]) == {"a": [1, 2, 3], "c": [4, 5]}
        assert by_user(splits["test"]) == {"a": [1, 2, 3, 4, 5], "b": [1, 2, 3], "d": [6, 6]}
        rows = {u: r for s in splits.values() for u, r in zip(s["user_id"], s["row_id"], strict=True)}
        assert rows == {"a": 0, "b": 1, "c": 2, "d": 3}
        assert splits["test"].column_names == ["user_id", "item_ids", "length", "row_id"]

    def test_nothing_leaks(self):
        rng = np.random.default_rng(0)
        times = np.sort(rng.integers(0, 100, (40, 12)), axis=1)
        items = {user: [user * 12 + step for step in range(12)] for user in range(40)}
        interactions = log(items, dict(enumerate(times.tolist())))
        when = dict(zip(interactions["item_id"], interactions["timestamp"], strict=True))
        vocabulary = ItemVocabulary.from_interactions(interactions)
        splits = split_by_time(interactions, vocabulary)
        first, second = np.quantile(times, 0.8, method="lower"), np.quantile(times, 0.9, method="lower")
        for name, start, end in (("validation", first, second), ("test", second, 101)):
            for row in splits[name]["item_ids"]:
                *history, target = (when[item] for item in vocabulary.decode(row))
                assert max(history) < start <= target < end
        assert all(when[item] < first for row in splits["train"]["item_ids"] for item in vocabulary.decode(row))

    def test_errors(self):
        positions = load_interactions(pd.DataFrame({"user_id": [1] * 4, "item_id": [1, 2, 3, 4]}))
        with pytest.raises(DataError, match="positions, not times"):
            split(positions, split_by_time)
        interactions = log({1: [1, 2, 3, 4], 2: [1, 2, 3, 4]})
        with pytest.raises(DataError, match="validation must start first"):
            split(interactions, split_by_time, validation_time=3, test_time=3)
        with pytest.raises(DataError, match="no user falls into test"):
            split(interactions, split_by_time, validation_time=2, test_time=30)
        with pytest.raises(ConfigurationError, match="test_time='soon' is no time"):
            split(interactions, split_by_time, validation_time=2, test_time="soon")
        with pytest.raises(DataError, match="quantiles 0.8 and 2; they must lie between 0 and 1"):
            split(interactions, split_by_time, test_quantile=2)

    def test_dates(self):
        interactions = log({1: [1, 2, 3, 4]}, {1: ["2020-01-01", "2020-01-02", "2020-01-03", "2020-01-04"]})
        splits = split(interactions, split_by_time, validation_time="2020-01-03", test_time=20200104)
        assert by_user(splits["validation"]) == {1: [1, 2, 3]}


@pytest.mark.parametrize(
    ("count", "validation_ratio", "test_ratio", "lengths"),
    [
        # A share of 1.4 items is one, of 2.1 two.
        (7, 0.2, 0.3, {"train": [4], "validation": [5], "test": [6]}),
        # 1.6 and 2.4: two each.
        (8, 0.2, 0.3, {"train": [4], "validation": [5], "test": [7]}),
        (5, 0.0, 0.0, {"train": [3], "validation": [4], "test": [5]}),
        # A history for either target is left before the shares, though none to train on.
        (5, 0.1, 0.8, {"train": [], "validation": [2], "test": [3]}),
        (5, 0.5, 0.3, {"train": [], "validation": [2], "test": [4]}),
    ],
)
def test_shares_by_hand(count, validation_ratio, test_ratio, lengths):
    ratios = {"validation_ratio": validation_ratio, "test_ratio": test_ratio}
    splits = split(log({1: list(range(count))}), split_by_ratio, **ratios)
    assert {name: rows["length"][:] for name, rows in splits.items()} == lengths


@pytest.mark.parametrize("ratios", [(-0.1, 0.1), (0.5, 0.5), (float("nan"), 0.1)])
def test_ratios_leave_some_for_train(ratios):
    with pytest.raises(DataError, match="must be 0 or more and leave some for train"):
        split(log({1: [1, 2, 3]}), split_by_ratio, validation_ratio=ratios[0], test_ratio=ratios[1])


@pytest.mark.parametrize(
    ("item_ids", "expected"),
    [([[5, 2], [], [7]], (2, 7)), ([[3], [0, 3]], (0, 3)), ([[], []], (1, 1)), ([], (1, 1))],
)
def test_range_of_item_ids(item_ids, expected):
    features = datasets.Features({"item_ids": datasets.List(datasets.Value("int32"))})
    assert item_id_range(datasets.Dataset.from_dict({"item_ids": item_ids}, features)) == expected


class TestDataHash:
    rows = {"row_id": [0, 1, 2], "item_ids": [[1, 2], [3], [4, 5, 6]], "length": [2, 1, 3], "user_id": [7, 8, 9]}

    def hash(self, **changes):
        return data_hash(datasets.Dataset.from_dict(self.rows | changes))

    def test_is_the_same_however_it_is_stored(self, tmp_path):
        dataset = datasets.Dataset.from_dict(self.rows)
        chunked = datasets.concatenate_datasets([dataset.select([0]), dataset.select([1, 2])])
        sliced = datasets.concatenate_datasets([dataset, dataset]).select([3, 4, 5])
        dataset.save_to_disk(tmp_path)
        hashes = {data_hash(d) for d in (dataset, chunked, sliced, datasets.load_from_disk(tmp_path))}
        narrow = dataset.cast_column("item_ids", datasets.List(datasets.Value("int32")))
        assert hashes == {data_hash(narrow)} == {self.hash(user_id=["x", "y", "z"])}

    @pytest.mark.parametrize(
        "change",
        [{"row_id": [0, 1, 3]}, {"item_ids": [[1], [2, 3], [4, 5, 6]]}, {"item_ids": [[1, 2], [3], [4, 5, 7]]}],
    )
    def test_sees_every_change(self, change):
        assert self.hash(**change) != self.hash()

    def test_sees_the_order(self):
        dataset = datasets.Dataset.from_dict(self.rows)
        assert data_hash(dataset.select([1, 0, 2])) != data_hash(dataset)
