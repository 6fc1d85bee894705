# SPDX-License-Identifier: Apache-2.0
"""A run that is killed or stopped, wherever it is, ends with the numbers of one that was not."""

from __future__ import annotations

import json
import signal

import pytest
import tiny_runs
from tiny_runs import in_processes, results_of

from llmd4rec_hf.errors import RunStateError
from llmd4rec_hf.run_state import RunLock


# Where the process dies: the event, what it happens to, and at which time of its happening.
DEATHS = {
    "first model half saved": ("model", "*initial-llm.partial", 1),
    "first state not in place": ("rename", "*/state.json", 1),
    "warm-up, first epoch": ("step", "*0-crm*", 2),
    "warm-up, optimizer of a checkpoint torn": ("torn torch.save", "*0-crm*checkpoint-4/optimizer.pt", 1),
    "warm-up's model not in place": ("rename", "*0-crm-distilled/model", 1),
    "cache for the LLM half written": ("cache", "*", 1),
    "cache for the LLM not in place": ("rename", "*1-llm-distilled/_teacher_cache", 1),
    "LLM, second epoch": ("step", "*1-llm*", 3),
    "LLM, state of its last checkpoint torn": ("torn trainer state", "*1-llm*checkpoint-4/*", 1),
    "LLM, checkpoint not closed": ("rename", "*1-llm*/checkpoint-2/manifest.json", 1),
    "phase not recorded": ("rename", "*/state.json", 3),
    "CRM, evaluation": ("evaluation", "*1-crm*", 2),
    "CRM, phase half cleared away": ("removal", "*1-crm-distilled/*", 1),
    "LLM, round 2": ("step", "*2-llm*", 4),
    "CRM, round 2, random state torn": ("torn torch.save", "*2-crm*checkpoint-6/rng_state.pth", 1),
    "best model not in place": ("rename", "*/crm", 1),
    "results not in place": ("rename", "*/results.json", 1),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The results of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = in_processes(tiny_runs.run, str(folder / "run"), log=folder / "log")
    assert outcome.codes == [0], outcome.output
    return results_of(folder / "run")


@pytest.mark.parametrize("death", DEATHS)
def test_killed_anywhere_and_started_again_it_ends_with_the_same_numbers(uninterrupted, tmp_path, death):
    folder = str(tmp_path / "run")
    killed = in_processes(tiny_runs.run, folder, die=DEATHS[death], log=tmp_path / "killed")
    assert killed.codes == [-signal.SIGKILL], killed.output
    # With other initial weights: what counts is on disk, as soon as the first state is.
    seed = 0 if "first" in death else 5
    again = in_processes(tiny_runs.run, folder, seed=seed, log=tmp_path / "again")
    assert again.codes == [0], again.output
    assert results_of(folder) == uninterrupted


@pytest.mark.parametrize(
    ("event", "where", "code"),
    [
        (("stop at step", "*0-crm*", 3), "in CRM warm-up after step 3", 143),
        (("ctrl-c at step", "*1-llm*", 1), "in LLM round 1 after step 1", 130),
        # The last step of an epoch: its evaluation still comes.
        (("stop at step", "*1-llm*", 2), "in LLM round 1 after step 2", 143),
        (("stop at evaluation", "*2-llm*", 3), "after LLM round 2", 143),
    ],
)
def test_a_signal_stops_at_the_next_step_and_the_run_goes_on_from_there(uninterrupted, tmp_path, event, where, code):
    folder = str(tmp_path / "run")
    stopped = in_processes(tiny_runs.run, folder, die=event, log=tmp_path / "stopped")
    assert stopped.codes == [code], stopped.output
    assert f"{where}. Everything is saved: started again with the same output_dir" in stopped.output
    again = in_processes(tiny_runs.run, folder, seed=5, log=tmp_path / "again")
    assert again.codes == [0], again.output
    assert results_of(folder) == uninterrupted


def test_signals_have_their_old_handlers_back_after_a_run(tmp_path, unrendered):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    tiny_runs.make_run(tmp_path / "run", rounds=1).run()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_two_runs_in_one_folder_are_refused_and_the_first_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("llmd4rec_hf.run_state._LOCK_SECONDS", 0)
    with RunLock(tmp_path / "run"):
        holder = json.loads((tmp_path / "run" / ".lock_holder.json").read_text())
        with pytest.raises(RunStateError, match=f"Another run works in .*run \\(process {holder['pid']} on "):
            tiny_runs.make_run(tmp_path / "run").run()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    died = in_processes(tiny_runs.run, str(tmp_path / "run"), die=("step", "*", 1), log=tmp_path / "log")
    assert died.codes == [-signal.SIGKILL]
    assert (tmp_path / "run" / ".lock_holder.json").is_file()
    with RunLock(tmp_path / "run"):
        pass
