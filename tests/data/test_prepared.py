# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pandas as pd
import pytest

from llmd4rec_hf.data import (
    ItemVocabulary,
    data_hash,
    describe_interactions,
    k_core,
    load_interactions,
    load_items,
    load_prepared,
    make_demo,
    prepare,
    split_leave_one_out,
)
from llmd4rec_hf.data.prepared import is_prepared
from llmd4rec_hf.errors import ConfigurationError, DataError


@pytest.fixture(scope="module")
def demo():
    return make_demo(num_users=120, num_items=60)


@pytest.fixture
def files(demo, tmp_path):
    log, items = tmp_path / "log.csv", tmp_path / "meta.jsonl"
    demo[0].to_pandas().to_csv(log, index=False)
    demo[1].select_columns(["item_id", "title", "brand"]).to_json(items)
    return log, items


def test_the_folder_holds_what_the_steps_give(demo, tmp_path):
    prepared = prepare(*demo, tmp_path, k_user=5, k_item=5, with_floors=False)
    log = k_core(demo[0], 5, 5)
    vocabulary = ItemVocabulary.from_interactions(log, demo[1])
    sequences = split_leave_one_out(log, vocabulary)
    assert prepared.vocabulary == vocabulary
    assert {name: data_hash(rows) for name, rows in prepared.sequences.items()} == {
        name: data_hash(rows) for name, rows in sequences.items()
    }
    assert describe_interactions(prepared.interactions)["hash"] == prepared.card["log"]["hash"]
    assert prepared.card["prepared"] == {"split": "leave_one_out", "k_user": 5, "k_item": 5}
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == {
        "interactions.parquet", "items.parquet", "vocabulary.json", "sequences", "data_card.json", "data_card.md",
        "prepared.json",
    }  # fmt: skip


def test_sequences_are_mapped_and_not_read(demo, tmp_path):
    sequences = prepare(*demo, tmp_path, with_floors=False).sequences
    for rows in sequences.values():
        assert rows.cache_files  # empty for data in memory


def test_the_folder_is_a_data_set_like_any_other(demo, tmp_path):
    prepared = prepare(*demo, tmp_path, text_template="{brand}: {title}", max_text_length=600, with_floors=False)
    assert load_interactions(tmp_path).to_dict() == demo[0].to_dict()
    assert load_items(tmp_path)["text"] == prepared.items["text"]
    assert ": " in load_items(tmp_path)["text"][0]
    again = prepare(tmp_path, output_dir=tmp_path / "again", with_floors=False)
    assert again.vocabulary == prepared.vocabulary


def test_a_log_without_a_clock_stays_one(tmp_path):
    table = pd.DataFrame({"user_id": [1, 1, 1, 1, 2, 2, 2], "item_id": [3, 1, 2, 3, 2, 1, 3]})
    prepared = prepare(table, output_dir=tmp_path, with_floors=False)
    assert load_interactions(tmp_path).column_names == ["user_id", "item_id", "timestamp", "position"]
    assert describe_interactions(prepared.interactions)["hash"] == prepared.card["log"]["hash"]


