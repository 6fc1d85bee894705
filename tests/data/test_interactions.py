# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import datetime
import decimal
import gzip
import json
import pickle
import uuid
from collections import Counter

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd4rec_hf.data import describe_interactions, k_core, load_interactions, load_items, tied_timestamp_share
from llmd4rec_hf.data.columns import written_moments
from llmd4rec_hf.errors import ConfigurationError, DataError


CSV = "user_id,item_id,timestamp\nu2,a,30\nu1,b,20\nu1,a,10\n"
SHARED_SETS = ["amazon18_giftcards", "amazon18_office_partial", "amazon_beauty", "amazon_sports_pseudotitle", "lastfm"]
pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=60)


def rows(dataset):
    return list(zip(dataset["user_id"], dataset["item_id"], dataset["timestamp"], strict=True))


def frame(*triples):
    return pd.DataFrame(triples, columns=["user_id", "item_id", "timestamp"])


class TestSources:
    expected = [("u1", "a", 10), ("u1", "b", 20), ("u2", "a", 30)]

    def test_csv_is_sorted_by_user_and_time(self, tmp_path):
        (tmp_path / "log.csv").write_text(CSV)
        log = load_interactions(tmp_path / "log.csv")
        assert rows(log) == self.expected
        assert log.column_names == ["user_id", "item_id", "timestamp"]
        assert log.features["timestamp"].dtype == "int64"

    @pytest.mark.parametrize("name", ["log.csv.gz", "log.csv", "log.data", "log"])
    def test_gzip_and_format_are_found_by_content(self, tmp_path, name):
        (tmp_path / name).write_bytes(gzip.compress(CSV.encode()))
        assert rows(load_interactions(str(tmp_path / name))) == self.expected

    def test_tsv(self, tmp_path):
        (tmp_path / "log.txt").write_text(CSV.replace(",", "\t"))
        assert rows(load_interactions(tmp_path / "log.txt")) == self.expected

    def test_jsonl(self, tmp_path):
        lines = [{"user_id": u, "item_id": i, "timestamp": t, "style": {"x": [1]}} for u, i, t in self.expected]
        (tmp_path / "log.json").write_text("\n".join(map(json.dumps, lines)))
        assert rows(load_interactions(tmp_path / "log.json")) == self.expected

    def test_parquet(self, tmp_path):
        frame(*self.expected).to_parquet(tmp_path / "log.bin")
        assert rows(load_interactions(tmp_path / "log.bin")) == self.expected

    def test_dataframe_and_dataset(self):
        table = frame(*self.expected[::-1])
        assert rows(load_interactions(table)) == self.expected
        dataset = datasets.Dataset.from_pandas(table)
        assert rows(load_interactions(dataset)) == self.expected
        assert rows(load_interactions(dataset.select([2, 1]))) == self.expected[:2]

    def test_the_index_of_a_frame_is_a_column_where_it_has_a_name(self):
        table = frame(*self.expected[::-1])
        for names in ("timestamp", ["user_id", "timestamp"]):
            assert rows(load_interactions(table.set_index(names))) == self.expected
        assert rows(load_interactions(table.set_index("timestamp", drop=False))) == self.expected

    def test_folder(self, tmp_path):
        (tmp_path / "interactions.csv").write_text(CSV)
        assert rows(load_interactions(tmp_path)) == self.expected
        assert load_items(tmp_path) is None
        (tmp_path / "items.tsv").write_text("item_id\ttitle\na\tApple\n")
        assert load_items(tmp_path)["text"] == ["Apple"]

    def test_s3rec_keeps_the_order_of_the_line(self, tmp_path):
        (tmp_path / "Beauty.txt").write_text("2 7 9 7\n\n1 9 8\n")
        log = load_interactions(tmp_path / "Beauty.txt")
        assert list(zip(log["user_id"], log["item_id"], strict=True)) == [(1, 9), (1, 8), (2, 7), (2, 9), (2, 7)]

    def test_one_pair_per_line(self, tmp_path):
        (tmp_path / "Video.txt").write_text("1 30\n1 20\n2 30\n1 10\n")
        assert load_interactions(tmp_path / "Video.txt")["item_id"][:3] == [30, 20, 10]

    def test_hub_id(self, monkeypatch):
        calls = []

        def load_dataset(name, data_files=None, split=None, **options):
            calls.append((name, data_files, options["token"]))
            if data_files:
                raise FileNotFoundError("no such file in the repository")
            return {"train": datasets.Dataset.from_pandas(frame(*self.expected))}

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert rows(load_interactions("someone/log", token="t")) == self.expected
        assert calls == [("someone/log", "interactions.*", "t"), ("someone/log", None, "t")]
        assert load_items("someone/log") is None

    def test_hub_id_without_network(self):
        with pytest.raises(DataError, match="someone/nothing: no such file or folder, nor a Hub dataset"):
            load_interactions("someone/nothing")


