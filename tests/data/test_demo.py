# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from llmd4rec_hf.data import ItemVocabulary, describe_interactions, make_demo, split_by_time, split_leave_one_out
from llmd4rec_hf.errors import ConfigurationError


@pytest.fixture(scope="module")
def demo():
    return make_demo()


def test_is_as_sparse_as_a_5_core_set(demo):
    counts = describe_interactions(demo[0])
    assert counts["users"] == 2000
    assert 6 <= counts["median_length"] <= 8
    assert 5 <= counts["interactions"] / counts["items"] <= 12
    assert counts["repeat_share"] == 0
    assert min(np.unique(demo[0]["user_id"], return_counts=True)[1]) >= 5


def test_popularity_has_a_long_tail(demo):
    popularity = np.sort(np.unique(demo[0]["item_id"], return_counts=True)[1])[::-1]
    assert popularity[: len(popularity) // 10].sum() > 0.25 * popularity.sum()


def test_titles_say_what_an_item_is(demo):
    items = demo[1]
    for item in items.select(range(50)):
        assert item["title"].startswith(f"{item['brand']} {item['style']} ")
        assert item["title"].endswith(item["colour"])
        assert item["text"] == item["title"]
    assert len(items) == 1500


def test_interests_persist_and_drift(demo):
    log, items = demo
    category = dict(zip(items["item_id"], items["category"], strict=True))
    user = np.array(log["user_id"])
    walk = np.array([category[item] for item in log["item_id"]])
    same_user = user[1:] == user[:-1]
    stays = (walk[1:] == walk[:-1])[same_user].mean()
    assert 0.5 < stays < 0.8


def test_equal_seeds_give_equal_data():
    first, again, other = (make_demo(50, 40, seed=seed) for seed in (3, 3, 4))
    assert describe_interactions(first[0])["hash"] == describe_interactions(again[0])["hash"]
    assert first[1].to_dict() == again[1].to_dict()
    assert describe_interactions(first[0])["hash"] != describe_interactions(other[0])["hash"]


@pytest.mark.parametrize(("num_users", "num_items"), [(1, 10), (3, 12), (30, 20)])
def test_small_sizes(num_users, num_items):
    log, items = make_demo(num_users, num_items)
    vocabulary = ItemVocabulary.from_interactions(log, items)
    assert len(split_leave_one_out(log, vocabulary)["test"]) == num_users


def test_splits_by_time_too(demo):
    splits = split_by_time(demo[0], ItemVocabulary.from_interactions(*demo))
    assert min(map(len, splits.values())) > 100


def test_too_small():
    with pytest.raises(ConfigurationError, match="10 items"):
        make_demo(1, 5)
