# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from llmd4rec_hf.data import (
    ItemVocabulary,
    data_card,
    load_interactions,
    load_items,
    make_demo,
    render,
    split_by_ratio,
    split_by_time,
    split_leave_one_out,
)
from llmd4rec_hf.data import floors as floors_module
from llmd4rec_hf.data.floors import DECAY, WINDOW, floors, row_items
from llmd4rec_hf.data.sequences import _splits
from llmd4rec_hf.errors import DataError


def log(sequences, times=None):
    rows = [
        (user, item, times[user][step] if times else step)
        for user, items in sequences.items()
        for step, item in enumerate(items)
    ]
    return load_interactions(pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]))


def card_of(interactions, split=split_leave_one_out, items=None, **options):
    vocabulary = ItemVocabulary.from_interactions(interactions, items)
    return data_card(interactions, split(interactions, vocabulary), vocabulary, **options)


class TestCard:
    def test_by_hand(self):
        # Test targets: 4 (cold), 1 (in its own history), 5 (cold, but known from validation).
        interactions = log(
            {"a": [1, 2, 3, 4], "b": [1, 2, 5, 1], "c": [2, 1, 3, 5]},
            {"a": [0, 1, 2, 3], "b": [0, 4, 5, 6], "c": [7, 7, 8, 9]},
        )
        items = load_items(pd.DataFrame({"item_id": [1, 2, 3, 4], "title": ["Cup", "Cup", "Mug", ""]}))
        card = card_of(interactions, items=items)
        assert card["test"] == {
            "targets": 3, "cold_targets": 2, "cold_targets_after_validation": 1, "repeated_targets": 1
        }  # fmt: skip
        # 4 has an empty title and 5 no row: both are called by their id.
        assert card["catalogue"] == {"items": 5, "items_without_text": 2, "items_sharing_text": 2}
        assert card["log"]["has_clock"]
        assert card["log"]["tie_share"] == pytest.approx(2 / 12)
        assert card["splits"]["train"] == {"rows": 3, "interactions": 6}
        # Training times 0 1 | 0 4 | 7 7; later than the targets at 3, 6 and 9: three, two and none of them.
        assert card["leakage"]["training_after_target"] == pytest.approx((3 + 2 + 0) / 3 / 6)
        assert "at a moment of its own" in card["leakage"]["statement"]
        json.dumps(card)

    def test_a_split_by_time_does_not_leak(self):
        times = {user: [0, 1 + user, 20, 30, 40, 50] for user in range(4)}
        interactions = log({user: [1, 2, 3, 4, 5, 6] for user in range(4)}, times)
        card = card_of(interactions, split_by_time)
        assert card["leakage"]["training_after_target"] == 0
        assert card["leakage"]["statement"].startswith("No training interaction")

    def test_without_a_clock_and_without_texts(self):
        interactions = load_interactions(pd.DataFrame({"user_id": [1] * 4, "item_id": [1, 2, 3, 4]}))
        card = card_of(interactions, with_floors=False)
        assert card["leakage"]["training_after_target"] is None
        assert not card["log"]["has_clock"]
        assert "floors" not in card
        text = render(card)
        assert "there is no clock" in text
        assert "no texts" in text

    def test_rendered(self):
        interactions, items = make_demo(num_users=200, num_items=100)
        card = card_of(interactions, items=items)
        text = render(card)
        assert "| users, items, interactions | 200, " in text
        assert f"| item kNN | {card['floors']['item_knn']['hr@10']:.4f}" in text
        assert "training interactions later than a test target" in text


def plain_floors(train, test, num_items):
    """The definitions, item by item."""
    similarity = np.zeros((num_items + 1, num_items + 1))
    counts = np.zeros(num_items + 1)
    for row in train:
        np.add.at(counts, row, 1)
        for place, first in enumerate(row):
            for distance, then in enumerate(row[place + 1 : place + 1 + WINDOW]):
                if then != first:
                    similarity[first, then] += DECAY**distance
    similarity /= np.sqrt(np.outer(np.maximum(counts, 1), np.maximum(counts, 1)))
    for row in similarity:
        row[np.argsort(-row, kind="stable")[floors_module.NEIGHBOURS :]] = 0
    ranks = []
    for *history, target in test:
        by_popularity = counts.astype(float)
        near = sum(DECAY**back * similarity[item] for back, item in enumerate(history[: -WINDOW - 1 : -1]))
        for scores in (by_popularity, near + counts / (counts.sum() + 1) * 1e-6):
            own = scores[target]
            others = [i for i in range(1, num_items + 1) if i not in history and i != target]
            ranks.append(1 + sum(scores[i] >= own - 1e-12 for i in others))
    return ranks[::2], ranks[1::2]


