# SPDX-License-Identifier: Apache-2.0
"""The tables of quality say what the result files do, and a result says how it was made."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest


QUALITY = Path(__file__).resolve().parents[2] / "benchmarks" / "quality"


@pytest.fixture
def load_script(monkeypatch):
    """A function from a script's name to its module."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(QUALITY), str(QUALITY.parent)])

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"quality_{name}", QUALITY / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        # dataclasses look up annotations in the module.
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_the_page_is_what_the_results_give(load_script, capsys):
    load_script("table").main()
    assert capsys.readouterr().out == (QUALITY / "README.md").read_text(encoding="utf-8")


def test_seeds_whose_training_had_not_ended_are_counted(load_script):
    seeds = load_script("table")._seeds
    rising, done, none = ({"training": {"history": [0.1, 0.2, last]}} for last in (0.21, 0.2, 0.0))
    assert seeds([rising, done, none]) == "3, 1 rising"
    assert seeds([done, {"training": None}]) == "2"


@pytest.mark.parametrize(
    ("name", "needs"),
    [("sasrec", False), ("ensemble_crms", True), ("llm", True), ("sasrec_titles", True), ("sasrec_second", True)],
)
def test_a_row_without_its_llm_is_refused_before_anything_is_trained(load_script, monkeypatch, capsys, name, needs):
    run = load_script("run")
    monkeypatch.setattr(run, "Study", lambda *_: sys.exit("begun"))
    with pytest.raises(SystemExit) as stop:
        run.main([name, "--data", "folder"])
    assert (stop.value.code == 2) == needs
    assert ("give its folder or Hub id as --backbone" in capsys.readouterr().err) == needs


def test_a_result_names_the_llm_and_the_precision_that_made_it(load_script, tmp_path):
    run = load_script("run")
    options = argparse.Namespace(name="llm", data=tmp_path / "shop", backbone=str(tmp_path), seed=1, bf16=False)
    made_by = f"python benchmarks/quality/run.py llm --data shop --backbone {tmp_path.name} --seed 1 --no-bf16"
    assert run.command_of(options) == made_by
    options = argparse.Namespace(name="sasrec", data=tmp_path / "shop", backbone=None, seed=0, bf16=True)
    assert run.command_of(options) == "python benchmarks/quality/run.py sasrec --data shop --seed 0"
    options.backbone = "Qwen/Qwen2.5-0.5B"
    assert "--backbone Qwen/Qwen2.5-0.5B" in run.command_of(options)
