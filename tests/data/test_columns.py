# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import datetime
import decimal
import uuid

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from llmd4rec_hf.data import load_interactions
from llmd4rec_hf.data.columns import written_moments
from llmd4rec_hf.errors import DataError


def frame(*triples):
    return pd.DataFrame(triples, columns=["user_id", "item_id", "timestamp"])


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
        assert load_interactions(frame((1.0, 7.0, 1)).astype({"item_id": "float16"}))["item_id"] == [7]

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


class TestTimes:
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
