# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest
import torch
from matplotlib.figure import Figure
from trained import weights

from llmd4rec_hf import (
    CRMArguments,
    CRMTrainer,
    ItemVocabulary,
    LLMRecommender,
    MutualDistillArguments,
    MutualDistillation,
    MutualDistillationConfig,
    SASRecModel,
    TeacherCache,
    mutual_distillation,
)
from llmd4rec_hf.errors import ConfigurationError, RunStateError
from llmd4rec_hf.run_state import Phase


pytestmark = pytest.mark.usefixtures("unrendered")
RENDER = Figure.savefig


class Interrupted(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture
def make_run(make_crm, make_llm, splits, vocabulary, tmp_path):
    """A run over two rounds, with fresh models that differ by `seed` from any before."""

    def make(name: str, seed: int = 0, llm_args=None, crm_args=None, items=vocabulary, **config) -> MutualDistillation:
        shared = {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 16}
        llm_settings = {"num_train_epochs": 2, "learning_rate": 5e-3, **(llm_args or {})}
        crm_settings = {"num_train_epochs": 3, "learning_rate": 1e-2, **(crm_args or {})}
        settings = {"rounds": 2, "tolerance": -1.0, "dataset_name": "walk", **config}
        return MutualDistillation(
            make_llm(seed, dropout=0.1),
            make_crm(seed, dropout=0.2),
            splits,
            items,
            MutualDistillationConfig(str(tmp_path / name), **settings),
            MutualDistillArguments("unused", **shared, **llm_settings),
            CRMArguments("unused", **shared, **crm_settings),
        )

    return make


def without_times(results: dict) -> dict:
    return {key: value for key, value in results.items() if key != "seconds"}


@pytest.fixture(scope="module")
def memory() -> dict:
    """Results that several tests compare with."""
    return {}


@pytest.fixture
def whole(make_run, memory, tmp_path):
    """The results of a run that nothing interrupted, made once."""
    if "whole" not in memory:
        memory["folder"] = tmp_path / "whole"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", RENDER)  # this one as a user's
            memory["whole"] = make_run("whole").run()
    return memory["whole"]


def test_results_have_the_documented_shape(whole, memory):
    assert whole == json.loads((memory["folder"] / "results.json").read_text())
    assert set(whole) == {"dataset", "protocol", "settings", "seed", "versions", "rounds", "final", "seconds"}
    assert [entry["round"] for entry in whole["rounds"]] == [0, 1, 2]
    assert whole["rounds"][0]["llm"] is None
    assert whole["rounds"][1]["crm"]["test"] is None
    assert set(whole["rounds"][1]["distillation"]["llm"]) == {"kl", "weight_mean", "agreement"}
    assert set(whole["final"]) == {"crm", "llm", "crm_without_distillation", "llm_without_distillation"}
    for entry in whole["final"].values():
        assert set(entry) == {"round", "validation", "late_gain", "test"}
        assert entry["late_gain"] >= 0
        assert set(entry["test"]) == {f"{m}@{k}" for m in ("hr", "ndcg", "mrr") for k in (5, 10, 20)}
    assert whole["protocol"] == {
        "split": "leave_one_out",
        "seen_items": "masked",
        "ties": "pessimistic",
        "ranking": "full",
    }
    assert len(whole["seconds"]) == 1 + 2 * 2 * 2
    assert (memory["folder"] / "report.md").is_file()
    # A phase leaves its model alone: no checkpoints, and no cache of its teacher.
    assert {path.name for path in (memory["folder"] / "phases").glob("[0-9]*/*")} == {"model"}
    assert (memory["folder"] / "report.png").is_file()


def test_each_side_keeps_its_best_round_by_validation(whole):
    for side, key in (("crm", "crm"), ("llm", "llm"), ("crm", "crm_control"), ("llm", "llm_control")):
        final = whole["final"][side if key == side else f"{side}_without_distillation"]
        values = {e["round"]: e[key]["validation"]["ndcg@10"] for e in whole["rounds"] if e[key] is not None}
        assert final["validation"]["ndcg@10"] == max(values.values())
        assert values[final["round"]] == max(values.values())


def test_the_last_log_of_a_distillation_is_its_state():
    logs = [{"loss": 3.0, "kl": 0.5}, {"loss": 2.0, "kl": 0.4}, {"eval_loss": 1.0}, {"kl": 0.1}]
    assert mutual_distillation._last_logged(logs, ("loss", "kl")) == {"loss": 2.0, "kl": 0.4}
    assert mutual_distillation._last_logged(logs, ("agreement",)) is None


def test_how_a_training_ended_is_seen_before_its_best_model_is_back(make_run, monkeypatch):
    seen = []
    monkeypatch.setattr(mutual_distillation, "late_gain", lambda history: seen.append(len(history)))
    make_run("ended", rounds=1, controls=False).run()
    assert seen == [3, 2, 3]


def test_the_two_models_on_disk_are_the_tested_ones(whole, memory, splits, tmp_path):
    for side, model_class in (("crm", SASRecModel), ("llm", LLMRecommender)):
        model = model_class.from_pretrained(memory["folder"] / side)
        trainer = CRMTrainer(model, CRMArguments(str(tmp_path), use_cpu=True, disable_tqdm=True))
        metrics = trainer.predict(splits["test"]).metrics
        assert {name: metrics[f"test_{name}"] for name in whole["final"][side]["test"]} == pytest.approx(
            whole["final"][side]["test"]
        )
        assert len(model.recommend([["i03", "i04"]], k=3).ids[0]) == 3


def test_interrupted_after_every_phase_it_ends_with_the_same_numbers(whole, make_run, monkeypatch):
    """Begins again with other initial weights each time: what counts is on disk."""
    write_state = MutualDistillation._write_state

    def write_and_die(run):
        write_state(run)
        raise Interrupted

    monkeypatch.setattr(MutualDistillation, "_write_state", write_and_die)
    deaths = 0
    while deaths < 50:
        try:
            results = make_run("cut", seed=deaths).run()
            break
        except Interrupted:
            deaths += 1
    # Once for the initial state, after each of nine phases, and after the results.
    assert deaths == 11
    assert without_times(results) == without_times(whole)


def test_interrupted_inside_phases_it_ends_with_the_same_numbers(whole, make_run, monkeypatch):
    """The training dies in the last epoch of each; the checkpoint of the epoch before is found and gone on from."""
    training_step = CRMTrainer.training_step
    deadly = ["0-crm-distilled", "1-llm-distilled", "2-crm-distilled"]

    def die_late(trainer, *args, **kwargs):
        late = trainer.state.epoch >= trainer.args.num_train_epochs - 0.7
        if deadly and trainer.args.output_dir.endswith(deadly[0]) and late:
            raise Interrupted(deadly.pop(0))
        return training_step(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("llmd4rec_hf.training.trainer.DistillationTrainer.training_step", die_late, raising=False)
        for seed, phase in enumerate(deadly.copy()):
            with pytest.raises(Interrupted, match=phase):
                make_run("cut", seed=seed).run()
    assert without_times(make_run("cut", seed=5).run()) == without_times(whole)


def test_a_finished_run_is_not_run_again(whole, make_run, memory, monkeypatch):
    run = make_run("whole", seed=3)
    run.output_dir = memory["folder"]
    monkeypatch.setattr(MutualDistillation, "_run_phase", None)
    assert run.run() == whole
    assert_models_are_the_saved_ones(run)


def test_the_models_in_memory_are_the_best_ones_in_the_end(make_run):
    """And not those of the control, which is tested last."""
    run = make_run("memory", rounds=1)
    run.run()
    assert_models_are_the_saved_ones(run)
    control = SASRecModel.from_pretrained(run._model_folder(Phase("crm", 1, "control")))
    assert not torch.equal(weights(run.models["crm"]), weights(control))


def assert_models_are_the_saved_ones(run: MutualDistillation) -> None:
    for side, model_class in (("crm", SASRecModel), ("llm", LLMRecommender)):
        saved = model_class.from_pretrained(run.output_dir / side)
        assert torch.equal(weights(run.models[side]), weights(saved))


def test_what_decided_a_run_is_written_down(make_run):
    run = make_run("settings", rounds=1, controls=False, crm_args={"kl_weight": 3.0, "weight_decay": 0.1})
    settings = run.run()["settings"]
    expected = {
        "config.rounds": 1,
        "config.refresh": "copy",
        "crm_args.kl_weight": 3.0,  # as it is not by default
        "crm_args.weight_decay": 0.1,
        "llm_args.kl_weight": 0.5,  # asked for
        "llm_args.learning_rate": 5e-3,
        "crm_args.rows_per_step": 16,
        "crm.hidden_size": 8,
        "crm.dropout": 0.2,
        "llm.item_dim": 8,
    }
    assert {key: settings.get(key) for key in expected} == expected
    assert len(settings["sequences.train"]) == len(settings["vocabulary"]) == 64
    # What is as it always is would hide the rest.
    assert len(settings) < 70 and "crm_args.adam_beta1" not in settings
    # The seed stands beside, and what is not set is not there.
    assert "config.seed" not in settings and None not in settings.values()
    assert "| crm_args.kl_weight | 3.0 |" in (run.output_dir / "report.md").read_text()


def test_a_run_that_began_with_other_weights_goes_on_with_them_and_says_so(make_run, monkeypatch):
    make_run("begun", rounds=1, controls=False).run()
    heard = []
    monkeypatch.setattr(mutual_distillation.logger, "warning", heard.append)
    make_run("begun", rounds=1, controls=False).run()
    assert heard == []
    make_run("begun", seed=5, rounds=1, controls=False).run()
    assert len(heard) == 1 and "began with other weights" in heard[0]


@pytest.mark.parametrize(
    ("strategy", "evaluations"),
    [({"eval_strategy": "epoch"}, [3, 2, 3]), ({"eval_strategy": "steps", "eval_steps": 1}, [9, 6, 9])],
)
def test_a_side_is_evaluated_as_its_arguments_say(make_run, monkeypatch, strategy, evaluations):
    seen = []
    monkeypatch.setattr(mutual_distillation, "late_gain", lambda history: seen.append(len(history)))
    settings = {**strategy, "seen_items": "keep"}
    results = make_run("own", rounds=1, controls=False, crm_args=settings, llm_args=settings).run()
    assert seen == evaluations
    assert results["protocol"]["seen_items"] == "kept"


@pytest.mark.parametrize("evaluated", [{}, {"eval_strategy": "epoch", "save_strategy": "epoch"}])
@pytest.mark.parametrize("side", ["crm", "llm"])
def test_one_side_alone_may_be_in_half_precision(make_run, side, evaluated):
    sides = {f"{name}_args": {"bf16": name == side, **evaluated} for name in ("crm", "llm")}
    results = make_run("mixed", rounds=1, controls=False, **sides).run()
    assert results["final"]["crm"]["test"] and results["final"]["llm"]["test"]


def test_what_is_set_for_a_side_is_kept_in_its_phases(make_run):
    settings = {"metric_for_best_model": "loss", "greater_is_better": False, "data_seed": 5, "save_total_limit": 3}
    run = make_run("kept", crm_args=settings)
    args = run._phase_args(Phase("crm", 2, "distilled"))
    assert (args.metric_for_best_model, args.greater_is_better) == ("loss", False)
    # Rounds must not see the same batches again.
    assert args.data_seed == 2005
    assert args.save_total_limit == 3
    # Where nothing is said, the best epoch by validation is what a phase ends with.
    args = run._phase_args(Phase("llm", 1, "distilled"))
    assert (args.metric_for_best_model, args.greater_is_better, args.load_best_model_at_end) == ("ndcg@10", True, True)
    assert (args.eval_strategy, args.save_strategy, args.save_total_limit) == ("epoch", "epoch", 1)
    # And one that was stopped goes on with the patience that it had left.
    assert args.restore_callback_states_from_checkpoint


def test_control_arm_has_the_same_warm_up_and_no_teacher(make_run, monkeypatch):
    run = make_run("arms", rounds=1)
    seen = []
    build = run._trainer

    def record(phase):
        trainer = build(phase)
        seen.append((phase.name, type(trainer).__name__, trainer.teacher is not None, trainer.args.seed))
        return trainer

    monkeypatch.setattr(run, "_trainer", record)
    run.run()
    assert seen == [
        ("0-crm-distilled", "CRMTrainer", False, 42),
        ("1-llm-distilled", "MutualDistillTrainer", True, 1042),
        ("1-crm-distilled", "CRMTrainer", True, 1042),
        ("1-llm-control", "MutualDistillTrainer", False, 1042),
        ("1-crm-control", "CRMTrainer", False, 1042),
    ]


@pytest.mark.parametrize(("refresh", "same"), [("copy", False), ("off", True)])
def test_refresh_injects_the_crms_vectors_each_round(make_run, monkeypatch, refresh, same):
    run = make_run(f"refresh-{refresh}", refresh=refresh, controls=False)
    tables = []
    train = type(run)._run_phase

    def record(self, phase):
        train(self, phase)
        if phase.side == "llm":
            tables.append(self.models["llm"].item_vectors.clone())

    monkeypatch.setattr(MutualDistillation, "_run_phase", record)
    results = run.run()
    assert torch.equal(tables[0], tables[1]) == same
    first = SASRecModel.from_pretrained(run._model_folder(Phase("crm", 0, "distilled"))).item_matrix().detach()[1:]
    torch.testing.assert_close(tables[0][1:], first / first.square().mean().sqrt())
    assert results["final"]["crm_without_distillation"] is None
    assert results["rounds"][1]["llm_control"] is None


@pytest.mark.parametrize(
    ("fresh", "llm", "crm"),
    [
        ("none", "1-llm-distilled/model", "1-crm-distilled/model"),
        ("llm", "initial-llm", "1-crm-distilled/model"),
        ("both", "initial-llm", "initial-crm"),
    ],
)
def test_a_fresh_student_begins_each_round_with_its_initial_weights(make_run, fresh, llm, crm):
    run = make_run("fresh", fresh_students=fresh)
    phases = run.output_dir / "phases"
    assert run._start_of(Phase("llm", 2, "distilled")) == phases / llm
    assert run._start_of(Phase("crm", 2, "distilled")) == phases / crm
    assert run._start_of(Phase("crm", 0, "distilled")) == phases / "initial-crm"


def test_both_models_can_teach_the_crm(make_run, monkeypatch):
    run = make_run("both", crm_teachers="both", controls=False)
    seen = []
    build = run._trainer

    def record(phase):
        trainer = build(phase)
        if phase.name == "2-crm-distilled":
            llm, crm = trainer.teacher.members
            last_round = SASRecModel.from_pretrained(run._model_folder(Phase("crm", 1, "distilled")))
            # The student must not teach itself.
            assert crm is not run.models["crm"]
            seen.append((llm is run.models["llm"], crm.content_hash() == last_round.content_hash()))
        elif phase.round > 0:
            seen.append(type(trainer.teacher).__name__)
        return trainer

    monkeypatch.setattr(run, "_trainer", record)
    results = run.run()
    assert seen == ["SASRecModel", "RecommenderEnsemble", "SASRecModel", (True, True)]
    assert results["rounds"][2]["distillation"]["crm"]["kl"] > 0


def test_it_stops_when_neither_model_gets_better(make_run):
    still = {"learning_rate": 0.0, "num_train_epochs": 1}
    results = make_run("still", rounds=5, tolerance=0.0, controls=False, llm_args=still, crm_args=still).run()
    assert [entry["round"] for entry in results["rounds"]] == [0, 1, 2]
    # Of equals the first.
    assert (results["final"]["crm"]["round"], results["final"]["llm"]["round"]) == (0, 1)


@pytest.mark.parametrize(
    ("crm", "llm", "tolerance", "stops"),
    [
        ([0.1, 0.2, 0.2], [0.1, 0.1], 0.0, True),
        ([0.1, 0.2, 0.3], [0.1, 0.1], 0.0, False),
        ([0.1, 0.2, 0.2], [0.1, 0.2], 0.0, False),
        # The best ones were those of earlier rounds, and stay.
        ([0.3, 0.1, 0.2], [0.2, 0.1], 0.0, True),
        ([0.1, 0.2, 0.24], [0.1, 0.14], 0.05, True),
        ([0.1, 0.2, 0.24], [0.1, 0.14], 0.03, False),
        ([0.1, 0.1], [0.1], 0.0, False),
    ],
)
def test_a_run_goes_on_as_long_as_one_model_gets_better(make_run, crm, llm, tolerance, stops):
    run = make_run("rounds", tolerance=tolerance)
    phases = {Phase("crm", number, "distilled").name: value for number, value in enumerate(crm)}
    phases |= {Phase("llm", number, "distilled").name: value for number, value in enumerate(llm, start=1)}
    run.state = {"phases": {name: {"validation": {"ndcg@10": value}} for name, value in phases.items()}}
    assert run._converged(len(llm)) == stops


def test_a_folder_of_another_run_is_refused(make_run):
    make_run("taken", rounds=1, controls=False).run()
    with pytest.raises(RunStateError, match=r"crm_args.num_train_epochs: 3 there, 4 here"):
        make_run("taken", rounds=1, controls=False, crm_args={"num_train_epochs": 4}).run()


def test_a_budget_of_positions_is_the_runs_own(make_run):
    """Rows per process do not count under it; batches per step do."""
    budget = {"max_positions_per_batch": 24}
    run = make_run("budget", crm_args=budget)
    assert run._phase_args(Phase("crm", 0, "distilled")).max_positions_per_batch == 24
    identity = run._identity()
    assert identity["crm_args.max_positions_per_batch"] == 24
    assert identity["crm_args.batches_per_step"] == 1
    assert "crm_args.rows_per_step" not in identity
    assert identity["llm_args.rows_per_step"] == 16
    accumulated = make_run("budget", crm_args={**budget, "gradient_accumulation_steps": 2})
    assert accumulated._identity()["crm_args.batches_per_step"] == 2


def test_a_damaged_state_is_named(make_run):
    run = make_run("damaged")
    run.output_dir.mkdir()
    (run.output_dir / "state.json").write_text('{"phases": ')
    with pytest.raises(RunStateError, match="state.json is damaged"):
        run.run()


def test_models_that_do_not_go_together_are_named(make_crm, make_llm, splits, vocabulary, tmp_path):
    config = MutualDistillationConfig(str(tmp_path))
    with pytest.raises(ConfigurationError, match="LLM reads 6 items and the CRM 4, of histories of up to 6"):
        MutualDistillation(make_llm(), make_crm(max_length=4), splits, vocabulary, config)
    # Beyond the longest history it makes no difference.
    MutualDistillation(make_llm(), make_crm(max_length=9), splits, vocabulary, config)
    with pytest.raises(ConfigurationError, match="llm must be a LLMRecommender, got SASRecModel"):
        MutualDistillation(make_crm(), make_crm(), splits, vocabulary, config)


def test_a_run_goes_on_with_what_a_full_disk_or_memory_asks_for(make_run):
    make_run("again", rounds=1, controls=False).run()
    changed = {"per_device_eval_batch_size": 3, "save_total_limit": 2, "loss_chunk_size": 5}
    results = make_run("again", rounds=1, controls=False, crm_args=changed, llm_args=changed).run()
    assert results["final"]["crm"]["test"]


def test_bad_arguments_are_named(make_run, tmp_path):
    with pytest.raises(ConfigurationError, match="rounds must be at least 1"):
        MutualDistillationConfig(str(tmp_path), rounds=0)
    with pytest.raises(ConfigurationError, match="refresh must be one of"):
        MutualDistillationConfig(str(tmp_path), refresh="ema")
    with pytest.raises(ConfigurationError, match="fresh_students must be one of"):
        MutualDistillationConfig(str(tmp_path), fresh_students="all")
    with pytest.raises(ConfigurationError, match="would have none: set fresh_students"):
        MutualDistillationConfig(str(tmp_path), refresh="off", fresh_students="both")
    with pytest.raises(ConfigurationError, match="crm_teachers must be one of llm, both, got 'crm'"):
        MutualDistillationConfig(str(tmp_path), crm_teachers="crm")
    with pytest.raises(ConfigurationError, match="scores 12 items and the vocabulary holds 2"):
        make_run("x", items=ItemVocabulary(["a", "b"]))
    for settings, message in (
        ({"prediction_loss_only": True}, "a run chooses by ranks"),
        ({"save_only_model": True}, "with save_only_model a run that was stopped would end with other results"),
        ({"ignore_data_skip": True}, "with ignore_data_skip a run that was stopped would end with other results"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor has no meaning here"),
        ({"early_stopping_patience": 2, "eval_strategy": "epoch"}, "early_stopping_patience waits for a better"),
        ({"max_positions_per_batch": 3}, "max_positions_per_batch=3, but the longest history takes 6 positions"),
    ):
        for side in ("crm", "llm"):
            with pytest.raises(ConfigurationError, match=f"{side}_args: {message}"):
                make_run("x", **{f"{side}_args": settings})
    with pytest.raises(ConfigurationError, match="agree on seen_items"):
        make_run("x", llm_args={"seen_items": "keep"})


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_an_empty_split_is_named_before_anything_is_trained(make_run, splits, monkeypatch, name):
    monkeypatch.setitem(splits, name, splits[name].select([]))
    with pytest.raises(ConfigurationError, match=f"The {name} sequences are empty"):
        make_run("empty")


def test_sequences_without_the_columns_that_are_read(make_run, splits, monkeypatch):
    monkeypatch.setitem(splits, "test", splits["test"].remove_columns("row_id"))
    with pytest.raises(ConfigurationError, match="The test sequences lack row_id"):
        make_run("columns")


def test_item_vectors_of_the_teacher_need_a_crm_that_begins_anew(make_run, splits, tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match="fresh_students"):
        make_run("warm", crm_args={"init_item_vectors": True})
    taken, set_item_vectors = [], SASRecModel.set_item_vectors
    monkeypatch.setattr(
        SASRecModel, "set_item_vectors", lambda crm, given: (taken.append(given), set_item_vectors(crm, given))
    )
    make_run("anew", crm_args={"init_item_vectors": True}, rounds=1, controls=False, fresh_students="crm").run()
    (vectors,) = taken  # of the taught CRM, not of the warm-up
    llm = LLMRecommender.from_pretrained(tmp_path / "anew" / "llm")
    teacher = TeacherCache.build(llm, splits["train"], tmp_path / "cache")
    assert torch.allclose(vectors, teacher.item_vectors(8), atol=1e-4)
