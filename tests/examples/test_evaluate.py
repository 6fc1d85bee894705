# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil

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


def test_a_masked_run_holds_a_true_item_that_was_seen(main, saved_crm, tmp_path):
    """As the ranks do: they let the true item through."""
    log = tmp_path / "repeats.csv"
    walks = {"a": [1, 2, 3, 1], "b": [4, 5, 4, 4], "c": [6, 7, 8, 9]}
    lines = [f"{user},i{item:02d},{time}" for user, items in walks.items() for time, item in enumerate(items)]
    log.write_text("\n".join(["user_id,item_id,timestamp", *lines]))
    names = {name: str(tmp_path / name) for name in ("metrics", "run", "qrels")}
    words = ["--model", saved_crm, "--dataset", str(log), "--ks", "9", "--run_depth", "9", "--use_cpu"]
    main(words + [word for name, path in names.items() for word in (f"--save_{name}", path)])
    true = dict(line.split()[::2] for line in (tmp_path / "qrels").read_text().splitlines())
    run = [line.split() for line in (tmp_path / "run").read_text().splitlines()]
    ranks = [int(rank) for user, _, item, rank, *_ in run if true[user] == item]
    found = json.loads((tmp_path / "metrics").read_text())["metrics"]
    assert found["mrr@9"] == pytest.approx(sum(1 / rank for rank in ranks) / 3)
    assert found["hr@9"] == len(ranks) / 3
    assert len(ranks) >= 2
    seen = {"a": {"i02", "i03"}, "b": {"i05"}, "c": {"i06", "i07", "i08"}}
    assert not [item for user, _, item, *_ in run if item in seen[user]]
    assert {sum(line[0] == user for line in run) for user in walks} == {9}


def test_a_prepared_folder_is_split_as_it_was(main, saved_crm, log_file, tmp_path, capsys):
    folder = tmp_path / "data"
    prepare(log_file, output_dir=folder, split="ratio", with_floors=False)
    words = ["--model", saved_crm, "--dataset", str(folder), "--use_cpu", "--save_metrics", str(tmp_path / "out.json")]
    main(words)
    assert json.loads((tmp_path / "out.json").read_text())["protocol"]["split"] == "ratio"
    assert "ratio split" in " ".join(capsys.readouterr().out.split())
    main([*words, "--split_by", "leave_one_out"])
    assert json.loads((tmp_path / "out.json").read_text())["protocol"]["split"] == "leave_one_out"


def test_a_model_in_a_runs_folder_is_split_as_the_run_was(main, saved_crm, log_file, tmp_path, capsys):
    shutil.copytree(saved_crm, tmp_path / "run" / "crm")
    (tmp_path / "run" / "results.json").write_text(json.dumps({"protocol": {"split": "ratio"}}))
    words = ["--model", str(tmp_path / "run" / "crm"), "--dataset", str(log_file), "--use_cpu"]
    main(words)
    assert "ratio split" in " ".join(capsys.readouterr().out.split())
    main([*words, "--split_by", "leave_one_out"])
    assert "leave_one_out split" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "run" / "results.json").write_text("[]")
    main(words)
    assert "leave_one_out split" in " ".join(capsys.readouterr().out.split())


def test_new_items_can_be_skipped(main, saved_crm, log_file, tmp_path, capsys, fails):
    with open(log_file, "a") as file:
        file.write("u00,new,99\n")
    words = ["--model", saved_crm, "--dataset", log_file]
    fails(main, words, f"first 'new'; they are in --dataset {log_file}, and --new_items skip")
    main(["--model", saved_crm, "--dataset", log_file, "--new_items", "skip", "--use_cpu"])
    assert "40 rows" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--save_metrics", "--save_run", "--save_qrels"])
def test_a_place_for_the_output_that_is_not_there(main, option, capsys):
    with pytest.raises(SystemExit):
        main(["--model", "any", option, "no/folder/out"])
    assert f"argument {option}: there is no folder 'no/folder'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--model", "any", option, "."])
    assert f"argument {option}: '.' is a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "wrong"),
    [("--batch_size", "0", "0"), ("--ks", "5;10", "5;10"), ("--ks", "5,0", "0"), ("--ks", "", "")],
)
def test_numbers_that_are_none(main, capsys, option, value, wrong):
    with pytest.raises(SystemExit):
        main(["--model", "any", option, value])
    assert f"argument {option}: {wrong!r} is not a whole number, 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nowhere-at-all"], "Cannot load a recommender from 'nowhere-at-all'"),
        (["--model", "{crm}", "--dataset", "nowhere.csv"], "nowhere.csv: no such file"),
    ],
)
def test_errors_are_one_line(main, saved_crm, log_file, fails, words, message):
    fails(main, [word.format(crm=saved_crm, log=log_file) for word in words], message)
