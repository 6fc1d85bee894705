# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import bz2
import gzip
import lzma
from contextlib import suppress

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from llmd4rec_hf.data import load_interactions, load_items
from llmd4rec_hf.data.formats import FORMATS, detect_format, format_names
from llmd4rec_hf.data.formats.base import infer_types
from llmd4rec_hf.data.formats.tables import CSVFormat, TSVFormat
from llmd4rec_hf.errors import DataError


CONTENTS = {
    "csv": b"user_id,item_id\n1,2\n",
    "tsv": b"user_id\ttitle, long\n1\tx, y\n",
    "jsonl": b'{"user_id": 1, "item_id": "a,b"}\n',
    "semicolon": b"1;2;3,5;1000\n1;3;4;1001\n",
    "s3rec": b"1 2 3\n2 3\n",
    "parquet": None,
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("zipped", [False, True])
def test_exactly_one_format_matches(tmp_path, name, zipped):
    path = tmp_path / "log"
    if name == "parquet":
        pd.DataFrame({"user_id": [1]}).to_parquet(path)
    else:
        path.write_bytes(gzip.compress(CONTENTS[name]) if zipped else CONTENTS[name])
    assert [format.name for format in FORMATS if format.matches(path)] == [name]
    assert detect_format(path).name == name


def test_a_list_between_semicolons_is_a_field_of_csv(tmp_path):
    (tmp_path / "log").write_text("1,Toy Story,Animation;Children;Comedy;Fantasy\n2,Heat,Crime\n")
    assert [format.name for format in FORMATS if format.matches(tmp_path / "log")] == ["csv"]


@pytest.mark.parametrize("name", ["csv", "jsonl", "s3rec"])
def test_a_file_torn_after_its_head(tmp_path, name):
    rng = np.random.default_rng(0)
    first = CONTENTS[name].splitlines(keepends=True)[0]
    line = {"csv": "{},{}\n", "jsonl": '{{"user_id": {}, "item_id": "{}"}}\n', "s3rec": "{} {}\n"}[name]
    more = "".join(line.format(*pair) for pair in rng.integers(1 << 40, size=(50_000, 2)))
    path = tmp_path / "log.gz"
    path.write_bytes(gzip.compress(first + more.encode())[:-300_000])
    with pytest.raises(DataError, match="log.gz: cannot be read .*; check the file"):
        detect_format(path).read(path)


def test_a_name_overrules_the_content(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(CONTENTS["csv"])
    assert detect_format(path, "tsv").name == "tsv"
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match="pickle"):
        detect_format(path, "csv")


def test_names_are_unique():
    assert format_names()[0] == "auto"
    assert len(set(format_names())) == len(format_names()) == len(FORMATS) + 1


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "-20"], pa.int64()),
        (["1", "007"], pa.string()),
        (["1", "+7"], pa.string()),
        (["1", " 7"], pa.string()),
        (["1", ""], pa.string()),
        (["1", str(2**63)], pa.string()),
        (["1.0", "-20.0"], pa.float64()),
        (["1.5", "2.0"], pa.string()),
        (["1.0", "1.00"], pa.string()),
        (["1.0", "007.0"], pa.string()),
        (["1e5", "2e5"], pa.string()),
        (["nan", "inf"], pa.string()),
    ],
)
def test_text_becomes_a_number_only_where_nothing_is_lost(values, kind):
    table = infer_types(pa.table({"x": pa.chunked_array([values[:1], values[1:]])}))
    assert table["x"].type == kind


def test_a_title_may_hold_what_python_ends_lines_at(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"item_id": 1, "title": "a\u2028b"}\n{"item_id": 2, "title": "c\u0085d"}\n')
    assert detect_format(path).name == "jsonl"
    assert detect_format(path).read_items(path)["title"].to_pylist() == ["a\u2028b", "c\u0085d"]


def test_long_lines_do_not_hide_the_format(tmp_path):
    path = tmp_path / "Beauty.txt"
    path.write_text("1 " + " ".join(map(str, range(50_000))) + "\n2 3\n")
    assert detect_format(path).name == "s3rec"
    assert detect_format(path).read(path).num_rows == 50_001


