# SPDX-License-Identifier: Apache-2.0
"""Every file of `raw_samples`, by the table. The counts were taken with `grep`, `cut`, `awk` and the csv module."""

from __future__ import annotations

import shutil

import pytest

from llmd4rec_hf.data import load_interactions, load_items
from llmd4rec_hf.data.formats import detect_format
from llmd4rec_hf.errors import DataError


# file -> format, interactions, users, items
LOGS = {
    "amazon2014.review.one_line_example.json": ("amazon", 1, 1, 1),
    "amazon2018.reviews_5core.All_Beauty.json": ("amazon", 200, 200, 2),
    "amazon2018.reviews_5core.Gift_Cards.json": ("amazon", 200, 159, 10),
    "dllm2rec.game.test_data.csv": ("dllm2rec", 1754, 199, 955),
    "e4srec.general.ML1M.train.txt": ("s3rec", 7164, 50, 2233),
    "hetrec-lastfm.user_artists.dat": ("hetrec", 199, 4, 187),
    "lcrec_letter.Beauty.inter.json": ("lcrec", 2798, 200, 2022),
    "minionerec.Office_Products.test.csv": ("bigrec", 170, 26, 144),
    "ml-100k.u.data": ("movielens", 200, 117, 167),
    "ml-1m.ratings.dat": ("movielens", 200, 20, 140),
    "ml-latest-small.ratings.csv": ("movielens", 199, 4, 176),
    "openp5_idgenrec.user_sequence.txt": ("s3rec", 2798, 200, 2022),
    "recbole.ml-100k.inter": ("recbole", 199, 117, 166),
    "s3rec.Beauty.txt": ("s3rec", 2798, 200, 2022),
    "sasrec.Video.txt": ("s3rec", 200, 16, 182),
}
# file -> format, items, the first item's id and text
CATALOGUES = {
    "amazon2018.meta.Gift_Cards.json": ("amazon", 200, "B001BKEWF2", "Serendipity 3 $100.00 Gift Card"),
    "hetrec-lastfm.artists.dat": ("hetrec", 199, 1, "MALICE MIZER"),
    "idgenrec.item_generative_indexing.txt": ("idgenrec", 200, "B000P24EI2", "rene furterer complexe 5"),
    "lcrec_letter.Yelp.item.json": ("lcrec", 200, 0, "The Great Greek"),
    "llara.lastfm.id2name.txt": ("llara", 200, 0, "Morcheeba"),
    "minionerec.Office_Products.info.txt": (
        "minionerec", 200, 0, "HP 74 Black & 75 Tri-color Original Ink Cartridges, 2 Cartridges (CB335WN, CB337WN)"
    ),
    "minionerec.Office_Products.item.json": (
        "lcrec", 60, 0, "HP 74 Black & 75 Tri-color Original Ink Cartridges, 2 Cartridges (CB335WN, CB337WN)"
    ),
    "ml-100k.u.item": ("movielens", 200, 1, "Toy Story (1995)"),
    "ml-100k.u.item.header_variant": ("movielens", 199, 1, "Toy Story (1995)"),
    "ml-1m.movies.dat": ("movielens", 200, 1, "Toy Story (1995)"),
    "ml-latest-small.movies.csv": ("movielens", 199, 1, "Toy Story (1995)"),
    "recbole.Games.item": ("recbole", 199, 0, "Fire Emblem: The Sacred Stones"),
    "recbole.ml-100k.item": ("recbole", 199, 1, "Toy Story"),
    "recbole.ml-1m.item": ("recbole", 199, 1, "Toy Story"),
    "s3rec.Beauty_item2attributes.json": ("s3rec_attributes", 200, 4, "1|2|3"),
}  # fmt: skip
# Neither a log nor a catalogue.
REFUSED = {
    "README.md": "format not recognised",
    "hetrec-lastfm.readme.txt": "format not recognised",
    "lcrec_letter.Beauty.index.json": "semantic ids, neither interactions nor titles",
    "llara.lastfm.Test_data.df": "this is a pickle",
    "ml-100k.README": "format not recognised",
    "ml-100k.u.genre": "no column for",
    "ml-100k.u.user": "no column for",
    "ml-1m.users.dat": "format not recognised",
    "ml-latest-small.README.txt": "format not recognised",
    "p5.beauty.datamaps.json": "maps ids to ids",
    "recbole.ml-100k.user": "no column for item_id",
}


@pytest.fixture
def samples(shared):
    return shared / "data" / "raw_samples"


