# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil

import pytest

from llmd4rec_hf import CRMArguments, LLMRecommender, MutualDistillArguments, run_state
from llmd4rec_hf.errors import RunStateError
from llmd4rec_hf.files import write_json, write_manifest
from llmd4rec_hf.run_state import (
    STATE_NAME,
    STATE_VERSION,
    Phase,
    RunLock,
    read_results,
    read_state,
    run_identity,
    weights_facts,
)


PHASES = {"0-crm-distilled": {"seconds": 1}, "1-llm-distilled": {"seconds": 2}, "1-crm-distilled": {"seconds": 3}}
IDENTITY = {"config.rounds": 1, "vocabulary": "abc"}


@pytest.fixture
def folder(tmp_path):
    """A finished run of three phases, as far as its state goes."""
    for name in ("initial-crm", "initial-llm", *(f"{phase}/model" for phase in PHASES)):
        model = tmp_path / "phases" / name
        model.mkdir(parents=True)
        (model / "weights").write_text(name)
        write_manifest(model)
    state = {"version": STATE_VERSION, "identity": IDENTITY, "phases": PHASES, "finished": True}
    write_json(tmp_path / STATE_NAME, state)
    return tmp_path


@pytest.mark.parametrize(
    ("phase", "previous", "teacher"),
    [
        (Phase("crm", 0, "distilled"), None, None),
        (Phase("llm", 1, "distilled"), None, Phase("crm", 0, "distilled")),
        (Phase("crm", 1, "distilled"), Phase("crm", 0, "distilled"), Phase("llm", 1, "distilled")),
        (Phase("llm", 2, "distilled"), Phase("llm", 1, "distilled"), Phase("crm", 1, "distilled")),
        # Both arms begin with one warm-up.
        (Phase("llm", 1, "control"), None, Phase("crm", 0, "distilled")),
        (Phase("crm", 1, "control"), Phase("crm", 0, "distilled"), Phase("llm", 1, "control")),
        (Phase("crm", 2, "control"), Phase("crm", 1, "control"), Phase("llm", 2, "control")),
    ],
    ids=lambda phase: getattr(phase, "name", None),
)
def test_what_each_phase_builds_upon(phase, previous, teacher):
    assert (phase.previous, phase.teacher) == (previous, teacher)


def test_what_is_recorded_and_there_is_read_back(folder):
    state = read_state(folder, IDENTITY)
    assert state["phases"] == PHASES and list(state["phases"]) == list(PHASES)
    assert state["finished"]
    assert read_state(folder / "elsewhere", IDENTITY) is None


@pytest.mark.parametrize("gone", range(3))
def test_a_phase_whose_model_is_gone_goes_with_those_that_built_on_it(folder, gone):
    shutil.rmtree(folder / "phases" / list(PHASES)[gone] / "model")
    state = read_state(folder, IDENTITY)
    assert list(state["phases"]) == list(PHASES)[:gone]
    assert not state["finished"]


@pytest.mark.parametrize("version", [STATE_VERSION - 1, STATE_VERSION + 1])
def test_a_state_of_another_version_is_refused(folder, version):
    state = json.loads((folder / STATE_NAME).read_text())
    write_json(folder / STATE_NAME, state | {"version": version})
    with pytest.raises(RunStateError, match=f"of version {version}, this release reads {STATE_VERSION}"):
        read_state(folder, IDENTITY)


@pytest.mark.parametrize(
    ("identity", "difference"),
    [
        (IDENTITY | {"config.rounds": 2}, "config.rounds: 1 there, 2 here"),
        (IDENTITY | {"config.seed": 5}, "config.seed: None there, 5 here"),
        ({"vocabulary": "abc"}, "config.rounds: 1 there, None here"),
    ],
)
def test_what_differs_is_named_whichever_run_has_it(folder, identity, difference):
    with pytest.raises(RunStateError, match=difference):
        read_state(folder, identity)


