# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import uuid

import pandas as pd
import pytest

from llmd4rec_hf.data import load_items, prepare
from llmd4rec_hf.errors import ConfigurationError, DataError


def test_text_is_cleaned_and_never_empty(caplog):
    table = pd.DataFrame(
        {
            "asin": ["a", "b", "c", "d"],
            "title": ["Salt &amp; \n Pepper\u00a0 ", None, "  ", "x" * 600],
            "brand": ["A", "Acme", None, "D"],
            "category": ["", "Home &gt; Bath", None, "D"],
        }
    )
    items = load_items(table)
    assert items["text"] == ["Salt & Pepper", "Acme, Home > Bath", "c", "x" * 512]
    assert items["title"][:2] == ["Salt & Pepper", ""]
    assert items.column_names == ["item_id", "title", "brand", "category", "text"]
    assert "1 items without a title are described by their other columns" in caplog.text
    assert "1 items without a title are described by their id" in caplog.text


def test_a_column_of_uuids_is_text():
    """Arrow has a type for them, and `datasets` has none."""
    table = pd.DataFrame({"item_id": [1], "title": ["A"], "key": [uuid.UUID(int=1)]})
    assert load_items(table)["key"] == [str(uuid.UUID(int=1))]


def test_quoted_titles(tmp_path):
    (tmp_path / "items.csv").write_text('item_id,title\n1,"Mug, ""big""\nand blue"\n2,Café\n')
    assert load_items(tmp_path / "items.csv")["text"] == ['Mug, "big" and blue', "Café"]


def test_stray_quotes_in_tsv_swallow_nothing(tmp_path):
    (tmp_path / "items.tsv").write_text('item_id\ttitle\n1\t"Weird Al\n2\t7" single\n')
    assert load_items(tmp_path / "items.tsv")["text"] == ['"Weird Al', '7" single']


def test_template():
    table = pd.DataFrame({"item_id": [1, 2], "title": ["Boot", "Tent"], "price": [9, 10]})
    assert load_items(table, text_template="{title} for {price}")["text"] == ["Boot for 9", "Tent for 10"]
    with pytest.raises(DataError, match="names 'colour'; the columns are item_id, title, price"):
        load_items(table, text_template="{colour}")
    with pytest.raises(ConfigurationError, match="text_template"):
        load_items(table, text_template="{title")
    with pytest.raises(ConfigurationError, match="text_template 'Boot' names no field"):
        load_items(table, text_template="Boot")
    with pytest.raises(ConfigurationError, match="max_text_length=0"):
        load_items(table, max_text_length=0)


def test_only_an_empty_field_takes_its_brackets_along():
    titles = ["Freezer bag (-18 °C)", "Freezer bag (-18 °C)", "- Band - ()"]
    table = pd.DataFrame({"item_id": [1, 2, 3], "title": titles, "brand": ["Acme", "", "x"]})
    expected = ["Freezer bag (-18 °C) [Acme]", "Freezer bag (18 °C)", "- Band - () [x]"]
    assert load_items(table, text_template="{title} [{brand}]")["text"] == expected


def test_what_is_missing_inside_a_list():
    lists = [["a", None, "b"], [], None, [None], ["c"]]
    table = pd.DataFrame({"item_id": range(5), "title": "x", "category": lists})
    expected = ["x: a, b", "x", "x", "x", "x: c"]
    assert load_items(table, text_template="{title}: {category}")["text"] == expected


def test_titles_that_are_numbers_stay_text(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,title\n1,1984\n2,300\n")
    assert load_items(tmp_path / "items.csv")["text"] == ["1984", "300"]


def test_without_any_text():
    assert load_items(pd.DataFrame({"item_id": [7], "price": [1]}))["text"] == ["7"]


def test_loading_twice_changes_nothing():
    items = load_items(pd.DataFrame({"item_id": [7, 8], "title": ["a", ""], "brand": ["x", "y"]}))
    assert load_items(items).to_dict() == items.to_dict()


def test_duplicates():
    with pytest.raises(DataError, match="item 'a' occurs more than once"):
        load_items(pd.DataFrame({"item_id": ["a", "b", "a"], "title": ["x", "y", "z"]}))
    with pytest.raises(DataError, match="item 1 occurs more than once"):
        load_items(pd.DataFrame({"item_id": [1, 1], "title": ["x", "y"]}))


def test_texts_stay_as_they_are_written(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,title,price\n1,10.50,9.90\n2,007.0,5.00\n3,,1.20\n")
    items = load_items(tmp_path / "items.csv", text_template="{title}: {price}")
    assert items["text"] == ["10.50: 9.90", "007.0: 5.00", "1.20"]
    assert load_items(tmp_path / "items.csv")["text"] == ["10.50", "007.0", "3"]  # a price says not what an item is


class TestColumns:
    def test_by_number(self, tmp_path):
        (tmp_path / "items.csv").write_text("1,Boot\n2,Tent\n")
        (tmp_path / "log.csv").write_text("1,1,1\n1,2,2\n1,1,3\n1,1,4\n")
        assert load_items(tmp_path / "items.csv", columns={"item_id": 0, "title": 1})["text"] == ["Boot", "Tent"]
        data = prepare(
            tmp_path / "log.csv",
            tmp_path / "items.csv",
            tmp_path / "prepared",
            columns={"user_id": 0, "item_id": 1, "timestamp": 2},
            item_columns={"item_id": 0, "title": 1},
        )
        assert data.vocabulary.texts == ["Boot", "Tent"]

    def test_others_than_id_and_title_are_refused(self):
        table = pd.DataFrame({"item_id": [1], "Titel": ["Boot"], "Marke": ["Acme"]})
        with pytest.raises(ConfigurationError, match="columns names 'brand'; .* only item_id and title can be named"):
            load_items(table, columns={"title": "Titel", "brand": "Marke"})
        with pytest.raises(DataError, match="'name' is none of our columns; did you mean 'title' for 'Titel'"):
            load_items(table, columns={"name": "Titel"})

    def test_must_be_a_mapping(self):
        with pytest.raises(ConfigurationError, match="columns='item_id': expected our names with those of the source"):
            load_items(pd.DataFrame({"item_id": [1]}), columns="item_id")
