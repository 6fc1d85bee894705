# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def main(load_script):
    return load_script("compare").main


@pytest.fixture
def make_run(tmp_path):
    """Write what a run writes; returns its folder."""

    def make(name: str, seed: int, llm: float, crm: float, hash: str = "a", controls: bool = True) -> str:
        def entry(value):
            return {"round": 1, "validation": {}, "test": {"hr@10": 2 * value, "ndcg@10": value, "mrr@10": value / 2}}

        results = {
            "dataset": {"name": "shop", "items": 12, "hash": hash},
            "protocol": {"split": "leave_one_out", "seen_items": "masked", "ties": "pessimistic", "ranking": "full"},
            "seed": seed,
            "rounds": [],
            "final": {"llm": entry(llm), "crm": entry(crm)},
        }
        for side in ("llm", "crm"):
            results["final"][f"{side}_without_distillation"] = entry(0.1) if controls else None
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
        return str(tmp_path / name)

    return make


def test_runs_of_several_seeds(main, make_run, capsys):
    main([make_run("one", 1, 0.2, 0.11), make_run("two", 2, 0.3, 0.13) + "/results.json", "--format", "markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| one | shop | 1 | 0.2000 | 0.1000 | 0.1100 | 0.1000 | +100.0 % | +10.0 % |"
    assert lines[3].startswith("| two | shop | 2 | 0.3000 |")
    assert lines[4].startswith("| mean of 2 |  |  | 0.2500 ± 0.0707 | 0.1000 ± 0.0000 | 0.1200 ± 0.0141 |")
    assert lines[4].endswith("| +150.0% ± 70.7% | +20.0% ± 14.1% |")


@pytest.mark.parametrize(
    ("first", "second", "seeds", "caption"),
    [
        ({"crm_args.kl_weight": 0.5}, {"crm_args.kl_weight": 9}, (1, 2), "crm_args.kl_weight: 0.5 / 9"),
        ({}, {"llm.adapter.r": 8}, (1, 2), "llm.adapter.r: None / 8"),
        ({"crm_args.kl_weight": 0.5}, {"crm_args.kl_weight": 0.5}, (1, 1), "Test, ndcg@10"),
        ({"sequences.train": "a"}, {"sequences.train": "b"}, (1, 2), "differ in data or protocol"),
    ],
)
def test_no_mean_of_runs_that_differ_in_more_than_seeds_or_not_at_all(
    main, make_run, capsys, first, second, seeds, caption
):
    folders = []
    for name, settings, seed in zip(("one", "two"), (first, second), seeds, strict=True):
        folder = make_run(name, seed, 0.2, 0.1)
        path = Path(folder, "results.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": settings}))
        folders.append(folder)
    main(folders)
    printed = " ".join(capsys.readouterr().out.split())
    assert caption in printed
    assert "mean of" not in printed


def test_runs_that_do_not_compare(main, make_run, capsys):
    main([make_run("one", 1, 0.2, 0.1), make_run("two", 1, 0.2, 0.1, hash="b")])
    printed = " ".join(capsys.readouterr().out.split())
    assert "differ in data or protocol" in printed
    assert "mean of" not in printed


def test_without_controls_and_as_csv(main, make_run, capsys):
    main([make_run("one", 1, 0.2, 0.1, controls=False), "--format", "csv", "--metric", "hr@10"])
    header, line = capsys.readouterr().out.splitlines()
    assert header.startswith('run,data,seed,"LLM, distilled"')
    assert line == "one,shop,1,0.4000,–,0.2000,–,–,–"


def test_errors_are_one_line(main, make_run, tmp_path, fails):
    run = make_run("one", 1, 0.2, 0.1)
    (tmp_path / "bad.json").write_text('{"final": 1}')
    fails(main, [run, "--metric", "auc"], "No run has measured 'auc'; there are hr@10, mrr@10, ndcg@10")
    fails(main, [str(tmp_path)], "no results.json here")
    fails(main, [str(tmp_path / "bad.json")], "is not what a run writes")
    (tmp_path / "old.json").write_text(
        '{"final": {}, "dataset": {"name": "x", "items": 1}, "protocol": {}, "seed": 0}'
    )
    fails(main, [str(tmp_path / "old.json")], "is not what a run writes (KeyError: 'split')")