def test_ids_after_a_block_of_numbers_stay_text(tmp_path):
    path = tmp_path / "log.csv"
    lines = "".join(f"1,{row}\n" for row in range(3_000_000))
    path.write_text("user_id,item_id\n" + lines + "1,B0\n")
    assert detect_format(path).read(path)["item_id"].type == pa.string()


UNRECOGNISED = {
    "zip": (b"PK\x03\x04\x00\x00", "zip archive .* unzip it or save it as CSV"),
    "bzip2": (bz2.compress(b"user_id,item_id\n1,2\n"), "compressed: unpack it"),
    "xz": (lzma.compress(b"user_id,item_id\n1,2\n"), "compressed: unpack it"),
    "Arrow": (b"ARROW1\x00\x00\xff", "write its table as parquet or CSV"),
    "UTF-16": ("user,item\n1,2\n".encode("utf-16"), "UTF-16: save it as UTF-8"),
    "JSON by columns, numbers": (b'{"user_id": [1, 1], "item_id": [2, 3]}', "JSON by columns: write one object per"),
    "JSON by columns, texts": (b'{\n "user": ["a"],\n "item": ["x"]}', "JSON by columns"),
    "JSON by columns, pandas": (b'{"asin": {"0": "a"}, "user": {"0": "x"}}', "JSON by columns"),
    "header between blanks": (b"user_id item_id timestamp\n1 10 881250949\n", "a header .* separate them by tabs"),
    "times between blanks": (b"1 10 881250949\n1 11 881250950\n", "a user, an item and a time; write them with tabs"),
    "ratings too": (b"1 10 5 881250949.5\n2 11 4 881250950\n", "format='s3rec' reads them as a user and items"),
    "dates between blanks": (b"u a 2019-10-01\nv b 2019-10-02\n", "a user, an item and a time"),
    "prose": (b"hello\n", "known formats are folder, parquet"),
    "sentences": (b"This is a log of clicks.\nIt begins in May\n", "looks like sentences, of which no word is an id"),
}


@pytest.mark.parametrize("case", UNRECOGNISED)
def test_what_is_not_recognised_is_named_where_one_can_tell(tmp_path, case):
    content, message = UNRECOGNISED[case]
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(DataError, match=f"log: format not recognised; .*{message}"):
        detect_format(tmp_path / "log")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dataset_dict.json", "pass datasets.load_from_disk"),
        ("state.json", "pass datasets.load_from_disk"),
        ("part-00000-abc.csv", "join them to one file"),
        ("part-0.parquet", r'pass datasets.load_dataset\("parquet"'),
    ],
)
def test_a_folder_of_others_is_named(tmp_path, name, message):
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=f"format not recognised; .*{message}"):
        detect_format(tmp_path)


