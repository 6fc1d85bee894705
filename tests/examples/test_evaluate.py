# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest
import torch

from llmd4rec_hf import SASRecModel, ranking_metrics, target_ranks
from llmd4rec_hf.data import prepare


@pytest.fixture(scope="module")
def main(load_script):
    return load_script("evaluate").main


def expected(folder, rows, ks, seen: bool):
    model = SASRecModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = torch.cat([model.encode_last(torch.tensor([row[:-1][-6:]])) for row in rows["item_ids"]])
    labels = torch.tensor([row[-1] for row in rows["item_ids"]])
    histories = [torch.tensor(row[:-1]) for row in rows["item_ids"]]
    padded = torch.nn.utils.rnn.pad_sequence(histories, batch_first=True)
    return ranking_metrics(target_ranks(states, model.item_matrix(), labels, seen=padded if seen else None), ks)


@pytest.mark.parametrize(("split", "seen_items"), [("test", "mask"), ("validation", "keep"), ("train", "mask")])
def test_any_split_by_either_protocol(main, saved_crm, log_file, splits, tmp_path, capsys, split, seen_items):
    words = ["--model", saved_crm, "--dataset", log_file, "--split", split, "--seen_items", seen_items]
    main([*words, "--ks", "3,7", "--use_cpu", "--save_metrics", str(tmp_path / "out.json")])
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["metrics"] == pytest.approx(expected(saved_crm, splits[split], (3, 7), seen_items == "mask"))
    assert content["protocol"]["seen_items"] == ("masked" if seen_items == "mask" else "kept")
    assert f"crm, {split}" in capsys.readouterr().out


def test_an_llm_on_prepared_data(main, make_llm, vocabulary, log_file, tmp_path, capsys):
    llm = make_llm()
    llm.vocabulary = vocabulary
    llm.save_pretrained(tmp_path / "llm")
    prepare(log_file, output_dir=tmp_path / "data")
    main(["--model", str(tmp_path / "llm"), "--dataset", str(tmp_path / "data"), "--use_cpu"])
    assert "40 rows" in capsys.readouterr().out


def test_run_and_qrels_give_the_same_metrics(main, saved_crm, log_file, splits, tmp_path):
    run, qrels = tmp_path / "a.run", tmp_path / "a.qrels"
    words = ["--model", saved_crm, "--dataset", log_file, "--seen_items", "keep", "--run_depth", "5", "--use_cpu"]
    main([*words, "--save_run", str(run), "--save_qrels", str(qrels)])
    true = {line.split()[0]: line.split()[2] for line in qrels.read_text().splitlines()}
    lines = [line.split() for line in run.read_text().splitlines()]
    hits = sum(true[user] == item for user, _, item, *_ in lines)
    metrics = expected(saved_crm, splits["test"], (5,), seen=False)
    assert len(lines) == 5 * len(true)
    assert hits / len(true) == pytest.approx(metrics["hr@5"])


def test_a_run_gives_the_same_metrics_where_true_items_are_repeats(main, saved_crm, tmp_path):
    """What ranks let through is not filtered out of the run."""
    log = tmp_path / "repeats.csv"
    lines = [f"u{user:02d},i{(user + step % 3) % 12:02d},{step}" for user in range(20) for step in range(5)]
    log.write_text("\n".join(["user_id,item_id,timestamp", *lines]))
    run, qrels, metrics = (tmp_path / name for name in ("a.run", "a.qrels", "a.json"))
    words = ["--model", saved_crm, "--dataset", str(log), "--ks", "4", "--run_depth", "4", "--use_cpu"]
    main([*words, "--save_run", str(run), "--save_qrels", str(qrels), "--save_metrics", str(metrics)])
    true = {line.split()[0]: line.split()[2] for line in qrels.read_text().splitlines()}
    hits = sum(true[user] == item for user, _, item, *_ in map(str.split, run.read_text().splitlines()))
    assert 0 < hits / len(true) == pytest.approx(json.loads(metrics.read_text())["metrics"]["hr@4"])


def test_prepared_data_is_split_as_it_was(main, saved_crm, log_file, tmp_path, capsys):
    prepare(log_file, output_dir=tmp_path / "data", split="ratio", with_floors=False)
    words = ["--model", saved_crm, "--dataset", str(tmp_path / "data"), "--use_cpu"]
    main(words)
    assert "ratio split" in " ".join(capsys.readouterr().out.split())
    main([*words, "--split_by", "leave_one_out"])
    assert "leave_one_out split" in " ".join(capsys.readouterr().out.split())


def test_a_file_is_not_written_into_nowhere(main, saved_crm, capsys):
    with pytest.raises(SystemExit):
        main(["--model", saved_crm, "--save_metrics", "nowhere/out.json"])
    assert "there is no folder 'nowhere'" in capsys.readouterr().err


def test_new_items_can_be_skipped(main, saved_crm, log_file, tmp_path, capsys, fails):
    with open(log_file, "a") as file:
        file.write("u00,new,99\n")
    fails(main, ["--model", saved_crm, "--dataset", log_file], "not in the vocabulary, first 'new'")
    main(["--model", saved_crm, "--dataset", log_file, "--new_items", "skip", "--use_cpu"])
    assert "40 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nowhere-at-all"], "Cannot load a recommender from 'nowhere-at-all'"),
        (["--model", "{crm}", "--dataset", "nowhere.csv"], "nowhere.csv: no such file"),
        (["--model", "{crm}", "--dataset", "{log}", "--ks", "5;10"], "parted by commas"),
        (["--model", "{crm}", "--dataset", "{log}", "--ks", "0"], "at least 1"),
    ],
)
def test_errors_are_one_line(main, saved_crm, log_file, fails, words, message):
    fails(main, [word.format(crm=saved_crm, log=log_file) for word in words], message)
