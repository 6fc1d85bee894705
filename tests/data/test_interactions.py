# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import datetime
import decimal
import gzip
import json
import pickle
from collections import Counter

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd4rec_hf.data import describe_interactions, k_core, load_interactions, load_items, tied_timestamp_share
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
            (
                frame((1, 2, 3)).astype({"timestamp": "timedelta64[us]"}),
                r"type duration\[us\] is no moment",
            ),
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