class TestColumns:
    def test_guessed_names_are_logged(self, tmp_path, caplog):
        (tmp_path / "log.csv").write_text("reviewerID,asin,overall,unixReviewTime\nu,a,5.0,10\n")
        with caplog.at_level("INFO"):
            log = load_interactions(tmp_path / "log.csv")
        assert log[0] == {"user_id": "u", "item_id": "a", "timestamp": 10, "rating": 5.0}
        assert "taking column 'asin' as item_id" in caplog.text

    def test_named_columns_win_and_bring_extras(self):
        table = pd.DataFrame({"user_id": [1], "who": ["x"], "item": [3], "ts": [5], "device": ["phone"], "noise": [0]})
        log = load_interactions(table, columns={"user_id": "who", "device": "device"})
        assert log[0] == {"user_id": "x", "item_id": 3, "timestamp": 5, "device": "phone"}

    @pytest.mark.parametrize(
        ("lines", "columns", "expected"),
        [
            ("1,0\n1,5\n2,5\n", ["0", "1"], [(1, 0), (1, 5), (2, 5)]),
            ("0,1,2\n0,5,3\n0,7,4\n", ["0", "1", "2"], [(0, 5), (0, 7)]),  # a header, as pandas writes one
            ("1,1193,5,978300760\n1,661,3,978302109\n", ["0", "1", "3"], [(1, 1193), (1, 661)]),
            ("u,i,9\nv,i,8\n", [0, 1, 2], [("u", "i"), ("v", "i")]),
            ("3,2,1\n7,8,9\n", ["1", "0"], [(2, 3), (8, 7)]),
            ("Kunde,Ding\n7,a\n8,b\n", [0, 1], [(7, "a"), (8, "b")]),  # a header: no user is a word but this one
            ("Kunde,Kunde\n7,a\n8,b\n", [0, 1], [(7, "a"), (8, "b")]),
            ("u:token\ti:token\nx\t5\n", [0, 1], [("x", 5)]),
            ("u,i\nv,j\n", [0, 1], [("u", "i"), ("v", "j")]),
            ("u,B0\nv,77\nw,B2\n", [0, 1], [("u", "B0"), ("v", "77"), ("w", "B2")]),
            ("u,i,\nv,j,7\n", [0, 1], [("u", "i"), ("v", "j")]),
            ("u,i\n", [0, 1], [("u", "i")]),
        ],
    )
    def test_columns_by_number(self, tmp_path, lines, columns, expected):
        """Whatever the first line's values are, they may be such numbers themselves; but a header is no row."""
        (tmp_path / "log.csv").write_text(lines)
        names = dict(zip(("user_id", "item_id", "timestamp"), columns, strict=False))
        log = load_interactions(tmp_path / "log.csv", columns=names)
        assert list(zip(log["user_id"], log["item_id"], strict=True)) == expected

    def test_a_name_of_ours_that_is_not_quite_it_is_refused(self):
        """`time` for `timestamp` would be one more column, and the log in the order of the file."""
        table = pd.DataFrame({"nutzer": [1, 1], "ding": [3, 4], "zeit": [9, 5]})
        columns = {"user_id": "nutzer", "item_id": "ding", "time": "zeit"}
        with pytest.raises(DataError, match="'time' is none of our columns; did you mean 'timestamp' for 'zeit'"):
            load_interactions(table, columns=columns)
        columns["timestamp"] = "zeit"
        del columns["time"]
        assert load_interactions(table, columns=columns)["item_id"] == [4, 3]

    def test_a_date_and_a_time_are_no_moment_alone(self):
        table = pd.DataFrame({"user": [1, 1], "item": [3, 4], "Date": ["2019-10-02", "2019-10-01"], "time": [5, 6]})
        with pytest.raises(DataError, match="which of 'Date' and 'time' is the moment.*columns={'timestamp': 'Date'}"):
            load_interactions(table)
        assert load_interactions(table, columns={"timestamp": "Date"})["item_id"] == [4, 3]
        assert load_interactions(table, columns={"timestamp": "time"})["item_id"] == [3, 4]
        assert load_interactions(table.assign(unix_time=[8, 7]))["timestamp"] == [7, 8]

    @pytest.mark.parametrize(
        "days",
        [
            ["2019-10-01", "2019-10-01"],
            [20191001, 20191001],
            pd.to_datetime(["2019-10-01", "2019-10-01"]),
            [datetime.date(2019, 10, 1)] * 2,
            pd.Categorical(["2019-10-01", "2019-10-01"]),
        ],
    )
    @pytest.mark.parametrize(
        "clocks", [["13:45", "9:30:10.5"], [datetime.time(13, 45), datetime.time(9, 30, 10, 500_000)]]
    )
    def test_a_day_and_a_clock_are_a_moment_together(self, days, clocks):
        table = pd.DataFrame({"user": [1, 1], "item": [3, 4], "Date": days, "TIME": clocks})
        log = load_interactions(table)
        assert (log["item_id"], log["timestamp"]) == ([4, 3], [1569922210.5, 1569937500.0])
        assert log.column_names == ["user_id", "item_id", "timestamp"]

    @pytest.mark.parametrize("clock", ["2019-10-01 13:45", "noon", "1345", datetime.datetime(2019, 10, 1), 5.5, b"x"])
    def test_what_is_no_clock_beside_a_day_is_asked_for(self, clock):
        table = pd.DataFrame({"user": [1, 1], "item": [3, 4], "date": ["2019-10-01"] * 2, "time": [clock] * 2})
        with pytest.raises(DataError, match="which of 'date' and 'time' is the moment"):
            load_interactions(table)

    @pytest.mark.parametrize("name", ["readAt", "session_day", "listentime", "dt", "step", "order_number"])
    def test_times_by_a_name_of_their_own_are_asked_for(self, caplog, name):
        """In the order of a file that lies otherwise, all would be learnt backwards."""
        table = pd.DataFrame({"user": [1, 1], "item": [3, 4], "candidates": [1, 2], "lat": [1, 2], name: [9, 5]})
        assert load_interactions(table)["item_id"] == [3, 4]
        assert f"the order of the file is kept; if {name!r} holds the times, say so: columns=" in caplog.text
        caplog.clear()
        assert load_interactions(table, columns={"timestamp": name})["item_id"] == [4, 3]
        load_interactions(table.drop(columns=name))
        assert not caplog.records

    def test_an_exact_time_goes_before_a_day(self):
        table = pd.DataFrame({"user": [1, 1], "item": [3, 4], "date": [20220408] * 2, "time_ms": [9e12, 8e12]})
        assert load_interactions(table)["item_id"] == [4, 3]

    def test_ids_keep_leading_zeros(self, tmp_path):
        (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n1,0012,1\n1,34,2\n")
        assert load_interactions(tmp_path / "log.csv")["item_id"] == ["0012", "34"]

    def test_ratings_with_decimal_commas_are_numbers(self, tmp_path):
        (tmp_path / "log.csv").write_text("user_id;item_id;rating\n1;2;4,5\n1;3;4\n1;4;-0,25\n")
        assert load_interactions(tmp_path / "log.csv")["rating"] == [4.5, 4.0, -0.25]
        (tmp_path / "log.csv").write_text("user_id;item_id;rating\n1;2;1,500\n1;3;4\n")  # thousands, perhaps
        assert load_interactions(tmp_path / "log.csv")["rating"] == ["1,500", "4"]

    def test_ids_that_look_like_decimals_keep_every_digit(self, tmp_path):
        (tmp_path / "log.csv").write_text("user_id,item_id,timestamp,rating\n1.0,10.10,1.5,4.5\n2.0,10.1,2.5,3.0\n")
        log = load_interactions(tmp_path / "log.csv")
        assert (log["user_id"], log["item_id"]) == ([1, 2], ["10.10", "10.1"])
        assert (log["timestamp"], log["rating"]) == ([1.5, 2.5], [4.5, 3.0])

    @pytest.mark.parametrize("name", ["NULL", "\\N", "nan", "None", "<NA>", "NA", "N/A"])
    def test_an_id_that_often_stands_for_none_is_warned_of_and_stays(self, tmp_path, caplog, name):
        (tmp_path / "log.csv").write_text(f"user_id,item_id,timestamp\n{name},a,1\nu,b,2\n{name},c,3\n")
        assert load_interactions(tmp_path / "log.csv")["user_id"].count(name) == 2
        assert f"column 'user_id': 2 rows have the id {name!r}, which often stands for none" in caplog.text

    @pytest.mark.parametrize(
        ("name", "advice"),
        [
            (" b", "whose blanks or quotes are part of it"),
            ("b ", "whose blanks or quotes are part of it"),
            ("'b'", "whose blanks or quotes are part of it"),
            ('"b"', "whose blanks or quotes are part of it"),
            ("8.71E+11", "as spreadsheets round long numbers, and several may have become one"),
            ("9,4E+12", "as spreadsheets round long numbers"),
            ("[3, 4]", "a list that counts as one; write a row for each of its ids"),
        ],
    )
    def test_an_id_that_was_written_by_accident_is_warned_of_and_stays(self, caplog, name, advice):
        for odd, count in (("'Til Tuesday", 0), ('12"', 0), ("5E+", 0), ("[x]", 0), (name, 1)):
            assert load_interactions(frame(("u", "a", 1), ("u", odd, 2)))["item_id"] == ["a", odd]
            assert len(caplog.records) == count
        assert f"column 'item_id': 1 rows have the id {name!r}, {advice}" in caplog.text

    def test_ids_that_pandas_made_floats_beside_texts_are_what_the_texts_say(self):
        """Of a file read in parts, one with gaps has floats and one with letters has texts."""
        table = frame((17850.0, "a", 1), ("17850", "b", 2), ("C1", "c", 3), (2.5, "d", 4))
        assert load_interactions(table)["user_id"] == ["17850", "17850", "2.5", "C1"]

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([decimal.Decimal("7"), decimal.Decimal("8")], [7, 8]),
            ([decimal.Decimal("7.0000000000"), decimal.Decimal("8.0000000000")], [7, 8]),
            ([decimal.Decimal(10**20), decimal.Decimal(8)], [str(10**20), "8"]),
            ([b"a", "café".encode()], ["a", "café"]),
            ([uuid.UUID(int=1), uuid.UUID(int=2)], [str(uuid.UUID(int=1)), str(uuid.UUID(int=2))]),
        ],
    )
    def test_ids_as_databases_give_them(self, values, expected):
        """Numbers of Snowflake and Oracle are decimals, strings of Impala bytes, keys of PostgreSQL UUIDs."""
        table = pd.DataFrame({"user_id": [1, 1], "item_id": values, "timestamp": [1, 2]})
        assert load_interactions(table)["item_id"] == expected

    def test_ids_that_pandas_made_floats_are_integers_again(self):
        assert load_interactions(frame((1.0, 16713.0, 1)))["item_id"] == [16713]

    def test_mixed_ids_become_strings(self):
        assert load_interactions(frame((1, "a", 1), ("1", "b", 2)))["user_id"] == ["1", "1"]
        with pytest.raises(DataError, match="row 3 has no id"):
            load_interactions(frame((1, "a", 1), ("1", "b", 2), (pd.NA, "c", 3)))

    def test_unsigned_hashes_survive(self):
        table = pa.table({"user_id": pa.array([2**64 - 1], pa.uint64()), "item_id": [1], "timestamp": [1]})
        assert load_interactions(datasets.Dataset(table))["user_id"] == [str(2**64 - 1)]

    def test_categories(self):
        table = frame((1, "a", 1), (1, "b", 2)).astype({"item_id": "category"})
        assert load_interactions(table)["item_id"] == ["a", "b"]

    def test_latin_1_and_byte_order_mark(self, tmp_path):
        (tmp_path / "latin.csv").write_bytes("user_id,item_id,timestamp\n1,Café,1\n".encode("latin-1"))
        assert load_interactions(tmp_path / "latin.csv")["item_id"] == ["Café"]
        (tmp_path / "header.csv").write_bytes("client,café,année\n1,2,1\n".encode("latin-1"))
        columns = {"user_id": "client", "item_id": "café", "timestamp": "année"}
        assert load_interactions(tmp_path / "header.csv", columns=columns)["item_id"] == [2]
        (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbfuser_id,item_id,timestamp\n007,1,1\n")
        assert load_interactions(tmp_path / "bom.csv")["user_id"] == ["007"]


class TestOrder:
    def test_ties_keep_file_order(self):
        log = load_interactions(frame((1, 9, 5), (2, 1, 5), (1, 3, 5), (1, 7, 4), (1, 5, 5)))
        assert log["item_id"] == [7, 9, 3, 5, 1]
        assert tied_timestamp_share(log) == 3 / 5

    @given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=50))
    @settings(deadline=None, max_examples=30)
    def test_sorting_is_what_a_stable_sort_gives(self, keys):
        triples = [(user, row, time) for row, (user, time) in enumerate(keys)]
        assert rows(load_interactions(frame(*triples))) == sorted(triples, key=lambda row: (row[0], row[2]))

    def test_position_orders_without_a_clock(self):
        table = pd.DataFrame({"user_id": [1, 1], "item_id": ["b", "a"], "position": [1, 0]})
        log = load_interactions(table)
        assert log["item_id"] == ["a", "b"]
        assert log["timestamp"] == log["position"] == [0, 1]

    def test_a_log_without_a_clock_gets_none_by_going_round(self):
        log = load_interactions(pd.DataFrame({"user_id": [2, 1, 2], "item_id": [5, 6, 4]}))
        for again in (log, log.to_pandas()):
            assert load_interactions(again).to_dict() == log.to_dict()
        clock = pd.DataFrame({"user_id": [1, 1], "item_id": [5, 6], "timestamp": [70, 80], "position": [0, 1]})
        assert load_interactions(clock).column_names == ["user_id", "item_id", "timestamp"]

    def test_file_order_without_anything(self):
        log = load_interactions(pd.DataFrame({"user_id": [2, 1, 2], "item_id": [5, 6, 4]}))
        assert rows(log) == [(1, 6, 1), (2, 5, 0), (2, 4, 2)]

    @pytest.mark.parametrize(
        ("numbers", "finer", "form"),
        [
            (np.arange(20230000, 20250000), 1, "%Y%m%d"),
            (19000101 * 10**4 + np.arange(0, 10**4), 10**4, "%Y%m%d%H%M"),
            (20240229 * 10**6 + np.arange(0, 10**6, 99), 10**6, "%Y%m%d%H%M%S"),
        ],
    )
    def test_dates_written_as_numbers_are_those_that_pandas_reads(self, numbers, finer, form):
        expected = pd.to_datetime(numbers.astype(str), format=form, errors="coerce")
        moments, real = written_moments(numbers, finer)
        assert (real == expected.notna()).all()
        assert (moments[real] == (expected[real] - pd.Timestamp(0)) // pd.Timedelta(seconds=1)).all()

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            (["2015-03-02 00:00:10", "2015-03-02 00:00:11"], [1425254410, 1425254411]),
            (["2015-03-02T00:00:10Z", "2015-03-02T00:00:11Z"], [1425254410, 1425254411]),
            ([datetime.datetime(2015, 3, 2), datetime.datetime(2015, 3, 3)], [1425254400, 1425340800]),
            ([datetime.date(2015, 3, 2), datetime.date(2015, 3, 3)], [1425254400, 1425340800]),
            (pd.Categorical(["2015-03-02", "2015-03-03"]), [1425254400, 1425340800]),
            (pd.Categorical([7, 8]), [7, 8]),
            ([decimal.Decimal("1.5"), decimal.Decimal("2.0")], [1.5, 2.0]),
            ([1.5, 2.0], [1.5, 2.0]),
            ([1.0, 2.0], [1, 2]),
            (["8.5e8", "9e8"], [850000000, 900000000]),
            ([20170714, 20170715], [1499990400, 1500076800]),
            ([20170714, 20170799], [20170714, 20170799]),
            (["20170714", "20170715"], [1499990400, 1500076800]),
            ([201707140001, 201707150000], [1499990460, 1500076800]),
            (["20170714000001", "20170715000000"], [1499990401, 1500076800]),
            ([" 5", "6 "], [5, 6]),
            (["2015-03-02 00:00:10 UTC", "2015-03-02 00:00:11.000 UTC "], [1425254410, 1425254411]),
            (["2015-03-02 01:00:10.000 +0100", "2015-03-01 16:00:11.000 -08:00"], [1425254410, 1425254411]),
            (["2015-03-02 00:00:10.123456789", "2015-03-02 00:00:11.000000001"], [1425254410.123456, 1425254411.0]),
            (["2015-03-02 00:00:10.500000000Z", "2015-03-02 00:00:11.000000000Z"], [1425254410.5, 1425254411.0]),
        ],
    )
    def test_times(self, values, expected):
        log = load_interactions(pd.DataFrame({"user_id": [1, 1], "item_id": [1, 2], "timestamp": values}))
        assert log["timestamp"] == expected
        assert type(log["timestamp"][0]) is type(expected[0])


