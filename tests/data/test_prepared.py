# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
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
    split_by_ratio,
    split_by_time,
    split_leave_one_out,
)
from llmd4rec_hf.data.prepared import is_prepared
from llmd4rec_hf.errors import ConfigurationError, DataError, StorageError


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


@pytest.mark.parametrize(("name", "split"), [("time", split_by_time), ("ratio", split_by_ratio)])
def test_other_splits(demo, tmp_path, name, split):
    prepared = prepare(*demo, tmp_path, split=name, with_floors=False)
    expected = split(demo[0], ItemVocabulary.from_interactions(*demo))
    assert {part: data_hash(rows) for part, rows in prepared.sequences.items()} == {
        part: data_hash(rows) for part, rows in expected.items()
    }


def test_a_folder_gives_its_catalogue_in_the_format_of_its_log(tmp_path):
    """Of two data sets in it, both parts come from the one that is named."""
    folder = tmp_path / "both"
    folder.mkdir()
    (folder / "interactions.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"1,{i},{i}\n" for i in range(4)))
    (folder / "items.csv").write_text("item_id,title\n" + "".join(f"{i},Cup {i}\n" for i in range(4)))
    (folder / "ratings.dat").write_text("".join(f"1::{i}::5::{i}\n" for i in range(4)))
    (folder / "movies.dat").write_text("".join(f"{i}::Film {i} (1999)::Drama\n" for i in range(4)))
    for name, title in (("movielens", "Film 0"), ("auto", "Cup 0")):
        prepared = prepare(folder, output_dir=tmp_path / name, format=name, with_floors=False)
        assert title in prepared.vocabulary.texts[0]


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


def test_a_catalogue_that_is_none_is_refused(demo, tmp_path):
    """Of the log's own folder it is no matter, but who names one means to have titles."""
    folder = tmp_path / "log"
    folder.mkdir()
    demo[0].to_parquet(folder / "interactions.parquet")
    for source in (demo[0], folder):
        with pytest.raises(DataError, match="log: holds no catalogue; give the file with the titles"):
            prepare(source, folder, tmp_path / "out", with_floors=False)
    assert prepare(folder, output_dir=tmp_path / "out", with_floors=False).items is None


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
        dataset = datasets.Dataset.from_pandas(demo[0].to_pandas())
        frame = dataset.to_pandas()
        halves = datasets.concatenate_datasets([dataset.select(range(9)), dataset.select(range(9, len(frame)))])
        sources = (frame, frame.copy(), dataset, dataset.select(range(len(frame))), halves, frame.iloc[:-1])
        keys = [prepare(source, output_dir=tmp_path, with_floors=False).key for source in sources]
        assert len(set(keys[:-1])) == 1
        assert keys[-1] != keys[0]

    def test_the_index_of_a_table_is_among_its_values(self, demo, tmp_path):
        log, items = demo[0].to_pandas().set_index("timestamp"), demo[1].to_pandas().set_index("item_id")
        first = prepare(log, items, tmp_path, with_floors=False)
        assert first.vocabulary.texts == ItemVocabulary.from_interactions(*demo).texts
        assert prepare(log.set_index(log.index + 1), items, tmp_path, with_floors=False).key != first.key

    def test_a_catalogue_with_lists(self, demo, tmp_path):
        items = demo[1].to_pandas()[["item_id", "title"]].assign(categories=[["a", "b"]] * len(demo[1]))
        prepared = prepare(demo[0], items, tmp_path, text_template="{categories}", with_floors=False)
        assert set(prepared.vocabulary.texts) == {"a, b"}

    def test_options_of_numpy_and_pandas(self, demo, tmp_path):
        moment = pd.Timestamp(min(demo[0]["timestamp"]), unit="s")
        prepared = prepare(demo[0], output_dir=tmp_path, with_floors=False, k_user=np.int64(2), start_time=moment)
        assert prepared.card["prepared"] == {"split": "leave_one_out", "k_user": 2, "start_time": str(moment)}
        same = prepare(demo[0], output_dir=tmp_path, with_floors=False, k_user=2, start_time=moment)
        assert same.key == prepared.key

    def test_what_cannot_be_described_leaves_the_folder_as_it_was(self, demo, tmp_path, monkeypatch):
        before = prepare(*demo, tmp_path, with_floors=False).key
        monkeypatch.setattr("llmd4rec_hf.data.prepared.data_card", lambda *_, **__: {(): "no key of JSON"})
        with pytest.raises(TypeError):
            prepare(*demo, tmp_path, with_floors=False, k_user=2)
        assert load_prepared(tmp_path).key == before

    def test_data_of_a_folder_that_was_prepared_again_is_not_taken_for_the_old(self, demo, tmp_path):
        old = prepare(*demo, tmp_path, with_floors=False)
        vocabulary = old.vocabulary
        new = prepare(*demo, tmp_path, with_floors=False, split="ratio")
        for name in ("interactions", "items", "sequences", "card"):
            with pytest.raises(DataError, match="prepared again with other data or options since"):
                getattr(old, name)
        assert old.vocabulary is vocabulary
        assert new.card["prepared"]["split"] == load_prepared(tmp_path).card["prepared"]["split"] == "ratio"

    def test_a_place_that_cannot_be_written_to(self, demo, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match="file/out .*give another output_dir"):
            prepare(*demo, tmp_path / "file" / "out")

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("llmd4rec_hf.data.prepared.pa.parquet.write_table", full)
        with pytest.raises(StorageError, match="No space left"):
            prepare(*demo, tmp_path / "out", with_floors=False)

    def test_without_a_folder_it_goes_to_the_cache_of_datasets(self, files, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        first = prepare(*files, with_floors=False)
        assert first.folder.is_relative_to(tmp_path / "cache")
        assert prepare(*files, with_floors=False).folder == first.folder
        assert prepare(*files, with_floors=False, k_user=4).folder != first.folder

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

    def test_a_card_with_floors_is_another_one(self, tmp_path):
        table = pd.DataFrame({"user_id": [1] * 4, "item_id": [1, 2, 3, 4]})
        cards = [prepare(table, output_dir=tmp_path, with_floors=wanted).card for wanted in (False, True)]
        assert ["floors" in card for card in cards] == [False, True]

    @pytest.mark.parametrize("shown", [True, False])
    def test_progress_bars_are_shown_again_if_they_were(self, tmp_path, monkeypatch, shown):
        said = []
        monkeypatch.setattr(datasets, "are_progress_bars_disabled", lambda: not shown)
        monkeypatch.setattr(datasets, "disable_progress_bars", lambda: said.append("off"))
        monkeypatch.setattr(datasets, "enable_progress_bars", lambda: said.append("on"))
        table = pd.DataFrame({"user_id": [1] * 4, "item_id": [1, 2, 3, 4]})
        prepare(table, output_dir=tmp_path, with_floors=False)
        assert said == ["off", *["on"] * shown]

    def test_nothing_of_what_was_there_before_is_left(self, demo, tmp_path):
        prepare(*demo, tmp_path, with_floors=False)
        left = tmp_path / "sequences" / "train" / "cache-of-a-map.arrow"
        left.touch()
        prepared = prepare(demo[0], output_dir=tmp_path, with_floors=False)
        assert prepared.items is None
        assert not left.exists()

    def test_a_torn_folder_is_no_prepared_folder(self, demo, tmp_path, monkeypatch):
        def fail(*_):
            raise KeyboardInterrupt

        prepare(*demo, tmp_path, with_floors=False, split="ratio")
        monkeypatch.setattr("llmd4rec_hf.data.prepared.render", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(*demo, tmp_path, with_floors=False)
        with pytest.raises(DataError, match=r"no complete prepared data .*prepare it again"):
            load_prepared(tmp_path)
        monkeypatch.undo()
        prepare(*demo, tmp_path, with_floors=False)
        assert load_prepared(tmp_path).items is not None


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-9])


def with_one_letter_changed(path):
    path.write_text(path.read_text().replace("a", "b", 1))


class TestDamage:
    @pytest.mark.parametrize(
        ("name", "damage"),
        [
            ("sequences/train/data-00000-of-00001.arrow", cut_short),
            ("sequences/train", shutil.rmtree),
            ("sequences/dataset_dict.json", with_one_letter_changed),
            ("interactions.parquet", cut_short),
            ("items.parquet", Path.unlink),
            ("vocabulary.json", cut_short),
            ("vocabulary.json", with_one_letter_changed),
            ("data_card.json", Path.unlink),
            ("prepared.json", cut_short),
            ("prepared.json", lambda path: path.write_text("[]")),
            ("prepared.json", lambda path: path.write_text(json.dumps({"format_version": 3, "key": "abc"}))),
        ],
    )
    def test_it_is_found_and_mended(self, demo, tmp_path, caplog, name, damage):
        opened = prepare(*demo, tmp_path, with_floors=False)
        damage(tmp_path / name)
        message = rf"damaged \({name}.*\); delete the folder or prepare it again"
        with pytest.raises(DataError, match=message):
            load_prepared(tmp_path)
        for part in ("interactions", "items", "vocabulary", "sequences", "card"):
            with pytest.raises(DataError, match=message):
                getattr(opened, part)
        prepare(*demo, tmp_path, with_floors=False)
        assert "It is prepared again now." in caplog.text
        assert len(load_prepared(tmp_path).sequences["train"]) == 120

    def test_what_others_put_beside_the_parts_is_none(self, demo, tmp_path):
        prepared = prepare(*demo, tmp_path, with_floors=False)
        (tmp_path / "data_card.md").write_text("Ours, of May.")
        prepared.sequences["train"].map(lambda row: {"double": 2 * row["length"]})  # leaves its cache there
        assert len(list((tmp_path / "sequences" / "train").glob("cache-*.arrow"))) == 1
        assert load_prepared(tmp_path).card["log"]["users"] == 120

    def test_the_folder_of_an_older_release(self, demo, tmp_path, caplog):
        prepare(*demo, tmp_path, with_floors=False)
        (tmp_path / "prepared.json").write_text(json.dumps({"format_version": 1, "key": "abc"}))
        with pytest.raises(DataError, match="format version 1, this release reads 3; prepare it again"):
            load_prepared(tmp_path)
        prepare(*demo, tmp_path, with_floors=False)
        assert load_prepared(tmp_path).card["log"]["users"] == 120


class TestSourcesBesideTheResult:
    @pytest.mark.parametrize("name", ["interactions.parquet", "interactions.csv"])
    def test_a_log_whose_place_the_result_would_take_is_left_as_it_is(self, demo, tmp_path, name):
        frame = demo[0].to_pandas()
        frame.to_parquet(tmp_path / name) if name.endswith("parquet") else frame.to_csv(tmp_path / name, index=False)
        before = (tmp_path / name).read_bytes()
        for source in (tmp_path, tmp_path / name):
            with pytest.raises(ConfigurationError, match=f"holds the source {name}.*give another output_dir"):
                prepare(source, output_dir=tmp_path / "." / "", k_user=5)
        assert (tmp_path / name).read_bytes() == before
        assert {path.name for path in tmp_path.iterdir()} == {name}

    def test_nor_is_a_catalogue(self, files, tmp_path):
        items = files[1].rename(tmp_path / "items.jsonl")
        with pytest.raises(ConfigurationError, match="holds the source items.jsonl"):
            prepare(files[0], items, tmp_path)

    def test_other_names_may_lie_there(self, files, tmp_path):
        prepare(*files, tmp_path, with_floors=False)
        assert files[0].exists() and files[1].exists()


def test_the_home_folder_in_a_path(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert not is_prepared("~/out")
    prepared = prepare(*demo, "~/out", with_floors=False)
    assert prepared.folder == tmp_path / "out"
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert is_prepared("~/out")


def test_too_little_to_train_on(tmp_path):
    table = pd.DataFrame({"user_id": [1, 1, 1], "item_id": [1, 2, 3]})
    with pytest.raises(DataError, match="enough interactions for train"):
        prepare(table, output_dir=tmp_path)


@pytest.mark.parametrize(
    "source",
    [[{"user_id": 1, "item_id": 2}], datasets.DatasetDict(), pa.table({"user_id": [1], "item_id": [2]})],
    ids=["list", "DatasetDict", "Table"],
)
def test_sources_that_are_none(tmp_path, source):
    remedy = r" \(what its to_pandas\(\) gives\)$" if isinstance(source, pa.Table) else "$"
    message = f"cannot load interactions from {type(source).__name__}; pass a path, a DataFrame or a Dataset"
    with pytest.raises(DataError, match=message + remedy):
        prepare(source, output_dir=tmp_path)


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
