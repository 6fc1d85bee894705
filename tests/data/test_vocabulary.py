# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd4rec_hf.data import ItemVocabulary, load_interactions, load_items
from llmd4rec_hf.errors import DataError


@pytest.fixture
def vocabulary():
    return ItemVocabulary(["c", "a", "b"], ["Cup", "Ash", "Bag"])


def log(*items):
    return load_interactions(pd.DataFrame({"user_id": [1] * len(items), "item_id": items}))


class TestMap:
    def test_encode_and_decode(self, vocabulary):
        assert len(vocabulary) == vocabulary.num_items == 3
        assert vocabulary.encode(["a", "c", "a"]).tolist() == [2, 1, 2]
        assert vocabulary.encode(["a"]).dtype == np.int64
        assert vocabulary.encode([]).tolist() == []
        assert vocabulary.decode([3, 1]) == ["b", "c"]
        assert vocabulary.decode(torch.tensor([[1, 2], [3, 3]])) == [["c", "a"], ["b", "b"]]
        assert vocabulary.decode([]) == []
        assert vocabulary.item_ids == ["c", "a", "b"]
        assert vocabulary.text(1) == "Cup"

    @given(st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1)), min_size=1, unique=True))
    @settings(deadline=None, max_examples=30)
    def test_integers_there_and_back(self, ids):
        vocabulary = ItemVocabulary(ids)
        assert vocabulary.decode(vocabulary.encode(ids)) == ids
        assert vocabulary.encode(ids).tolist() == list(range(1, len(ids) + 1))

    @given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, unique=True))
    @settings(deadline=None, max_examples=30)
    def test_strings_there_and_back(self, ids):
        vocabulary = ItemVocabulary(ids)
        assert vocabulary.decode(vocabulary.encode(np.array(ids, object))) == ids

    def test_unknown_ids(self, vocabulary):
        with pytest.raises(DataError, match="2 of 3 item ids are not in the vocabulary, first 'x'"):
            vocabulary.encode(["a", "x", "y"])
        assert vocabulary.encode(["x", "b", "y"], unknown="ignore").tolist() == [3]
        assert vocabulary.encode(["x", "b", "y"], unknown="zero").tolist() == [0, 3, 0]
        with pytest.raises(DataError, match="choose 'raise', 'ignore' or 'zero'"):
            vocabulary.encode(["a"], unknown="skip")

    @pytest.mark.parametrize(("ids", "wrong"), [([0, 1], "0"), ([1, 4], "4"), ([[-1]], "-1")])
    def test_ids_out_of_range(self, vocabulary, ids, wrong):
        with pytest.raises(DataError, match=f"internal id {wrong} is outside 1..3"):
            vocabulary.decode(ids)

    def test_padding_has_no_text(self, vocabulary):
        with pytest.raises(DataError, match="internal id 0 is outside"):
            vocabulary.text(0)
        with pytest.raises(DataError, match="must be integers"):
            vocabulary.decode([1.0])

    def test_ids_in_any_container(self):
        vocabulary = ItemVocabulary([5, 6])
        for ids in (
            torch.tensor([6, 5]),
            np.array([6, 5], np.int32),
            pd.Series([6, 5]),
            (np.int64(6), 5),
            log(6, 5)["item_id"],
        ):
            assert sorted(vocabulary.encode(ids).tolist()) == [1, 2]
        with pytest.raises(DataError, match="got the string '56'; put it into a list"):
            vocabulary.encode("56")

    def test_numbers_and_their_text_are_one_id(self):
        assert ItemVocabulary([10, 12]).encode(["12"]).tolist() == [2]
        assert ItemVocabulary(["10", "x"]).encode([10]).tolist() == [1]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([],), "at least one item"),
            ((["a", "b", "a"],), "item id 'a' occurs more than once"),
            (([1, "1"],), "item id '1' occurs more than once"),
            ((["a", None],), "row 2 has no id"),
            (([1.5],), "ids must be integers or strings"),
            ((["a", "b"], ["x"]), "1 texts for 2 items"),
            ((["a", "b"], ["x", None]), "item 2 has no text"),
        ],
    )
    def test_bad_input(self, arguments, message):
        with pytest.raises(DataError, match=message):
            ItemVocabulary(*arguments)

    def test_mixed_types_become_strings(self, caplog):
        assert ItemVocabulary([1, "a"]).item_ids == ["1", "a"]
        assert "mix numbers and strings" in caplog.text