BAD_FILES = {
    "empty": (b"", "file is empty"),
    "header only": (b"user_id,item_id,timestamp\n", "holds no interactions"),
    "no item column": (b"user_id,price\n1,2\n", "no column for item_id among 'user_id', 'price'"),
    "no header": (b"1,2,3\n4,5,6\n", "first line must name the columns, or say which it is, by its number from 0"),
    "no header, twice": (b"5,5,3\n4,5,6\n", "'5' occurs more than once; rename one of them, or give numbers from 0"),
    "missing id": (b"user_id,item_id,timestamp\n1,a,1\n1,,2\n", "column 'item_id': row 2 has no id"),
    "negative time": (b"user_id,item_id,timestamp\n1,a,1\n1,b,-2\n", "column 'timestamp': row 2 holds -2"),
    "empty time": (b"user_id,item_id,timestamp\n1,a,1\n1,b,\n", "column 'timestamp': row 2 holds ''"),
    "word as time": (b"user_id,item_id,timestamp\n1,a,1\n1,b,soon\n", "row 2 holds 'soon'"),
    "impossible date": (b"user_id,item_id,timestamp\n1,a,2020-01-01\n1,b,2020-13-01\n", "row 2 holds '2020-13-01'"),
    "infinite time": (b"user_id,item_id,timestamp\n1,a,1\n1,b,inf\n", "row 2 holds inf"),
    "ragged row": (b"user_id,item_id,timestamp\n1,a,1\n1,b\n", "Expected 3 columns, got 2"),
    "doubled column": (b"user_id,item_id,item_id\n1,a,1\n", "'item_id' occurs more than once"),
    "rows in one id": (b'user_id,item_id,timestamp\n1,"a,1\n1,b",2\n', "row 1 holds 'a,1\\n1,b', an id with a line"),
    "pickle": (pickle.dumps({"user_id": [1]}), "this is a pickle"),
    "old pickle": (pickle.dumps([1, 2], protocol=0), "this is a pickle"),
    "zipped pickle": (gzip.compress(pickle.dumps([1])), "this is a pickle"),
    "zip": (b"PK\x03\x04\x00\x00", "format not recognised"),
    "prose": (b"hello\n", "format not recognised"),
    "torn JSON array": (b'[{"user_id": 1, "item_id": 2}', "not valid JSON"),
    "JSON array of numbers": (b'[{"user_id": 1, "item_id": 2}, 3]', "elements are all objects; write one"),
    "broken JSON": (b'{"user_id": 1, "item_id": 2}\n{"user_id": 1', "not valid JSON lines"),
    "broken parquet": (b"PAR1abc", "damaged parquet"),
    "torn gzip": (gzip.compress(CSV.encode() * 50)[:40], "cannot be read"),
}