@pytest.fixture
def identify(make_crm, make_llm, vocabulary, splits):
    """The identity of a run whose CRM is trained with these arguments, on these splits."""
    models = {"crm": make_crm(), "llm": make_llm()}

    def identify(sequences=splits, **crm_args) -> dict:
        args = {"crm": CRMArguments("x", use_cpu=True, **crm_args), "llm": MutualDistillArguments("x", use_cpu=True)}
        return run_identity({"rounds": 3}, args, models, vocabulary, sequences)

    return identify


def test_a_run_is_the_same_however_a_steps_rows_come_together(identify, monkeypatch):
    whole = identify(per_device_train_batch_size=16)
    assert whole["crm_args.rows_per_step"] == 16
    assert identify(per_device_train_batch_size=8, gradient_accumulation_steps=2) == whole
    assert identify(per_device_train_batch_size=8) != whole
    monkeypatch.setattr(CRMArguments, "world_size", 2)
    assert identify(per_device_train_batch_size=8) == whole
    split = identify(per_device_train_batch_size=16, accelerator_config={"split_batches": True})
    assert split["crm_args.rows_per_step"] == 16


def test_where_and_how_a_run_goes_on_makes_it_no_other(identify):
    whole = identify()
    for name, value in {
        "disable_tqdm": True,
        "log_level": "error",
        "report_to": "none",
        "hub_model_id": "someone/something",
        "per_device_eval_batch_size": 3,
        "eval_accumulation_steps": 2,
        "loss_chunk_size": 5,
        "save_total_limit": 2,
    }.items():
        assert identify(**{name: value}) == whole, name
    assert identify(kl_weight=3.0) != whole


def test_what_an_adapter_was_asked_for_counts(identify, monkeypatch):
    whole = identify()
    monkeypatch.setattr(LLMRecommender, "added_settings", lambda model: {"adapter.r": 8})
    assert identify() == whole | {"llm.adapter.r": 8}


def test_every_split_counts(identify, splits):
    whole = identify()
    for name in splits:
        changed = identify({**splits, name: splits[name].select([1, 0])})
        assert [key for key in whole if changed[key] != whole[key]] == [f"sequences.{name}"]


def test_the_weights_of_both_models_vouch_for_the_results(tmp_path):
    weights = ["crm/model.safetensors", "llm/adapter_model.safetensors", "llm/model.safetensors"]
    for name in (*weights, "llm/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    write_json(tmp_path / "results.json", {"seed": 1})
    facts = weights_facts(tmp_path)
    assert list(facts) == weights
    for name in weights:
        assert read_results(tmp_path, "results.json", facts) == {"seed": 1}
        (tmp_path / name).write_text("torn")
        assert read_results(tmp_path, "results.json", facts) is None
        (tmp_path / name).write_text(name)


def test_a_lock_ends_with_its_block(tmp_path, monkeypatch):
    monkeypatch.setattr(run_state, "_LOCK_SECONDS", 0)
    first = RunLock(tmp_path)
    with first, pytest.raises(RunStateError, match="Another run works in"), RunLock(tmp_path):
        pass
    with RunLock(tmp_path):
        pass


def test_processes_that_do_not_find_the_same_folder_say_so_at_the_start(tmp_path, monkeypatch):
    with monkeypatch.context() as another:
        # It is made by the main process alone, and that has it elsewhere.
        another.setattr(run_state, "on_main_process", lambda work: None)
        with (
            pytest.raises(RunStateError, match="all processes have to find the same folder"),
            RunLock(tmp_path / "run"),
        ):
            pass
    with monkeypatch.context() as main:

        def fail(work):
            raise RunStateError("process 1: there is none")

        main.setattr(run_state, "on_every_process", fail)
        with pytest.raises(RunStateError, match="process 1"), RunLock(tmp_path / "run"):
            pass
    with RunLock(tmp_path / "run"):
        pass
