# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd4rec_hf.data import filter_interactions, load_interactions
from llmd4rec_hf.errors import ConfigurationError, DataError


LOG = pd.DataFrame(
    [
        ("u", "a", 10, 5.0),
        ("u", "b", 20, 2.0),
        ("u", "a", 20, 4.0),
        ("u", "a", 20, 3.0),
        ("v", "a", 5, 4.0),
        ("v", "c", 30, np.nan),
        ("w", "c", 40, 1.0),
    ],
    columns=["user_id", "item_id", "timestamp", "rating"],
)


def kept(**options):
    log = filter_interactions(load_interactions(LOG), **options)
    return list(zip(log["user_id"], log["item_id"], log["timestamp"], strict=True))


def test_nothing_goes_unless_asked():
    assert filter_interactions(load_interactions(LOG)).to_pandas().equals(load_interactions(LOG).to_pandas())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"min_rating": 4}, [("u", "a", 10), ("u", "a", 20), ("v", "a", 5)]),
        ({"start_time": 20, "end_time": 40}, [("u", "b", 20), ("u", "a", 20), ("u", "a", 20), ("v", "c", 30)]),
        ({"end_time": "1970-01-01T00:00:10"}, [("v", "a", 5)]),
        ({"duplicates": "exact", "end_time": 30}, [("u", "a", 10), ("u", "b", 20), ("u", "a", 20), ("v", "a", 5)]),
        ({"duplicates": "first", "end_time": 30}, [("u", "a", 10), ("u", "b", 20), ("v", "a", 5)]),
        ({"duplicates": "last", "end_time": 30}, [("u", "b", 20), ("u", "a", 20), ("v", "a", 5)]),
        ({"max_history": 1}, [("u", "a", 20), ("v", "c", 30), ("w", "c", 40)]),
        ({"min_history": 2, "max_history": 2}, [("u", "a", 20), ("u", "a", 20), ("v", "a", 5), ("v", "c", 30)]),
        # Repeats go before the newest are counted.
        (
            {"duplicates": "first", "max_history": 2},
            [("u", "a", 10), ("u", "b", 20), ("v", "a", 5), ("v", "c", 30), ("w", "c", 40)],
        ),
        ({"k_item": 3}, [("u", "a", 10), ("u", "a", 20), ("u", "a", 20), ("v", "a", 5)]),
        # Of two bounds for a user the larger one.
        ({"min_history": 3, "k_user": 1}, [("u", "a", 10), ("u", "b", 20), ("u", "a", 20), ("u", "a", 20)]),
        ({"min_history": 1, "k_user": 3}, [("u", "a", 10), ("u", "b", 20), ("u", "a", 20), ("u", "a", 20)]),
        ({"k_user": 2, "k_item": 2, "min_rating": 2}, [("u", "a", 10), ("u", "a", 20), ("u", "a", 20)]),
    ],
)
def test_by_hand(options, expected):
    assert kept(**options) == expected


@pytest.mark.parametrize("start", ["2020-01-01", "20200101", 20200101, 1577836800000, "1577836800", 202001010000])
def test_a_time_means_what_it_does_in_a_log(start):
    table = pd.DataFrame({"user_id": [1, 1], "item_id": [2, 3], "timestamp": ["2019-12-31 23:59:59", "2020-01-01"]})
    assert filter_interactions(load_interactions(table), start_time=start)["item_id"] == [3]


pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


@given(pairs, st.sampled_from(["exact", "first", "last"]))
@settings(deadline=None, max_examples=40)
def test_duplicates_are_those_of_pandas(rows, policy):
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).sort_values(
        ["user_id", "timestamp"], kind="stable", ignore_index=True
    )
    keys = ["user_id", "item_id", "timestamp"] if policy == "exact" else ["user_id", "item_id"]
    expected = frame.drop_duplicates(keys, keep="last" if policy == "last" else "first", ignore_index=True)
    assert filter_interactions(load_interactions(frame), duplicates=policy).to_pandas().equals(expected)


def test_errors():
    with pytest.raises(ConfigurationError, match="choose one of keep, exact, first, last"):
        kept(duplicates="drop")
    with pytest.raises(ConfigurationError, match="must be 1 or more and not below min_history"):
        kept(min_history=3, max_history=2)
    with pytest.raises(ConfigurationError, match="start_time='soon' is no time; give seconds since 1970"):
        kept(start_time="soon")
    missing = pd.DataFrame({"user_id": [1, 1, 1], "item_id": [1, 2, 3], "rating": ["4", " ", ""]})
    assert filter_interactions(load_interactions(missing), min_rating=1)["item_id"] == [1]
    with pytest.raises(DataError, match="no interaction is left after min_rating=9"):
        kept(min_rating=9)
    positions = load_interactions(LOG[["user_id", "item_id"]])
    with pytest.raises(DataError, match="has no ratings"):
        filter_interactions(positions, min_rating=1)
    with pytest.raises(DataError, match="positions, not times"):
        filter_interactions(positions, start_time=1)
    words = load_interactions(LOG.assign(rating="good"))
    with pytest.raises(DataError, match="are no numbers"):
        filter_interactions(words, min_rating=1)