class TestBadInput:
    @pytest.mark.parametrize("case", BAD_FILES)
    def test_file(self, tmp_path, case):
        content, message = BAD_FILES[case]
        path = tmp_path / "log.csv"
        path.write_bytes(content)
        with pytest.raises(DataError) as error:
            load_interactions(path)
        assert message in str(error.value)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            (frame((1, 2, np.nan), (1, 3, 4)), "row 1 has no time"),
            (frame((1, 2, 3), (None, 3, 4)), "row 2 has no id"),
            (frame((1, 2, 1_600_000_000_000), (1, 3, 0)), "row 2 holds 0 and row 1 1600000000000, .* different units"),
            (frame((1, 2, 1_600_000_000), (1, 3, 1_600_000_000_000)), "row 1 holds 1600000000 and row 2"),
            (frame((1, 2, "2020-01-01 00:00:00Z"), (1, 3, "2020-01-01 00:00:00")), "some dates name a time zone"),
            (frame((1, 2, "2019-10-01T12Z"), (1, 3, "2019-10-02")), "some dates name a time zone"),
            (
                frame((1, 2, "2019-10-01"), (1, 3, "2019/10/01")),
                "row 2 holds '2019/10/01', which is neither a number nor",
            ),
            (
                frame((1, 2, "2019-10-01"), (1, 3, "2019-10")),
                "row 2 holds '2019-10', which is neither a number nor an",
            ),
            (frame((1, 2, datetime.time(9, 30))), r"type time64\[us\] is no moment"),
            (frame((1, 2, True)), "type bool is no moment"),
            (frame((1, 2, datetime.timedelta(3))), r"type duration\[us\] is no moment"),
            (frame((1, 2, 19690101), (1, 3, 19700101)), "row 1 holds 19690101, which is no time"),
            (frame((1, 2, 20170131), (1, 3, 20170231), (1, 4, 20170301)), "row 2 holds 20170231, which is no date"),
            (frame((1, 2, 20170131235959), (1, 3, 20170131240000), (1, 4, 20170301000000)), "row 2 .* is no date"),
            (frame((1, 2, 3), (1, "", 4)), "row 2 has no id"),
            (frame((1, 1.0, 3), (1, 1.5, 4)), "row 2 holds 1.5; ids must be integers or strings"),
            (frame((1, 2.0**53, 3)), "row 1 holds 9007199254740992.0; ids must be integers or strings"),
            (frame((1, np.float32(2**24), 3)).astype({"item_id": "float32"}), "row 1 holds 16777216.0; ids must be"),
            (frame((1, decimal.Decimal("1.5"), 3)), r"type decimal128\(2, 1\) cannot be an id"),
            (frame((1, b"\xff", 3)), "type binary cannot be an id"),
            (frame((1, {"$oid": "5"}, 3)), "type struct<.*> cannot be an id; ids must be integers or strings"),
            (frame((1, True, 3)), "type bool cannot be an id"),
            (frame((1, (1, 2), 3)), r"cannot be an id; write a row for each \(pandas: explode\)"),
            (
                frame((1, 2, "1/2/2020"), (1, 3, "1/3/2020")),
                r"'1/2/2020', .*; write all so \(pandas.to_datetime reads",
            ),
            (frame(), "holds no interactions"),
        ],
    )
    def test_table(self, table, message):
        with pytest.raises(DataError, match=message):
            load_interactions(table)

    @pytest.mark.parametrize("source", ["nowhere.csv", "some/where.csv", "/no/such/folder"])
    def test_wrong_path(self, source):
        with pytest.raises(DataError, match="no such file or folder; check the path"):
            load_interactions(source)

    def test_wrong_arguments(self, tmp_path):
        (tmp_path / "log.csv").write_text(CSV)
        with pytest.raises(ConfigurationError, match="format 'cvs' is unknown; choose one of auto, folder"):
            load_interactions(tmp_path / "log.csv", format="cvs")
        with pytest.raises(DataError, match="no column 'uid' .for 'user_id'.; it has user_id, item_id"):
            load_interactions(tmp_path / "log.csv", columns={"user_id": "uid"})
        with pytest.raises(DataError, match="from list; pass a path"):
            load_interactions([1, 2])

    def test_short_line(self, tmp_path):
        (tmp_path / "log.txt").write_text("1 2 3\n" * 30 + "7\n")
        with pytest.raises(DataError, match="line 31 holds a user and no item"):
            load_interactions(tmp_path / "log.txt")

    def test_folder(self, tmp_path):
        with pytest.raises(DataError, match="the folder is empty"):
            load_interactions(tmp_path)
        (tmp_path / "notes").touch()
        with pytest.raises(DataError, match="format not recognised"):
            load_interactions(tmp_path)
        (tmp_path / "notes").unlink()
        (tmp_path / "interactions.csv").write_text(CSV)
        (tmp_path / "interactions.csv.gz").write_bytes(gzip.compress(CSV.encode()))
        with pytest.raises(DataError, match="holds interactions.csv, interactions.csv.gz; keep one"):
            load_interactions(tmp_path)


