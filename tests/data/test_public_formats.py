# SPDX-License-Identifier: Apache-2.0
"""Formats that `raw_samples` lacks, in lines written after their documentation."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd4rec_hf.data import load_interactions, load_items
from llmd4rec_hf.data.formats import detect_format
from llmd4rec_hf.data.formats.jsons import _TOKEN, _as_json, _parse_python
from llmd4rec_hf.errors import DataError


def rows(log):
    return list(zip(log["user_id"], log["item_id"], log["timestamp"], strict=True))


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


class TestAmazon:
    def test_2014_metadata_are_python_literals(self, tmp_path):
        path = write(
            tmp_path / "meta.json",
            """{'asin': '0001', 'title': "Kid's \\"big\\" mug", 'categories': [['Home', 'Mugs'], ['Gifts']]}""",
            """{'asin': '0002', 'salesRank': {'Home': 7}, 'title': 'True \\u2661 None', 'brand': None, 'new': True}""",
            """{'asin': '0003', 'related': {'also_bought': ['a']}, 'imUrl': 'http://x/y.jpg'}""",
        )
        assert detect_format(path).name == "amazon"
        items = load_items(path, text_template="{title} ({category})")
        assert items["item_id"] == ["0001", "0002", "0003"]
        assert items["text"] == ['Kid\'s "big" mug (Home, Mugs; Gifts)', "True ♡ None", "http://x/y.jpg"]

    def test_2018_titles_hold_html_and_fields_change_their_type(self, tmp_path):
        path = write(
            tmp_path / "meta.json",
            {"asin": "B1", "title": "<span class='a'>Mug</span> &amp; <b>Cup</b>", "rank": [], "category": ["A", "B"]},
            {"asin": "B2", "title": "Cup <Deluxe Edition>", "rank": "1 in Mugs", "category": []},
            {"asin": "B2", "title": "Cup <Deluxe Edition>", "rank": "1 in Mugs", "category": []},
            {"asin": "B3", "title": "<script>var x = '<b>';</script>Bowl<!-- no -->", "category": ["C"]},
        )
        items = load_items(path, text_template="{title} [{category}]")
        assert items["text"] == ["Mug & Cup [A, B]", "Cup <Deluxe Edition>", "Bowl [C]"]

    def test_2023_times_are_milliseconds_and_the_parent_is_the_item(self, tmp_path):
        review = {"rating": 4.0, "asin": "V1", "parent_asin": "P1", "user_id": "U", "timestamp": 1588687728923}
        path = write(tmp_path / "r.jsonl", review, review | {"asin": "V2", "timestamp": 1588687728000})
        assert rows(load_interactions(path)) == [("U", "P1", 1588687728.0), ("U", "P1", 1588687728.923)]

    def test_a_field_that_changes_its_type_after_the_head(self, tmp_path):
        lines = [{"asin": f"B{i}", "title": "x" * 100, "price": 1} for i in range(12_000)]
        path = write(tmp_path / "meta.json", *lines, {"asin": "C", "title": "last", "price": "$2"})
        items = load_items(path)
        assert items[-1]["text"] == "last"
        assert items[-1]["price"] == "$2"


def test_a_field_that_comes_only_at_the_end(tmp_path):
    lines = [{"item_id": i, "title": "x", "n": i} for i in range(600)]
    path = write(tmp_path / "items.jsonl", *lines, {"item_id": 600, "title": "y", "n": "many", "brand": "Acme"})
    items = load_items(path, text_template="{title} ({brand})")
    assert (items[0]["text"], items[600]["text"]) == ("x", "y (Acme)")
    assert items[600]["n"] == "many"  # what a field is in the first records counts, and it is there


def test_steam_is_parsed_and_never_run(tmp_path):
    review = "{u'username': u'O\\'Neil', u'hours': 0.1, u'product_id': u'725280', u'date': u'2017-12-17', u'text': %s}"
    path = write(
        tmp_path / "steam.json", review % "u\"it's {'username': 'no'} True\"", review % "u'x\\xe9\\n\\U0001f600'"
    )
    assert detect_format(path).name == "steam"
    assert rows(load_interactions(path)) == [("O'Neil", "725280", 1513468800)] * 2
    games = write(
        tmp_path / "games.json",
        "{u'app_name': u'Mill', u'id': u'7', u'genres': [u'Indie']}",
        "{u'app_name': u'No id'}",
    )
    assert load_items(games)["text"] == ["Mill"]
    evil = write(tmp_path / "evil.json", "{'user_id': 1, 'item_id': __import__('os').getpid()}")
    with pytest.raises(DataError):
        load_interactions(evil)
    late = write(tmp_path / "late.json", "{'user_id': 1, 'item_id': 2}", "{'user_id': 1, 'item_id': print(1)}")
    with pytest.raises(DataError, match="neither JSON nor a Python dictionary"):
        load_interactions(late)


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.text() | st.none() | st.booleans()), min_size=1))
@settings(deadline=None, max_examples=200)
def test_any_python_text_survives(records):
    texts = [{**{name: str(value) for name, value in record.items()}, "flag": True} for record in records]
    block = "\n".join(repr(record) for record in texts)
    expected = [{name: record.get(name) for name in ("a", "b", "c")} for record in texts]
    schema = dict.fromkeys(("a", "b", "c"), pa.string())
    assert _parse_python(block, schema, Path("x")).to_pylist() == expected
    assert json.loads(_TOKEN.sub(_as_json, repr(records))) == records


def test_python_literals_are_read_as_fast_as_promised(tmp_path):
    line = (
        "{u'username': u'someone', u'hours': 0.1, u'product_id': u'7', u'date': u'2017-12-17', u'early_access': False}"
    )
    path = write(tmp_path / "steam.json", *[line] * 50_000)
    start = time.perf_counter()
    assert len(load_interactions(path)) == 50_000
    assert time.perf_counter() - start < 5  # about a second; ast.literal_eval alone takes twice that


def test_yelp(tmp_path):
    review = {"review_id": "r", "user_id": "u", "business_id": "b", "stars": 5.0, "date": "2018-07-07 22:09:11"}
    write(tmp_path / "yelp_academic_dataset_review.json", review)
    business = {
        "business_id": "b",
        "name": "Bar",
        "attributes": {"WiFi": "no"},
        "hours": None,
        "categories": "Bars, Food",
    }
    write(tmp_path / "yelp_academic_dataset_business.json", business)
    log = load_interactions(tmp_path)
    assert rows(log) == [("u", "b", 1531001351)]
    assert log["rating"] == [5.0]
    assert load_items(tmp_path, text_template="{title}: {category}")["text"] == ["Bar: Bars, Food"]


class TestE4SRecFolders:
    def test_general_parts_are_joined_user_by_user(self, tmp_path):
        write(tmp_path / "train.txt", "0 5 6", "1 7")
        write(tmp_path / "valid.txt", "1 8", "0 9")
        write(tmp_path / "test.txt", "0 3", "1 4")
        log = load_interactions(tmp_path)
        assert list(zip(log["user_id"], log["item_id"], strict=True)) == [
            (0, 5),
            (0, 6),
            (0, 9),
            (0, 3),
            (1, 7),
            (1, 8),
            (1, 4),
        ]
        assert load_items(tmp_path) is None

    def test_sequential(self, tmp_path):
        folder = tmp_path / "Beauty"
        folder.mkdir()
        write(folder / "Beauty.txt", "1 2 3", "2 3")
        (folder / "embedding.pkl").write_bytes(b"\x80\x04.")
        assert detect_format(folder).name == "e4srec"
        assert load_interactions(folder)["item_id"] == [2, 3, 3]


def test_bigrec_with_times_and_ratings(tmp_path):
    path = write(
        tmp_path / "train.csv",
        "user_id,history_item_id,item_id,history_rating,rating,history_timestamp,timestamp",
        'u,"[\'a\', \'b\']",c,"[5.0, 4.0]",3.0,"[10, 20]",30',
        "v,[],a,[],1.0,[],7",
        "u,\"['a', 'b', 'c']\",d,\"[5.0, 4.0, 3.0]\",2.0,\"[10, 20, 30]\",40",
    )
    log = load_interactions(path)
    assert rows(log) == [("u", "a", 10), ("u", "b", 20), ("u", "c", 30), ("u", "d", 40), ("v", "a", 7)]
    assert log["rating"] == [5.0, 4.0, 3.0, 2.0, 1.0]


class TestTables:
    def test_semicolons_and_bars(self, tmp_path):
        book = '"User-ID";"ISBN";"Book-Rating"\n"276725";"034545104X";"0"\n"276726";"0155061224";"5"\n'
        (tmp_path / "BX.csv").write_bytes(book.encode("latin-1"))
        assert rows(load_interactions(tmp_path / "BX.csv")) == [(276725, "034545104X", 0), (276726, "0155061224", 1)]
        write(tmp_path / "log.txt", "user|item|time", "1|a|5")
        assert rows(load_interactions(tmp_path / "log.txt")) == [(1, "a", 5)]

    def test_a_table_without_a_header_by_column_numbers(self, tmp_path):
        path = write(tmp_path / "ratings.csv", "A39HTATAQ9V7YF,0205616461,5.0,1369699200")
        log = load_interactions(path, columns={"user_id": 0, "item_id": 1, "timestamp": "3"})
        assert rows(log) == [("A39HTATAQ9V7YF", "0205616461", 1369699200)]

    def test_json_array(self, tmp_path):
        path = tmp_path / "log.json"
        path.write_bytes(
            gzip.compress(b'[\n {"user": "a", "item": 1, "x": []},\n {"user": "a", "item": 2, "x": "y"}]')
        )
        assert load_interactions(path)["item_id"] == [1, 2]

    def test_only_the_needed_columns_of_a_parquet_file_are_read(self, tmp_path, monkeypatch):
        datasets.Dataset.from_dict({"user": [1], "item": [2], "review": ["long"]}).to_parquet(tmp_path / "log.parquet")
        asked = []
        import pyarrow.parquet as pq

        read = pq.read_table
        monkeypatch.setattr(
            pq,
            "read_table",
            lambda path, columns, **more: asked.append(columns) or read(path, columns=columns, **more),
        )
        load_interactions(tmp_path / "log.parquet")
        assert asked == [["user", "item"]]

    @pytest.mark.parametrize(("scale", "unit"), [(10**3, "milli"), (10**6, "micro"), (10**9, "nano")])
    def test_finer_times_become_seconds(self, tmp_path, caplog, scale, unit):
        write(tmp_path / "log.csv", "user,item,time", f"1,2,{1_600_000_000 * scale}")
        with caplog.at_level("INFO"):
            assert load_interactions(tmp_path / "log.csv")["timestamp"] == [1_600_000_000]
        assert f"times in {unit}seconds" in caplog.text

    def test_ratings_with_and_without_a_point(self, tmp_path):
        write(tmp_path / "log.csv", "user,item,time,rating", "1,2,3,4", "1,3,4,2.5")
        assert load_interactions(tmp_path / "log.csv")["rating"] == [4.0, 2.5]


LATE = "x" * (1 << 16)  # what comes after it is in no head of a file
RECORD_FILES = {
    "lines": '{{"item_id": 1, "title": "{0}"}}\n{{"item_id": 2, "title": "{1}"}}\n',
    "lines of changing types": '{{"item_id": 1, "title": "{0}"}}\n{{"item_id": "2", "title": "{1}"}}\n',
    "python": "{{'item_id': 1, 'title': '{0}'}}\n{{'item_id': 2, 'title': '{1}'}}\n",
    "array": '[{{"item_id": 1, "title": "{0}"}},\n{{"item_id": 2, "title": "{1}"}}]',
}


@pytest.mark.parametrize("kind", RECORD_FILES)
class TestEncodingsOfRecords:
    def titles(self, path, kind, *titles, encoding="utf-8"):
        path.write_bytes(RECORD_FILES[kind].format(*titles).encode(encoding))
        return detect_format(path).read(path)["title"].to_pylist()

    @pytest.mark.parametrize(("titles", "level"), [(["“Café”", "5 €"], "INFO"), ([LATE, "Café"], "WARNING")])
    def test_windows_1252(self, tmp_path, caplog, kind, titles, level):
        with caplog.at_level("INFO"):
            assert self.titles(tmp_path / "items", kind, *titles, encoding="cp1252") == titles
        assert [record.levelname for record in caplog.records if "reading it as Windows" in record.message] == [level]

    def test_latin_1_where_windows_has_no_such_character(self, tmp_path, caplog, kind):
        with caplog.at_level("INFO"):
            assert self.titles(tmp_path / "items", kind, "Café\x81", "Tee", encoding="latin-1") == ["Café\x81", "Tee"]
        assert "reading it as Latin-1" in caplog.text

    def test_separators_of_unicode_end_no_line(self, tmp_path, kind):
        titles = ["one\u2028two", "three\u0085four"]
        assert self.titles(tmp_path / "items", kind, *titles) == titles

    def test_half_of_an_emoji_is_a_question_mark(self, tmp_path, kind):
        assert self.titles(tmp_path / "items", kind, "cut \\ud83d", "whole") == ["cut ?", "whole"]

    def test_a_byte_order_mark(self, tmp_path, kind):
        assert self.titles(tmp_path / "items", kind, "Café", "Tee", encoding="utf-8-sig") == ["Café", "Tee"]


class TestNames:
    def test_item_names_with_latin_letters_in_movielens(self, tmp_path):
        (tmp_path / "movies.dat").write_bytes("1::Misérables, Les (1995)::Drama\r\n".encode("latin-1"))
        assert load_items(tmp_path / "movies.dat")["text"] == ["Misérables, Les (1995)"]

    def test_a_user_map_without_order_is_read_when_the_format_is_named(self, tmp_path):
        (tmp_path / "x.json").write_text('{"7": [1, 2], "3": [2]}')
        with pytest.raises(DataError, match="format='lcrec' reads them"):
            load_interactions(tmp_path / "x.json")
        assert load_interactions(tmp_path / "x.json", format="lcrec")["item_id"] == [2, 1, 2]


def test_hub_configuration_follows_a_colon(monkeypatch):
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options.get("name")))
        return {"train": datasets.Dataset.from_dict({"user_id": [1], "item_id": [2], "timestamp": [3]})}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows(load_interactions("someone/log:small")) == [(1, 2, 3)]
    assert calls == [("someone/log", "small")]
