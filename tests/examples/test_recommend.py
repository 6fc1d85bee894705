# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pandas as pd
import pytest

from llmd4rec_hf import SASRecModel


@pytest.fixture(scope="module")
def main(load_script):
    return load_script("recommend").main


def test_histories_of_the_command_line(main, saved_crm, capsys):
    main(["--model", saved_crm, "--history", "i01", "i02", "--history", "i05", "--k", "3"])
    printed = capsys.readouterr().out
    best = SASRecModel.from_pretrained(saved_crm).recommend([["i01", "i02"], ["i05"]], 3).ids
    assert all(f"title of thing {item}" in printed for row in best for item in row)
    assert "i01 i02" in printed


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_every_user_of_a_log(main, saved_crm, log_file, tmp_path, ending):
    path = tmp_path / f"out.{ending}"
    words = ["--model", saved_crm, "--dataset", log_file, "--k", "2", "--keep_seen", "--output", str(path)]
    main(words)
    read = {"csv": pd.read_csv, "jsonl": lambda path: pd.read_json(path, lines=True), "parquet": pd.read_parquet}
    frame = read[ending](path)
    assert list(frame.columns) == ["user_id", "item_id", "score", "rank"]
    assert frame["user_id"].nunique() == 40
    assert len(frame) == 80


def test_only_candidates(main, saved_crm, tmp_path, capsys):
    (tmp_path / "stock.txt").write_text("i03\ni07\n")
    main(["--model", saved_crm, "--history", "i01", "--candidates", str(tmp_path / "stock.txt")])
    printed = capsys.readouterr().out
    assert "i03" in printed and "i07" in printed and "i08" not in printed


def test_similar_items_and_many_queries(main, saved_crm, capsys):
    main(["--model", saved_crm, "--similar_to", *["i03"] * 21, "--k", "2"])
    printed = capsys.readouterr().out
    assert SASRecModel.from_pretrained(saved_crm).similar_items(["i03"], 2).ids[0][0] in printed
    assert "1 more" in printed


def test_similar_items_among_candidates(main, saved_crm, tmp_path, capsys):
    (tmp_path / "stock.txt").write_text("i05\ni07\nx\n")
    words = ["--model", saved_crm, "--similar_to", "x", "i03", "--candidates", str(tmp_path / "stock.txt")]
    main([*words, "--skip_unknown"])
    printed = capsys.readouterr().out
    assert "i05" in printed and "i07" in printed and "i08" not in printed


def test_unknown_items_can_be_skipped(main, saved_crm, capsys, fails):
    fails(main, ["--model", saved_crm, "--history", "i01", "[x]"], "first '[x]'")
    main(["--model", saved_crm, "--history", "i01", "[x]", "--skip_unknown"])
    assert "i01 [x]" in capsys.readouterr().out
    main(["--model", saved_crm, "--history", "[x]", "--skip_unknown"])
    assert "[x]" in capsys.readouterr().out


def test_candidates_that_cannot_be(main, saved_crm, tmp_path, fails):
    (tmp_path / "stock.txt").write_text("i03\n\n i 07 \n")
    words = ["--model", saved_crm, "--history", "i01", "--candidates", str(tmp_path / "stock.txt")]
    fails(main, words, "first 'i 07'")
    (tmp_path / "stock.txt").write_bytes("café\n".encode("latin-1"))
    fails(main, words, "stock.txt, a text in UTF-8: 'utf-8' codec")
    (tmp_path / "stock.txt").write_text("\n \n")
    fails(main, words, "stock.txt holds no ids: write one per line")


def test_a_place_for_the_output_that_is_not_there(main, saved_crm, capsys):
    with pytest.raises(SystemExit):
        main(["--model", saved_crm, "--history", "i01", "--output", "no/folder/out.csv"])
    assert "argument --output: there is no folder 'no/folder'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--history", "i01", "--output", "out.pkl"], "its ending must be one of .csv"),
        (["--history", "i01", "--k", "0"], "k must be at least 1"),
        (["--history", "i01", "--candidates", "nowhere.txt"], "Cannot read the candidates in nowhere.txt"),
        (["--similar_to", "x"], "not in the vocabulary, first 'x'; --skip_unknown leaves them out"),
        (["--history", "i01", "--candidates", __file__], "; --skip_unknown leaves them out"),
    ],
)
def test_errors_are_one_line(main, saved_crm, fails, words, message):
    fails(main, ["--model", saved_crm, *words], message)