class TestKCore:
    def test_by_hand(self):
        # Item c has one interaction; without it user 3 has one, and without user 3 item a still has two.
        log = load_interactions(frame((1, "a", 0), (1, "b", 1), (2, "a", 0), (2, "b", 1), (3, "a", 0), (3, "c", 1)))
        assert rows(k_core(log, 2, 2)) == [(1, "a", 0), (1, "b", 1), (2, "a", 0), (2, "b", 1)]

    @given(pairs, st.integers(1, 4), st.integers(1, 4))
    @settings(deadline=None, max_examples=60)
    def test_is_the_largest_fixed_point(self, rows, k_user, k_item):
        expected = rows
        while True:
            users, items = Counter(u for u, _ in expected), Counter(i for _, i in expected)
            kept = [(u, i) for u, i in expected if users[u] >= k_user and items[i] >= k_item]
            if kept == expected:
                break
            expected = kept
        log = load_interactions(pd.DataFrame(rows, columns=["user_id", "item_id"]))
        if not expected:
            with pytest.raises(DataError, match="no interaction is left"):
                k_core(log, k_user, k_item)
            return
        core = k_core(log, k_user, k_item)
        assert Counter(zip(core["user_id"], core["item_id"], strict=True)) == Counter(expected)
        again = k_core(core, k_user, k_item)
        assert again["timestamp"] == core["timestamp"]