class TestCache:
    def test_the_same_again_does_nothing(self, files, tmp_path, monkeypatch):
        first = prepare(*files, tmp_path / "out")
        monkeypatch.setattr("llmd4rec_hf.data.prepared.load_interactions", None)  # fails if it is called
        assert prepare(*files, tmp_path / "out").card == first.card

    def test_moved_files_are_the_same_and_changed_ones_are_not(self, files, tmp_path, caplog):
        out = tmp_path / "out"
        options = {"with_floors": False}
        prepare(*files, out, **options)
        moved = files[0].rename(tmp_path / "moved.csv")
        with caplog.at_level("INFO"):
            prepare(moved, files[1], out, **options)
        assert "holds this data already" in caplog.text
        for change in (
            lambda: moved.write_text("\n".join(moved.read_text().splitlines()[:-1]) + "\n"),
            lambda: options.update(k_user=4),
            lambda: options.update(text_template="{brand}"),
            lambda: files[1].write_text(files[1].read_text().replace("Tallow", "Ochre")),
        ):
            before = json.loads((out / "prepared.json").read_text())
            change()
            prepare(moved, files[1], out, **options)
            assert json.loads((out / "prepared.json").read_text()) != before

    def test_tables_go_by_their_values(self, demo, tmp_path):
        frame = demo[0].to_pandas()
        keys = set()
        for source in (frame, frame.copy(), demo[0], demo[0].select(range(len(frame))), frame.iloc[:-1]):
            prepare(source, output_dir=tmp_path, with_floors=False)
            keys.add(json.loads((tmp_path / "prepared.json").read_text())["key"])
        assert len(keys) == 3  # frames, data sets, and the one that lacks a row

    def test_without_a_folder_it_goes_to_the_cache_of_datasets(self, files, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        first = prepare(*files, with_floors=False)
        assert first.folder.is_relative_to(tmp_path / "cache")
        assert prepare(*files, with_floors=False).folder == first.folder
        assert prepare(*files, with_floors=False, k_user=4).folder != first.folder

    def test_the_source_is_never_written_over(self, files, tmp_path):
        (tmp_path / "raw").mkdir()
        log = files[0].rename(tmp_path / "raw" / "interactions.csv")
        before = log.read_bytes()
        for source in (log, tmp_path / "raw"):
            with pytest.raises(ConfigurationError, match="give another output_dir"):
                prepare(source, output_dir=tmp_path / "raw", with_floors=False)
        out = prepare(log, output_dir=tmp_path / "out", with_floors=False).folder
        with pytest.raises(ConfigurationError, match="give another output_dir"):
            prepare(out, output_dir=out, with_floors=False, max_history=5)
        assert log.read_bytes() == before
        assert load_prepared(out).card["prepared"] == {"split": "leave_one_out"}

    def test_a_folder_at_home(self, files, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert prepare(*files, "~/data", with_floors=False).folder == tmp_path / "data"
        assert is_prepared("~/data") and not is_prepared("~") and not is_prepared(None)

    def test_data_that_was_prepared_anew_is_not_taken_for_the_old(self, demo, tmp_path):
        """Its vocabulary would be of other items than its sequences."""
        before = prepare(*demo, tmp_path, with_floors=False)
        prepare(*demo, tmp_path, with_floors=False, max_history=4)
        with pytest.raises(DataError, match="prepared again with other options"):
            before.sequences  # noqa: B018
        assert load_prepared(tmp_path).card["prepared"]["max_history"] == 4

    def test_options_of_numpy_and_pandas(self, demo, tmp_path):
        options = {"start_time": pd.Timestamp("1971-01-01"), "k_user": np.int64(2), "with_floors": False}
        first = prepare(*demo, tmp_path, **options)
        assert first.card["prepared"]["k_user"] == 2
        assert first.card["prepared"]["start_time"] == "1971-01-01 00:00:00"

    def test_a_catalogue_with_lists(self, tmp_path):
        log = pd.DataFrame({"user_id": [1] * 4 + [2] * 4, "item_id": [1, 2, 3, 4] * 2, "timestamp": range(8)})
        items = pd.DataFrame({"item_id": [1, 2, 3, 4], "title": list("abcd"), "categories": [["x", "y"]] * 4})
        assert prepare(log, items, tmp_path, with_floors=False).items["title"] == list("abcd")

    def test_sequences_that_are_gone_are_made_anew(self, files, tmp_path):
        shutil.rmtree(prepare(*files, tmp_path / "out", with_floors=False).folder / "sequences")
        assert prepare(*files, tmp_path / "out", with_floors=False).sequences["train"]

    def test_of_several_at_the_same_time_one_prepares_and_the_others_wait(self, files, tmp_path, monkeypatch):
        read = []

        def slowly(*args, **options):
            read.append(args)
            time.sleep(0.5)
            return load_interactions(*args, **options)

        monkeypatch.setattr("llmd4rec_hf.data.prepared.load_interactions", slowly)
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(prepare, *files, tmp_path / "out", with_floors=False) for _ in range(3)]
            vocabularies = [prepared.result().vocabulary for prepared in waiting]
        assert len(read) == 1
        assert vocabularies[0] == vocabularies[1] == vocabularies[2]

    def test_a_torn_folder_is_no_prepared_folder(self, demo, tmp_path, monkeypatch):
        def fail(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("llmd4rec_hf.data.prepared.render", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(*demo, tmp_path, with_floors=False)
        with pytest.raises(DataError, match="prepare it again"):
            load_prepared(tmp_path)
        monkeypatch.undo()
        prepare(*demo, tmp_path, with_floors=False)
        assert load_prepared(tmp_path).items is not None


def test_too_little_to_train_on(tmp_path):
    table = pd.DataFrame({"user_id": [1, 1, 1], "item_id": [1, 2, 3]})
    with pytest.raises(DataError, match="enough interactions for train"):
        prepare(table, output_dir=tmp_path)


def test_unknown_split(demo, tmp_path):
    with pytest.raises(ConfigurationError, match="choose one of leave_one_out, time, ratio"):
        prepare(*demo, tmp_path, split="random")


class TestWhatDataIsLike:
    """One test per sentence of `docs/data.md` about what real data is like."""

    def prepared(self, tmp_path, rows, titles=None):
        log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
        items = None if titles is None else pd.DataFrame(titles, columns=["item_id", "title"])
        return prepare(log, items, tmp_path)

    def test_ties_keep_the_order_of_the_file(self, tmp_path):
        prepared = self.prepared(tmp_path, [(1, item, 5) for item in (30, 10, 20, 40)])
        assert prepared.vocabulary.decode(prepared.sequences["test"][0]["item_ids"]) == [30, 10, 20, 40]
        assert prepared.card["log"]["tie_share"] == 1.0

    def test_repeats_stay_and_are_counted(self, tmp_path):
        prepared = self.prepared(tmp_path, [(1, item, time) for time, item in enumerate([7, 8, 7, 7])])
        assert prepared.sequences["test"][0]["length"] == 4
        assert prepared.card["log"]["repeat_share"] == 0.5
        assert prepared.card["test"]["repeated_targets"] == 1

    def test_cold_targets_stay_in_the_test(self, tmp_path):
        prepared = self.prepared(tmp_path, [(1, item, time) for time, item in enumerate([7, 8, 9, 10])])
        assert len(prepared.sequences["test"]) == prepared.card["test"]["cold_targets"] == 1

    def test_items_may_share_a_title(self, tmp_path):
        rows = [(1, item, time) for time, item in enumerate([1, 2, 3, 1])]
        prepared = self.prepared(tmp_path, rows, [(1, "Cup"), (2, "Cup"), (3, "Mug")])
        assert prepared.vocabulary.texts == ["Cup", "Cup", "Mug"]
        assert prepared.card["catalogue"]["items_sharing_text"] == 2

    def test_items_may_lack_a_title_or_a_row(self, tmp_path):
        rows = [(1, item, time) for time, item in enumerate([1, 2, 3, 1])]
        prepared = self.prepared(tmp_path, rows, [(1, "Cup"), (2, None)])
        assert prepared.vocabulary.texts == ["Cup", "2", "3"]
        assert prepared.card["catalogue"]["items_without_text"] == 2

    @pytest.mark.parametrize(
        ("users", "items", "expected"),
        [
            ([1, 1, 1, 1], [10, 9, 100, 9], [9, 10, 100]),
            (["x", "x", "x", "x"], ["10", "9", "100", "9"], ["10", "100", "9"]),
            ([1, "1", 1, "1"], [10, "9b", 100, 10], ["10", "100", "9b"]),
        ],
        ids=["integers", "strings", "mixed"],
    )
    def test_ids(self, tmp_path, users, items, expected):
        prepared = self.prepared(tmp_path, list(zip(users, items, [1, 2, 3, 4], strict=True)))
        assert prepared.vocabulary.item_ids == expected
        assert len(prepared.sequences["test"]) == 1
        assert prepared.vocabulary.decode(prepared.sequences["test"][0]["item_ids"]) == [
            str(item) if isinstance(expected[0], str) else item for item in items
        ]