class TestFloors:
    @pytest.mark.parametrize("chunk", [1, 40, 1 << 21])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_are_the_plain_definition(self, seed, chunk, monkeypatch):
        rng = np.random.default_rng(seed)
        sequences = {user: rng.integers(1, 25, rng.integers(3, 20)).tolist() for user in range(30)}
        interactions = log(sequences)
        vocabulary = ItemVocabulary(list(range(1, 25)))
        splits = split_leave_one_out(interactions, vocabulary)
        monkeypatch.setattr(floors_module, "CHUNK_ENTRIES", chunk)
        monkeypatch.setattr(floors_module, "NEIGHBOURS", 6 if seed else 500)
        values, lengths = row_items(splits["train"])
        popularity = np.bincount(values, minlength=25).astype(np.float32)
        neighbours = floors_module._neighbours(values, lengths, 24)
        ranks = floors_module._ranks(*row_items(splits["test"]), neighbours, popularity)
        expected = plain_floors(splits["train"]["item_ids"], splits["test"]["item_ids"], 24)
        assert ranks[0].tolist() == expected[0]
        assert ranks[1].tolist() == expected[1]

    def test_on_beauty(self, shared):
        """Published for this rule, untuned: HR@10 .0779, NDCG@10 .0489; popularity .0115 with other ties."""
        interactions = load_interactions(shared / "data/amazon_beauty")
        card = card_of(interactions)
        assert card["floors"]["item_knn"]["hr@10"] == pytest.approx(0.0779, abs=0.0010)
        assert card["floors"]["item_knn"]["ndcg@10"] == pytest.approx(0.0489, abs=0.0005)
        assert card["floors"]["popularity"]["hr@10"] == pytest.approx(0.0115, abs=0.0010)
        assert card["test"] == {
            "targets": 22363, "cold_targets": 138, "cold_targets_after_validation": 52, "repeated_targets": 0
        }  # fmt: skip
        assert card["catalogue"]["items_sharing_text"] is None

    def test_large_data_are_sampled(self, monkeypatch):
        interactions, _ = make_demo(num_users=300, num_items=60)
        vocabulary = ItemVocabulary.from_interactions(interactions)
        splits = split_leave_one_out(interactions, vocabulary)
        monkeypatch.setattr(floors_module, "MOST_FITTED", 500)
        monkeypatch.setattr(floors_module, "MOST_RANKED", 50)
        found = floors(splits["train"], splits["test"], len(vocabulary))
        assert found["ranked_targets"] == 50
        assert 400 < found["fitted_interactions"] <= 500
        assert found == floors(splits["train"], splits["test"], len(vocabulary))

    def test_nothing_that_two_items_share(self):
        splits = split_leave_one_out(log({1: [1, 2, 3], 2: [2, 1, 4]}), ItemVocabulary([1, 2, 3, 4]))
        found = floors(splits["train"], splits["test"], 4)
        assert found["item_knn"]["hr@10"] == 1.0


class TestByRatio:
    def test_by_hand(self):
        interactions = log({"a": list(range(10)), "b": [1, 2, 3], "c": [1, 2], "d": list(range(20))})
        splits = split_by_ratio(interactions, ItemVocabulary(list(range(20))), validation_ratio=0.2, test_ratio=0.2)
        lengths = {name: dict(zip(rows["user_id"], rows["length"], strict=True)) for name, rows in splits.items()}
        assert lengths == {
            "train": {"a": 6, "d": 12}, "validation": {"a": 7, "b": 2, "d": 13}, "test": {"a": 9, "b": 3, "d": 17}
        }  # fmt: skip
        assert splits["train"]["row_id"] == [0, 2]
        assert splits["test"]["item_ids"][1] == [2, 3, 4]

    def test_errors(self):
        interactions = log({"a": [1, 2]})
        for ratios, message in (((0.5, 0.5), "leave some for train"), ((0.1, 0.1), "no user has 3")):
            with pytest.raises(ValueError, match=message):
                split_by_ratio(interactions, ItemVocabulary([1, 2]), validation_ratio=ratios[0], test_ratio=ratios[1])


def test_a_leak_is_an_error():
    users, user, items = pa.array([7]), np.zeros(4, np.int32), np.arange(1, 5, dtype=np.int32)
    good = {"train": np.array([2]), "validation": np.array([3]), "test": np.array([4])}
    assert len(_splits(users, user, items, good)["test"]) == 1
    for name, end in (("train", 3), ("train", 4), ("validation", 4)):
        with pytest.raises(DataError, match=f"1 targets of .* lie in {name}"):
            _splits(users, user, items, good | {name: np.array([end])})
    # Also of a user without a validation row.
    with pytest.raises(DataError, match="1 targets of test lie in train"):
        _splits(users, user, items, good | {"train": np.array([4]), "validation": np.array([0])})


@pytest.mark.parametrize("split", [split_leave_one_out, split_by_time, split_by_ratio])
def test_no_split_holds_what_a_later_one_asks_for(split):
    interactions, _ = make_demo(num_users=300, num_items=80)
    splits = split(interactions, ItemVocabulary.from_interactions(interactions))
    rows = {name: dict(zip(part["row_id"], part["item_ids"], strict=True)) for name, part in splits.items()}
    checked = 0
    for earlier, later in (("train", "validation"), ("validation", "test"), ("train", "test")):
        for row, items in rows[earlier].items():
            if row in rows[later]:
                assert rows[later][row][: len(items)] == items
                assert len(items) < len(rows[later][row])
                checked += 1
    assert checked > 100