class TestFolderOfParquet:
    log = pd.DataFrame({"user_id": [1, 1], "item_id": ["a", "b"], "rating": [1.0, 2.0]})
    items = pd.DataFrame({"item_id": ["a", "b"], "title": ["A", "B"]})

    def write(self, folder, tables):
        folder.mkdir()
        for name, table in tables.items():
            table.to_parquet(folder / name)
        return folder

    def test_parts_are_one_table_in_their_order(self, tmp_path):
        """As Spark leaves them, with what it leaves beside; numbers need not be padded."""
        parts = {"part.10.parquet": self.log[1:], "part.9.parquet": self.log.astype({"user_id": "int32"})[:1]}
        folder = self.write(tmp_path / "log", parts)
        (folder / "_SUCCESS").touch()
        (folder / ".part.9.parquet.crc").write_bytes(b"crc")
        assert load_interactions(folder)["item_id"] == ["a", "b"]
        assert load_items(folder) is None
        assert detect_format(folder).read(folder, ["rating"]).to_pydict() == {"rating": [1.0, 2.0]}

    def test_a_catalogue_and_a_log_may_be_such_folders(self, tmp_path):
        folder = self.write(tmp_path / "items", {"000000000000": self.items[:1], "000000000001": self.items[1:]})
        assert load_items(folder)["text"] == ["A", "B"]
        whole = tmp_path / "whole"
        whole.mkdir()
        self.write(whole / "interactions.parquet", {"part-0.parquet": self.log})
        folder.rename(whole / "items.parquet")
        assert (load_interactions(whole)["item_id"], load_items(whole)["text"]) == (["a", "b"], ["A", "B"])

    @pytest.mark.parametrize("names", [("test.parquet", "train.parquet"), ("item-0.parquet", "logs-0.parquet")])
    def test_several_tables_are_not_joined(self, tmp_path, names):
        folder = self.write(tmp_path / "log", dict.fromkeys(names, self.log))
        message = rf"log: the files \({names[0]}, {names[1]}\) are not called like the parts of .*; name one, or"
        with pytest.raises(DataError, match=message):
            load_interactions(folder)

    def test_parts_of_different_types_are_refused(self, tmp_path):
        folder = self.write(tmp_path / "log", {"0": self.log, "1": self.log.assign(item_id=[1, 2])})
        with pytest.raises(DataError, match="log: its parts are of different types .*; write them anew"):
            load_interactions(folder)

    @pytest.mark.parametrize("lacking", [0, 1])
    def test_a_part_without_a_column_of_the_others_is_refused(self, tmp_path, lacking):
        """Whichever it is: without times in the first part all would be in the order of the files."""
        parts = [self.log.assign(timestamp=[2, 1]), self.log.assign(timestamp=[4, 3])]
        del parts[lacking]["timestamp"]
        folder = self.write(tmp_path / "log", {str(number): part for number, part in enumerate(parts)})
        with pytest.raises(DataError, match=f"log.{lacking}: .*timestamp"):
            load_interactions(folder)

    def test_a_folder_without_any_is_refused(self, tmp_path):
        (tmp_path / "_SUCCESS").touch()
        with pytest.raises(DataError, match=r"the files \(\) are not called like"):
            load_interactions(tmp_path, format="parquet")


class TestLinesBetweenBlanks:
    def read(self, path, text, format="auto"):
        path.write_text(text)
        return detect_format(path, format).read(path).to_pydict()

    def test_are_read_as_told(self, tmp_path):
        expected = {"user_id": [1, 1], "item_id": [10, 881250949]}
        assert self.read(tmp_path / "log", "1 10 881250949\n", "s3rec") == expected

    def test_ids_may_be_words(self, tmp_path):
        expected = {"user_id": ["ann", "ann", "bob"], "item_id": ["jam", "St.", "tea"]}
        assert self.read(tmp_path / "log", "ann jam St.\nbob tea\n", "s3rec") == expected
        assert self.read(tmp_path / "log", "ann St. jam\nbob tea\n")["user_id"] == ["ann", "ann", "bob"]

    @pytest.mark.parametrize("last", ["3 4\n", "3 4 5\n", "3 4 5 900000000\n"])
    def test_large_ids_are_no_times_where_a_later_line_says_so(self, tmp_path, last):
        text = "1 10 881250949\n" * 30 + last
        assert len(self.read(tmp_path / "log", text)["user_id"]) == 60 + len(last.split()) - 1


