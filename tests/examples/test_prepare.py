# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from llmd4rec_hf.data import load_interactions, load_items, load_prepared


REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "prepare.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("prepare_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def log_file(tmp_path):
    lines = [f"{user};{item};2020-01-0{1 + step};{step}" for user in range(6) for step, item in enumerate("abcde")]
    path = tmp_path / "log.txt"
    path.write_text("\n".join(["who;what;when;stars", *lines]))
    return path


COLUMNS = ["--columns", "user_id=who", "item_id=what", "timestamp=when"]


def test_any_columns_to_the_canonical_folder(script, log_file, tmp_path, capsys):
    items = tmp_path / "items.csv"
    items.write_text("sku,name,maker\na,Cup,Acme\nb,Mug,\n")
    script.main(
        ["--dataset", str(log_file), *COLUMNS, "--items", str(items), "--item_columns", "item_id=sku"]
        + ["--text_template", "{title} ({maker})", "--min_rating", "1", "--output_dir", str(tmp_path / "out")]
    )
    printed = capsys.readouterr().out
    assert "Data card" in printed
    assert "item kNN" in printed
    assert len(load_interactions(tmp_path / "out")) == 24
    assert load_items(tmp_path / "out")["text"] == ["Cup (Acme)", "Mug"]
    assert json.loads((tmp_path / "out" / "data_card.json").read_text())["log"]["users"] == 6
    assert (tmp_path / "out" / "data_card.md").read_text().startswith("# Data card")
    assert load_prepared(tmp_path / "out").vocabulary.texts == ["Mug", "c", "d", "e"]


def test_filters_reach_the_log(script, log_file, tmp_path):
    words = ["--dataset", str(log_file), *COLUMNS, "--output_dir", str(tmp_path / "out"), "--no-floors"]
    script.main([*words, "--start_time", "2020-01-02", "--max_history", "4", "--k_core", "2", "--split", "ratio"])
    prepared = load_prepared(tmp_path / "out")
    assert prepared.card["log"]["interactions"] == 24
    assert prepared.card["prepared"]["split"] == "ratio"
    assert "floors" not in prepared.card


def test_the_demo(script, tmp_path, capsys):
    script.main(["--dataset", "demo", "--k_core", "5", "--output_dir", str(tmp_path / "[new]")])
    printed = "".join(capsys.readouterr().out.split())
    assert "12,511" in printed
    assert printed.endswith(f"train.py--dataset{tmp_path}/[new]")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "nowhere.csv"], "nowhere.csv: no such file or folder; check the path"),
        (["--dataset", "{log}"], "no column for user_id, item_id among 'who', 'what', 'when', 'stars'"),
        (["--dataset", "{log}", *COLUMNS, "--split", "time", "--k_core", "9"], "choose smaller values"),
        (["--dataset", "{pickle}"], "this is a pickle"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(script, log_file, tmp_path, capsys, words, message):
    (tmp_path / "log.pkl").write_bytes(pickle.dumps([1]))
    names = {"{log}": str(log_file), "{pickle}": str(tmp_path / "log.pkl")}
    with pytest.raises(SystemExit) as stop:
        script.main([*(names.get(word, word) for word in words), "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error


def test_help_as_a_command():
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "119"}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, env=environment, check=True
    )
    assert "--text_template" in result.stdout
    assert len(result.stdout.splitlines()) < 60
