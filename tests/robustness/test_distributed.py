# SPDX-License-Identifier: Apache-2.0
"""Two processes give the answer of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
from accelerate.commands.config.config_args import load_config_from_file
from tiny_runs import in_processes, results_of


# 31 users with something to train on do not divide by the rows of a step: the last batch of an epoch is ragged.
CASES = {
    "crm, whole batches": {"kind": "crm", "users": 32},
    "crm, ragged": {"kind": "crm", "users": 27},
    "crm, ragged, a process without rows of its own": {"kind": "crm", "users": 18},
    "crm, ragged, divided by the batch, accumulated": {
        "kind": "crm",
        "users": 27,
        "loss_normalization": "batch",
        "gradient_accumulation_steps": 2,
    },
    # Whose size is that of all processes together.
    "crm, ragged, batches that are split": {
        "kind": "crm",
        "users": 27,
        "per_device_train_batch_size": 16,
        "accelerator_config": {"split_batches": True},
    },
    "crm, ragged, a sample of the items": {"kind": "crm", "users": 27, "num_sampled_items": 5},
    "crm, a sample of the items, a process without rows of its own": {
        "kind": "crm",
        "users": 18,
        "num_sampled_items": 5,
        "gradient_accumulation_steps": 2,
    },
    "crm, a budget of positions": {"kind": "crm", "users": 32, "max_positions_per_batch": 24},
    # Five batches, the last of which is cut for the second process.
    "crm, a budget of positions, ragged": {"kind": "crm", "users": 27, "max_positions_per_batch": 24},
    "llm, ragged": {"kind": "llm", "users": 27},
    "llm, a sample of the items": {"kind": "llm", "users": 27, "num_sampled_items": 5},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What each case gives with one process and with two, on the same rows per step."""
    folder = tmp_path_factory.mktemp("trained")
    for processes, rows in ((1, 16), (2, 8)):
        outcome = in_processes(
            tiny_runs.train_cases, CASES, rows, str(folder / f"{processes}"), processes=processes, log=folder / "log"
        )
        assert outcome.codes == [0] * processes, outcome.output
    return [json.loads((folder / f"{processes}.json").read_text()) for processes in (1, 2)]


@pytest.mark.parametrize("case", CASES)
def test_a_training_has_the_same_losses_and_metrics(trained, case):
    one, two = (results[case] for results in trained)
    assert len(one["losses"]) == one["steps"] > 1
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert two["kl"] == pytest.approx(one["kl"], abs=1e-5)
    assert two["weights"] == pytest.approx(one["weights"], abs=1e-5)
    # `Trainer` takes a batch that is split for so many, and the last one, which is not full, for too little.
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], abs=1e-2 if "split" in case else 1e-5)
    assert two["metrics"] == one["metrics"]
    assert two["ranks"] == one["ranks"]


def test_an_epoch_that_is_resumed_goes_on_with_its_own_batches(tmp_path):
    cases = {
        "buckets": {"per_device_train_batch_size": 4},
        "budget": {"max_positions_per_batch": 20},
    }
    out = tmp_path / "resumed"
    outcome = in_processes(tiny_runs.resume_cases, cases, str(out), processes=2, log=tmp_path / "log")
    assert outcome.codes == [0, 0], outcome.output
    results = json.loads(Path(f"{out}.json").read_text())
    assert all(result["equal"] and result["steps"] >= 9 for result in results.values()), results


@pytest.mark.parametrize("users", [32, 27])
def test_a_whole_run_has_the_same_results(tmp_path, users):
    """27 users: ragged batches everywhere, and shards of unequal size in the teacher caches."""
    for processes, rows in ((1, 16), (2, 8)):
        outcome = in_processes(
            tiny_runs.run,
            str(tmp_path / f"{processes}"),
            users=users,
            rows_per_process=rows,
            dropout=0.0,
            processes=processes,
            log=tmp_path / f"log{processes}",
        )
        assert outcome.codes == [0] * processes, outcome.output
    one, two = results_of(tmp_path / "1"), results_of(tmp_path / "2")
    assert two["final"] == one["final"]
    for here, there in zip(one["rounds"], two["rounds"], strict=True):
        assert {k: v for k, v in here.items() if k != "distillation"} == {
            k: v for k, v in there.items() if k != "distillation"
        }
        for side in ("crm", "llm"):
            assert there["distillation"][side] == pytest.approx(here["distillation"][side], abs=1e-5)