class TestQuotes:
    def read(self, path, text):
        path.write_text(text)
        return detect_format(path).read(path).to_pydict()

    @pytest.mark.parametrize(
        ("written", "title"),
        [
            (r'"a \"b\" c"', 'a "b" c'),
            (r'"\"b\""', '"b"'),
            (r'"12\""', '12"'),
            (r'"a ""b"" c"', 'a "b" c'),
            (r'"a\"', "a\\"),  # a backslash of the text
            (r'"a \""b\"""', r"a \"b\""),
            (r"C:\new", r"C:\new"),
        ],
    )
    def test_may_have_a_backslash_before_them(self, tmp_path, caplog, written, title):
        text = f"item_id,title,c\n1,{written},X\n2,b,Y\n"
        assert self.read(tmp_path / "items", text) == {"item_id": [1, 2], "title": [title, "b"], "c": ["X", "Y"]}
        assert not caplog.records

    def test_that_swallow_rows_are_warned_of(self, tmp_path, caplog):
        text = 'user,item,time,device\n1,2,3,"iphone\n1,3,4,b\n1,4,5,"c"\n'
        (tmp_path / "log").write_text(text)
        found = detect_format(tmp_path / "log")
        assert found.read(tmp_path / "log", ["user", "item"]).num_rows == 1  # whatever columns are read
        assert "2 line breaks lie within quotes; if its texts have none, a stray quote has swallowed" in caplog.text

    @pytest.mark.parametrize("delimiter", ["\t", "|"])
    def test_of_a_table_whose_names_all_have_them_are_none_of_its_values(self, tmp_path, delimiter):
        """As R writes it; with a quote in a name or two it is a table of others, which knows none."""
        rows = [['""', '"user_id"', '"title"'], ['"1"', '"u"', r'"a \"b\", c"'], ['"2"', '"v"', "7"]]
        text = "".join(delimiter.join(row) + "\n" for row in rows)
        expected = {"": [1, 2], "user_id": ["u", "v"], "title": ['a "b", c', "7"]}
        assert self.read(tmp_path / "log", text) == expected
        text = text.replace('""', "row")
        assert self.read(tmp_path / "log", text)["row"] == ['"1"', '"2"']

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_blank_lines_are_no_rows_swallowed(self, tmp_path, caplog, end):
        text = "\n\nuser,item\n\n\n1,2\n\n3,4".replace("\n", end)
        assert self.read(tmp_path / "log", text) == {"user": [1, 3], "item": [2, 4]}
        assert not caplog.records


def test_names_of_columns(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text('"user\nid",item_id\n1,2\n')
    assert CSVFormat().read(path, ["item_id", "user\nid"]).to_pydict() == {"item_id": [2], "user\nid": [1]}
    path.write_text('"user"\titem\n1\t2\n')
    assert TSVFormat().read(path, ["item", '"user"']).column_names == ["item", '"user"']
    path.write_bytes("user,café\n".encode() + b"1,2\n" * (1 << 15) + "1,café\n".encode("latin-1"))
    with pytest.raises(DataError, match="log.csv: .*'café'.* as cp1252; save the file as UTF-8"):
        CSVFormat().read(path, ["user", "café"])
    path.write_bytes(b"\x00\x01")
    with pytest.raises(DataError, match="log.csv: holds no lines of text"):
        CSVFormat().read(path)


OTHERS = {
    "table": "user_id,item_id,timestamp\n1,2,3\n",
    "record": '{"user_id": 1, "item_id": 2}\n',
    "map": '{"7": ["a"], "3": ["b"]}',
    "number": "5\n",
    "lines": "1 2 3\n4 5\n",
    "words": "hello world\nfoo\n",
    "colons": "1::a\n2\n",
    "binary": "\x00\x01",
}


@pytest.mark.parametrize("content", OTHERS)
@pytest.mark.parametrize("name", format_names())
def test_a_format_named_for_what_is_in_another_is_at_worst_an_error_of_the_data(tmp_path, name, content):
    (tmp_path / "file").write_text(OTHERS[content])
    for load in (load_interactions, load_items):
        with suppress(DataError):
            load(tmp_path / "file", format=name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bigrec", "no column 'history_item_id', without which it is not bigrec; leave format out"),
        ("dllm2rec", "no column 'seq', without which it is not dllm2rec"),
        ("llara", "line 1 holds no '::' before a name"),
        ("folder", "is a file and no folder"),
    ],
)
def test_a_format_named_for_a_table_is_refused(tmp_path, name, message):
    (tmp_path / "log.csv").write_text(OTHERS["table"])
    with pytest.raises(DataError, match=f"log.csv: {message}"):
        load_interactions(tmp_path / "log.csv", format=name)


def test_lists_of_like_length_between_semicolons_are_fields_of_csv(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("".join(f"1,{item},Action;Comedy;Drama;Foo\n" for item in (10, 11, 12)))
    assert detect_format(path).name == "csv"


def test_what_is_nearly_json_is_no_table_between_blanks(tmp_path):
    path = tmp_path / "log.json"
    path.write_text('{"user_id": 1, "item_id": 2, "timestamp": 3},\n' * 3)
    with pytest.raises(DataError) as error:
        load_interactions(path)
    assert "blanks between its columns" not in str(error.value)
