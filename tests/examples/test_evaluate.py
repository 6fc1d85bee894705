# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil

import pytest
import torch

from llmd4rec_hf import ItemVocabulary, SASRecModel, ranking_metrics, target_ranks
from llmd4rec_hf.data import data_hash, prepare


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


@pytest.fixture
def run_of_crm(saved_crm, splits, tmp_path):
    """A function that puts the CRM into a run's folder, and returns the folder."""

    def make(split: str):
        folder = tmp_path / "run"
        shutil.copytree(saved_crm, folder / "crm")
        settings = {f"sequences.{name}": data_hash(rows) for name, rows in splits.items()}
        (folder / "results.json").write_text(json.dumps({"protocol": {"split": split}, "settings": settings}))
        return folder

    return make


def test_a_model_in_a_runs_folder_is_split_as_the_run_was(main, run_of_crm, log_file, tmp_path, capsys):
    words = ["--model", str(run_of_crm("ratio") / "crm"), "--dataset", str(log_file), "--use_cpu"]
    main(words)
    assert "ratio split" in " ".join(capsys.readouterr().out.split())
    main([*words, "--split_by", "leave_one_out"])
    assert "leave_one_out split" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "run" / "results.json").write_text("[]")
    main(words)
    assert "leave_one_out split" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_that_are_not_those_of_the_run_are_said_to_be_others(main, run_of_crm, log_file, tmp_path, capsys, split):
    out = tmp_path / "out.json"
    words = ["--model", str(run_of_crm("leave_one_out") / "crm"), "--split", split, "--use_cpu"]
    words += ["--save_metrics", str(out)]
    main([*words, "--dataset", log_file])
    assert "caution" not in json.loads(out.read_text())["protocol"]
    prepare(log_file, output_dir=tmp_path / "data", min_history=5, with_floors=False)
    capsys.readouterr()
    main([*words, "--dataset", str(tmp_path / "data")])
    caution = f"not the {split} rows of the model's run: prepare the data as for training"
    assert json.loads(out.read_text())["protocol"]["caution"] == caution
    assert caution in " ".join(capsys.readouterr().out.split())


def test_new_items_can_be_skipped(main, saved_crm, log_file, tmp_path, capsys, fails):
    with open(log_file, "a") as file:
        file.write("u00,new,99\n")
    words = ["--model", saved_crm, "--dataset", log_file]
    fails(main, words, f"first 'new'; they are in --dataset {log_file}, and --new_items skip")
    main(["--model", saved_crm, "--dataset", log_file, "--new_items", "skip", "--use_cpu"])
    assert "40 rows" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--save_run", "--save_qrels"])
@pytest.mark.parametrize(("column", "name"), [("user_id", "u 00"), ("item_id", "i 00")])
def test_ids_that_trec_cannot_hold_are_refused_before_measuring(
    load_script, make_crm, small_log, tmp_path, monkeypatch, fails, option, column, name
):
    log = small_log.replace({column: {name.replace(" ", ""): name}})
    log.to_csv(tmp_path / "log.csv", index=False)
    crm = make_crm()
    crm.vocabulary = ItemVocabulary(sorted(log["item_id"].unique()))
    crm.save_pretrained(tmp_path / "crm")
    script = load_script("evaluate")
    monkeypatch.setattr(script, "measure", None)  # fails if it is called
    words = ["--model", str(tmp_path / "crm"), "--dataset", str(tmp_path / "log.csv"), option, str(tmp_path / "out")]
    fails(script.main, words, f"{name!r} cannot stand in a TREC file")


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
    [
        ("--batch_size", "0", "0"),
        ("--run_depth", "0", "0"),
        ("--ks", "5;10", "5;10"),
        ("--ks", "5,0", "0"),
        ("--ks", "", ""),
    ],
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