def test_a_signal_to_one_process_stops_both_at_the_same_step_and_both_go_on(tmp_path):
    folder, settings = str(tmp_path / "run"), {"rows_per_process": 8, "rounds": 1}
    stopped = in_processes(tiny_runs.stop_on_rank, folder, 1, **settings, processes=2, log=tmp_path / "stopped")
    assert stopped.codes == [143, 143], stopped.output
    assert stopped.output.count("in LLM round 1 after step 1. Everything is saved") == 2
    again = in_processes(tiny_runs.run, folder, **settings, processes=2, log=tmp_path / "again")
    assert again.codes == [0, 0], again.output
    whole = in_processes(tiny_runs.run, str(tmp_path / "whole"), **settings, processes=2, log=tmp_path / "whole-log")
    assert whole.codes == [0, 0], whole.output
    assert results_of(folder) == results_of(tmp_path / "whole")


def test_a_failure_on_one_process_is_that_of_all(tmp_path):
    outcome = in_processes(tiny_runs.fail_on_rank, str(tmp_path), 1, processes=2, log=tmp_path / "log", timeout=60)
    assert outcome.codes == [1, 1], outcome.output
    # Both while the cache is built, and on what only the main process does.
    assert outcome.output.count("CacheError: process 1: the disk of rank 1") == 1
    assert outcome.output.count("CacheError: the disk of rank 1") == 1


def test_a_loss_that_is_not_finite_on_one_process_ends_both(tmp_path):
    outcome = in_processes(
        tiny_runs.diverge_on_rank, str(tmp_path / "run"), 1, processes=2, log=tmp_path / "log", timeout=60
    )
    assert outcome.codes == [1, 1], outcome.output
    assert outcome.output.count("The loss is not finite in CRM warm-up at step 3") == 2


@pytest.mark.parametrize("kind", ["crm", "llm"])
def test_a_model_in_shards_has_the_same_losses(tmp_path, kind):
    """By torch's FSDP2 itself: `accelerate` cuts models over accelerators alone, and over CPUs makes copies."""
    for processes in (1, 2):
        outcome = in_processes(
            tiny_runs.train_in_shards,
            str(tmp_path / f"{processes}.json"),
            kind,
            False,
            processes=processes,
            log=tmp_path / f"log{processes}",
            timeout=60,
        )
        assert outcome.codes == [0] * processes, outcome.output
    one, two = (json.loads((tmp_path / f"{processes}.json").read_text()) for processes in (1, 2))
    assert one[-1] < one[0]
    assert two == pytest.approx(one, abs=1e-5)


CONFIGURATIONS = sorted((Path(__file__).parents[2] / "examples" / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_reads_our_configurations(path):
    """And each says what it was tested on."""
    configuration = load_config_from_file(str(path))
    assert configuration.num_processes >= 1
    assert "# Tested on: " in path.read_text()


@pytest.mark.slow
def test_launched_by_accelerate_as_the_documentation_says(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text(
        "user_id,item_id,timestamp\n" + "".join(f"{u},{(u + t) % 7},{t}\n" for u in range(9) for t in range(6))
    )
    script = Path(__file__).parents[2] / "examples" / "train.py"
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--mixed_precision", "no", str(script), "--dataset", str(log), "--use_cpu", "--rounds", "1"]
    command += ["--output_dir", str(tmp_path / "run"), "--crm_num_train_epochs", "1", "--llm_num_train_epochs", "1"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(script.parents[1])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert results_of(tmp_path / "run")["final"]["llm"]["test"]
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["identity"]["llm_args.rows_per_step"] == 2 * 64