def test_the_tables_name_every_file(samples):
    assert {file.name for file in samples.iterdir()} == LOGS.keys() | CATALOGUES.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", LOGS)
def test_a_log_is_read_and_is_no_catalogue(samples, name):
    format, interactions, users, items = LOGS[name]
    assert detect_format(samples / name).name == format
    log = load_interactions(samples / name)
    assert (len(log), len(set(log["user_id"])), len(set(log["item_id"]))) == (interactions, users, items)
    with pytest.raises(DataError, match="no catalogue|no titles"):
        load_items(samples / name)


@pytest.mark.parametrize("name", CATALOGUES)
def test_a_catalogue_is_read_and_is_no_log(samples, name):
    format, count, first, text = CATALOGUES[name]
    assert detect_format(samples / name).name == format
    items = load_items(samples / name)
    assert len(items) == len(set(items["item_id"])) == count
    assert (items[0]["item_id"], items[0]["text"]) == (first, text)
    with pytest.raises(DataError, match="no log|no interactions"):
        load_interactions(samples / name)


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_with_a_reason(samples, name):
    for load in (load_interactions, load_items):
        with pytest.raises(DataError, match=REFUSED[name]) as error:
            load(samples / name)
        assert "\n" not in str(error.value)


def test_one_row_of_each_kind_by_hand(samples):
    log = load_interactions(samples / "ml-100k.u.data").to_pandas()
    assert log[(log.user_id == 196)].values.tolist() == [[196, 242, 881250949, 3]]
    log = load_interactions(samples / "ml-latest-small.ratings.csv").to_pandas()
    assert log[(log.user_id == 1) & (log.item_id == 31)].values.tolist() == [[1, 31, 1260759144, 2.5]]
    log = load_interactions(samples / "minionerec.Office_Products.test.csv").to_pandas()
    expected = [384, 289, 151, 809, 406, 227, 0, 0, 2432, 1595, 1465]
    assert log[log.user_id == "A1179"].item_id.tolist()[:11] == expected
    log = load_interactions(samples / "dllm2rec.game.test_data.csv").to_pandas()
    assert log[log.user_id == 1].item_id.tolist() == [7525, 4942, 7899, 7575, 2500, 4573, 13061, 196]
    items = load_items(samples / "ml-100k.u.item", text_template="{title}: {category}")
    assert items[0]["text"] == "Toy Story (1995): Animation|Children's|Comedy"
    items = load_items(
        samples / "minionerec.Office_Products.item.json", text_template="{title} ({brand}: {description})"
    )
    assert items[1]["text"].endswith("Credit Card Shredder (AmazonBasics: An Amazon Brand.)")
    names = dict(
        load_items(samples / "hetrec-lastfm.artists.dat").select_columns(["item_id", "text"]).to_pandas().values
    )
    assert names[18] == "The Crüxshadows"


FOLDERS = {
    "recbole": (("recbole.ml-100k.inter", "ml-100k.inter"), ("recbole.ml-100k.item", "ml-100k.item")),
    "movielens 100K": (("ml-100k.u.data", "u.data"), ("ml-100k.u.item", "u.item")),
    "movielens 1M": (("ml-1m.ratings.dat", "ratings.dat"), ("ml-1m.movies.dat", "movies.dat")),
    "movielens latest": (("ml-latest-small.ratings.csv", "ratings.csv"), ("ml-latest-small.movies.csv", "movies.csv")),
    "hetrec": (("hetrec-lastfm.user_artists.dat", "user_artists.dat"), ("hetrec-lastfm.artists.dat", "artists.dat")),
    "s3rec": (
        ("s3rec.Beauty.txt", "Beauty.txt"), ("s3rec.Beauty_item2attributes.json", "Beauty_item2attributes.json")
    ),
    "lcrec": (("lcrec_letter.Beauty.inter.json", "B.inter.json"), ("lcrec_letter.Yelp.item.json", "B.item.json")),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_as_it_is_published(samples, tmp_path, name):
    (log, log_name), (items, items_name) = FOLDERS[name]
    shutil.copy(samples / log, tmp_path / log_name)
    shutil.copy(samples / items, tmp_path / items_name)
    (tmp_path / "README.txt").write_text("read me")
    assert detect_format(tmp_path).name == name.split()[0]
    assert len(load_interactions(tmp_path)) == LOGS[log][1]
    assert len(load_items(tmp_path)) == CATALOGUES[items][1]