class TestDescribe:
    log = frame(("u", "a", 1), ("u", "b", 1), ("u", "a", 2), ("v", "c", 7))

    def test_counts(self):
        counts = describe_interactions(load_interactions(self.log))
        digest = counts.pop("hash")
        assert len(digest) == 64
        assert counts == {
            "users": 2, "items": 3, "interactions": 4, "density": 4 / 6, "median_length": 2.0, "max_length": 3,
            "tie_share": 0.5, "repeat_share": 0.25,
        }  # fmt: skip

    def test_hash_does_not_depend_on_storage(self, tmp_path):
        table = frame((2, 10, 1), (2, 9, 1), (10, 9, 2), (10, 11, 3))
        table.to_csv(tmp_path / "log.csv", index=False)
        table.astype({"user_id": "int32", "timestamp": "float64"}).to_parquet(tmp_path / "log.parquet")
        text = table.astype({"user_id": str, "item_id": str})
        shuffled = datasets.Dataset.from_pandas(table.iloc[[3, 0, 2, 1]])
        sources = [table, tmp_path / "log.csv", tmp_path / "log.parquet", text, shuffled]
        assert len({describe_interactions(load_interactions(source))["hash"] for source in sources}) == 1

    def test_hash_without_a_clock_is_that_of_the_order(self, tmp_path):
        (tmp_path / "log.txt").write_text("1 5 6\n2 6\n")
        table = pd.DataFrame({"user_id": [1, 1, 2], "item_id": [5, 6, 6], "position": [0, 1, 0]})
        first, second = load_interactions(tmp_path / "log.txt"), load_interactions(table)
        assert describe_interactions(first)["hash"] == describe_interactions(second)["hash"]

    @pytest.mark.parametrize("change", [{"user_id": "w"}, {"item_id": "b"}, {"timestamp": 8}])
    def test_hash_sees_every_change(self, change):
        changed = self.log.copy()
        for name, value in change.items():
            changed.loc[3, name] = value
        first, second = (describe_interactions(load_interactions(log))["hash"] for log in (self.log, changed))
        assert first != second

    def test_needs_a_log(self):
        with pytest.raises(DataError, match="no column 'timestamp'"):
            describe_interactions(datasets.Dataset.from_dict({"user_id": [1], "item_id": [1]}))
        with pytest.raises(DataError, match="expected a datasets.Dataset, got DataFrame"):
            describe_interactions(self.log)


class TestSharedSets:
    @pytest.mark.parametrize("name", [*SHARED_SETS, "ml-100k"])
    def test_counts(self, shared, name):
        folder = shared / "data" / name
        expected = json.loads((folder / "stats.json").read_text())
        counts = describe_interactions(load_interactions(folder))
        assert counts["users"] == expected["users"]
        assert counts["items"] == expected["items_interacted"]
        assert counts["interactions"] == expected["interactions"]
        assert counts["median_length"] == expected["seq_len_median"]
        assert len(load_items(folder)) == expected["items_in_catalogue"]

    def test_s3rec_text_is_the_prepared_log(self, shared):
        text = load_interactions(shared / "data/raw_samples/s3rec.Beauty.txt").to_pandas()
        prepared = load_interactions(shared / "data/amazon_beauty").to_pandas()
        items, expected = (log.groupby("user_id")["item_id"].agg(list) for log in (text, prepared))
        complete = items.index[:-1]  # the sample may end inside a line
        assert items[complete].tolist() == expected[complete].tolist()

    def test_pickled_frames_are_refused(self, shared):
        with pytest.raises(DataError, match="this is a pickle"):
            load_interactions(shared / "data/raw_samples/llara.lastfm.Test_data.df")