class TestFromInteractions:
    def test_order(self):
        assert ItemVocabulary.from_interactions(log(10, 9, 10, 2)).item_ids == [2, 9, 10]
        assert ItemVocabulary.from_interactions(log("b", "10", "9")).item_ids == ["10", "9", "b"]

    def test_texts(self, caplog):
        items = load_items(pd.DataFrame({"item_id": [7, 3, 5], "title": ["seven", "three", "five"]}))
        vocabulary = ItemVocabulary.from_interactions(log(3, 4, 7), items)
        assert vocabulary.texts == ["three", "4", "seven"]
        assert "1 of 3 items have no text" in caplog.text
        with pytest.raises(DataError, match="none of 2 items has a text in the catalogue, whose first item is 7 "):
            ItemVocabulary.from_interactions(log(14, 16), items)
        empty = datasets.Dataset.from_dict({"item_id": [], "title": []})
        assert ItemVocabulary.from_interactions(log(14), empty).texts == ["14"]
        assert ItemVocabulary.from_interactions(log(3)).texts is None
        assert ItemVocabulary.from_interactions(log(3)).text(1) == "3"

    def test_catalogue_with_other_id_type(self):
        items = load_items(pd.DataFrame({"item_id": ["3", "x"], "title": ["three", "ex"]}))
        assert ItemVocabulary.from_interactions(log(3), items).texts == ["three"]

    def test_catalogue_without_text(self):
        with pytest.raises(DataError, match="it needs item_id and title"):
            ItemVocabulary.from_interactions(log(3), log(3))


class TestIdentity:
    def test_equality_is_content(self, vocabulary):
        same = ItemVocabulary(np.array(["c", "a", "b"]), ["Cup", "Ash", "Bag"])
        assert vocabulary == same
        assert hash(vocabulary) == hash(same)
        assert vocabulary.first_difference(same) is None
        assert vocabulary != "vocabulary"

    @pytest.mark.parametrize(
        ("other", "difference"),
        [
            (ItemVocabulary(["c", "b", "a"], ["Cup", "Bag", "Ash"]), "item 2: id 'a' against 'b'"),
            (ItemVocabulary(["c", "a", "b"], ["Cup", "Ash", "Box"]), "item 3: text 'Bag' against 'Box'"),
            (ItemVocabulary(["c", "a"], ["Cup", "Ash"]), "3 items against 2"),
            (ItemVocabulary(["c", "a", "b"]), "the second has no texts"),
        ],
    )
    def test_first_difference(self, vocabulary, other, difference):
        assert vocabulary != other
        assert vocabulary.first_difference(other) == difference

    def test_numbers_differ_from_text(self):
        assert ItemVocabulary([1]) != ItemVocabulary(["1"])
        assert ItemVocabulary([1]).first_difference(ItemVocabulary(["1"])) == "item 1: id 1 against '1'"

    def test_add(self, vocabulary):
        more = vocabulary.add(["z"], ["Zip"])
        assert more.item_ids == ["c", "a", "b", "z"]
        assert more.text(4) == "Zip"
        assert len(vocabulary) == 3
        with pytest.raises(DataError, match="'a' occurs more than once"):
            vocabulary.add(["a"], ["again"])
        with pytest.raises(DataError, match="exactly when the vocabulary has texts"):
            vocabulary.add(["z"])


class TestOnDisk:
    @pytest.mark.parametrize("ids", [["007", "é"], [7, 2**53 + 1]])
    @pytest.mark.parametrize("texts", [None, ["a", "\u2028 \U0001f600"]])
    def test_round_trip(self, tmp_path, ids, texts):
        vocabulary = ItemVocabulary(ids, texts)
        folder = tmp_path / "deep" / "folder"
        assert vocabulary.save_pretrained(folder, push_to_hub=False) == [str(folder / "vocabulary.json")]
        loaded = ItemVocabulary.from_pretrained(folder)
        assert loaded == vocabulary
        assert loaded.item_ids == ids
        assert os.listdir(folder) == ["vocabulary.json"]
        assert ItemVocabulary.from_pretrained(tmp_path, subfolder="deep/folder") == vocabulary

    def test_a_failed_write_leaves_the_old_file(self, tmp_path, vocabulary, monkeypatch):
        vocabulary.save_pretrained(tmp_path)

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            vocabulary.add(["z"], ["Zip"]).save_pretrained(tmp_path)
        assert ItemVocabulary.from_pretrained(tmp_path) == vocabulary
        assert os.listdir(tmp_path) == ["vocabulary.json"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "damaged"),
            ("[]", "damaged"),
            (json.dumps({"format_version": 1}), "damaged"),
            (
                json.dumps({"format_version": 9, "item_ids": [1], "texts": None}),
                "format version 9, this release reads 1",
            ),
            (None, "not found; a model is only usable with"),
        ],
    )
    def test_bad_files(self, tmp_path, content, message):
        if content is not None:
            (tmp_path / "vocabulary.json").write_text(content)
        with pytest.raises(DataError, match=message):
            ItemVocabulary.from_pretrained(tmp_path)

    def test_wrong_name(self):
        with pytest.raises(DataError, match="no such folder, and no vocabulary.json on the Hub"):
            ItemVocabulary.from_pretrained("someone/nothing")
