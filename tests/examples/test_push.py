# SPDX-License-Identifier: Apache-2.0
"""That `--push_to_hub` hands the finished run over; what is pushed then is tested in `tests/training/test_hub.py`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_example_push", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_finished_run_is_pushed(script, small_log, tmp_path, monkeypatch, capsys):
    log, folder, pushed = tmp_path / "log.csv", tmp_path / "run", []
    small_log.to_csv(log, index=False)

    def push_run(output_dir, hub_model_id):
        assert Path(output_dir, "results.json").is_file()
        pushed.append((str(output_dir), hub_model_id))
        return [f"{hub_model_id}-crm", f"{hub_model_id}-llm"]

    monkeypatch.setattr(script, "push_run", push_run)
    words = ["--dataset", str(log), "--output_dir", str(folder), "--use_cpu", "--rounds", "1", "--no-controls"]
    words += ["--crm_num_train_epochs", "1", "--llm_num_train_epochs", "1", "--hidden_size", "8"]
    script.main(words)
    assert pushed == []
    script.main([*words, "--push_to_hub", "--hub_model_id", "user/walk"])
    assert pushed == [(str(folder), "user/walk")]
    assert "user/walk-crm and user/walk-llm" in " ".join(capsys.readouterr().out.split())
