# SPDX-License-Identifier: Apache-2.0
"""The alternating rounds: two models teach each other until neither gets better.

A run is a list of phases. Each starts from models on disk, trains one model, and ends with that model on disk and an
entry in `state.json`; the next start skips what is recorded. The controls go through the same phases, seeds and
numbers of steps, without a teacher.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import parse_flag_from_env
from datasets import DatasetDict
from transformers.utils import logging

from .data import ItemVocabulary
from .errors import ConfigurationError
from .evaluation import ranking_metrics
from .evaluation.report import write_report
from .evaluation.results import CONTROL_SUFFIX, protocol_entry
from .files import storage_errors_named, whole_folder, write_json, write_manifest
from .models import LLMRecommender, RecommenderEnsemble, RecommenderModel
from .processes import on_main_process
from .run_checks import check_run
from .run_results import assemble_results, dataset_entry, late_gain, rounds_of, settings_entry
from .run_state import (
    CONTROL,
    DISTILLED,
    STATE_NAME,
    STATE_VERSION,
    Phase,
    RunLock,
    read_results,
    read_state,
    run_identity,
    weights_facts,
)
from .training import TRAINERS, CRMArguments, DistillationArguments, DistillationTrainer, MutualDistillArguments
from .training.checkpoints import last_whole_checkpoint
from .training.guard import stop_signals
from .training.progress import PhaseProgress


logger = logging.get_logger(__name__)

RESULTS_NAME = "results.json"
METRIC = "ndcg@10"
REFRESH_MODES = ("copy", "off")
CRM_TEACHERS = ("llm", "both")
FRESH_STUDENTS = {"none": (), "llm": ("llm",), "crm": ("crm",), "both": ("llm", "crm")}


@dataclass
class MutualDistillationConfig:
    """
    Configuration of [`MutualDistillation`].

    Args:
        output_dir (`str`): where the run lives. Started again with the same folder, it goes on where it was.
        rounds (`int`, *optional*, defaults to 3): most rounds; the paper uses 3 to 5.
        controls (`bool`, *optional*, defaults to `True`): also train both models without distillation, through the
            same phases, so that every gain has something to be measured against. Doubles the cost.
        refresh (`str`, *optional*, defaults to `"copy"`): inject the CRM's item vectors into the LLM at every round
            (`"copy"`), or at the first alone (`"off"`, the paper's ablation).
        fresh_students (`str`, *optional*, defaults to `"none"`): which side begins every round with its initial
            weights instead of those of its last round: `"none"` (the paper's), `"llm"`, `"crm"` or `"both"`. A large
            student that has overfitted once learns more from a better teacher when it begins anew.
        crm_teachers (`str`, *optional*, defaults to `"llm"`): whom the CRM learns from: the LLM of its round (the
            paper's), or `"both"`, the mean of that and of the CRM of the round before ([`RecommenderEnsemble`]), which
            is better than either while the two still differ.
        tolerance (`float`, *optional*, defaults to 0.0): stop when, in a round, neither model's best validation
            NDCG@10 rose by more than this.
        seed (`int`, *optional*, defaults to 42): of the run; each round derives its own.
        dataset_name (`str`, *optional*, defaults to `""`): shown in results and report.
        dataset_facts (`dict`, *optional*): what [`describe_interactions`] said, for results and report.
        split (`str`, *optional*, defaults to `"leave_one_out"`): how `sequences` were split, for results and report.
    """

    output_dir: str
    rounds: int = 3
    controls: bool = True
    refresh: str = "copy"
    fresh_students: str = "none"
    crm_teachers: str = "llm"
    tolerance: float = 0.0
    seed: int = 42
    dataset_name: str = ""
    dataset_facts: dict | None = None
    split: str = "leave_one_out"

    def __post_init__(self):
        if self.rounds < 1:
            raise ConfigurationError(f"rounds must be at least 1, got {self.rounds}.")
        choices = {"refresh": REFRESH_MODES, "fresh_students": FRESH_STUDENTS, "crm_teachers": CRM_TEACHERS}
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ConfigurationError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
        if self.refresh == "off" and "llm" in self.fresh_sides:
            raise ConfigurationError(
                "With refresh 'off' the LLM gets item vectors in the first round alone, and one that begins every "
                "round anew would have none: set fresh_students to 'none' or 'crm', or refresh to 'copy'."
            )

    @property
    def fresh_sides(self) -> tuple[str, ...]:
        """Which sides begin every round anew."""
        return FRESH_STUDENTS[self.fresh_students]


class MutualDistillation:
    """
    Trains a CRM and an LLM recommender against each other for several rounds.

    CRM warm-up, then per round: refresh of the LLM's item vectors, LLM against the CRM, CRM against the LLM,
    evaluation of both on validation. It ends after `config.rounds`, or when a round brings neither model forward;
    then each side's best round by validation NDCG@10 is restored and tested once.

    Args:
        llm ([`LLMRecommender`]): the LLM side.
        crm ([`RecommenderModel`]): the conventional side, e.g. a [`SASRecModel`].
        sequences ([`~datasets.DatasetDict`]): `train`, `validation` and `test`, as [`split_leave_one_out`] makes them.
        vocabulary ([`ItemVocabulary`]): the items of all three.
        config ([`MutualDistillationConfig`]): the run.
        llm_args ([`MutualDistillArguments`], *optional*): how the LLM is trained in each round.
        crm_args ([`CRMArguments`], *optional*): how the CRM is trained, in the warm-up and in each round.

    Raises:
        ConfigurationError: models or data over another catalogue than `vocabulary`.
        RunStateError: `output_dir` holds a run with other models, data or settings.
    """

    def __init__(
        self,
        llm: LLMRecommender,
        crm: RecommenderModel,
        sequences: DatasetDict,
        vocabulary: ItemVocabulary,
        config: MutualDistillationConfig,
        llm_args: MutualDistillArguments | None = None,
        crm_args: CRMArguments | None = None,
    ):
        self.config = config
        self.sequences = sequences
        self.vocabulary = vocabulary
        self.output_dir = Path(config.output_dir)
        self.models: dict[str, RecommenderModel] = {"llm": llm, "crm": crm}
        placeholder = str(self.output_dir / "phases")
        self.args: dict[str, DistillationArguments] = {
            "llm": llm_args or MutualDistillArguments(placeholder),
            "crm": crm_args or CRMArguments(placeholder),
        }
        check_run(self.models, self.args, self.sequences, self.vocabulary, config.fresh_sides)
        for model in self.models.values():
            model.vocabulary = vocabulary
        self.state: dict = {}

    # --- the run -------------------------------------------------------------------------------------------------

    def run(self) -> dict:
        """
        Run, or go on with, all phases.

        Returns:
            `dict`: what `results.json` holds.

        Raises:
            RunStateError: `output_dir` holds another run, one that is going on, or damaged files.
            RunInterrupted: SIGTERM or SIGINT; everything is saved.
            TrainingError: a loss that is not finite.
            StorageError: a full disk, or a folder that cannot be written to.
        """
        remedy = "Make room or give another output_dir; started again, a run goes on from its last whole checkpoint."
        with storage_errors_named(self.output_dir, remedy), RunLock(self.output_dir), stop_signals:
            results = self._run()
            self._restore_best()
            return results

    def _run(self) -> dict:
        self._open_state()
        if self.state["finished"]:
            results = on_main_process(lambda: read_results(self.output_dir, RESULTS_NAME, self.state["weights"]))
            if results is not None:
                logger.info(f"{self.output_dir} holds a finished run: nothing to do.")
                return results
        self._run_phase(Phase("crm", 0, DISTILLED))
        for round_number in range(1, self.config.rounds + 1):
            for arm in self._arms:
                self._run_phase(Phase("llm", round_number, arm))
                self._run_phase(Phase("crm", round_number, arm))
            if self._converged(round_number):
                logger.info(f"Neither model got better in round {round_number}: the run has converged.")
                break
        return self._finish()

    @property
    def _arms(self) -> tuple[str, ...]:
        return (DISTILLED, CONTROL) if self.config.controls else (DISTILLED,)

    def _run_phase(self, phase: Phase) -> None:
        if phase.name in self.state["phases"]:
            return
        started = time.monotonic()
        trainer = self._trainer(phase)
        folder = self._folder(phase)
        PhaseProgress.install(trainer, phase.title)
        trainer.guard.title = phase.title
        trainer.train(resume_from_checkpoint=on_main_process(lambda: last_whole_checkpoint(folder)))
        history = [entry[f"eval_{METRIC}"] for entry in trainer.state.log_history if f"eval_{METRIC}" in entry]
        metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items() if "@" in name}
        self._save_model(phase.side, self._model_folder(phase), trainer)
        record = {"validation": metrics, "seconds": time.monotonic() - started, "epochs": trainer.state.epoch}
        record["late_gain"] = late_gain(history)
        record["distillation"] = _last_logged(trainer.state.log_history, ("kl", "weight_mean", "agreement"))
        self.state["phases"][phase.name] = record
        self._write_state()
        logger.info(f"{phase.title}: validation {METRIC} {metrics[METRIC]:.4f} ({record['seconds']:.0f} s)")
        on_main_process(lambda: _keep_only(folder, "model"))
        stop_signals.raise_if_received(f"after {phase.title}")

    def _trainer(self, phase: Phase):
        """The trainer of a phase, with its student and teacher as the phases before left them."""
        student = self._student(phase.side)
        student.load_weights(self._start_of(phase))
        other = self.models["crm" if phase.side == "llm" else "llm"]
        if phase.teacher is not None:
            other.load_weights(self._model_folder(phase.teacher))
        if phase.side == "llm" and (phase.round == 1 or self.config.refresh == "copy"):
            student.set_item_vectors(other.item_matrix())
        args, train, validation = self._phase_args(phase), self.sequences["train"], self.sequences["validation"]
        return TRAINERS[phase.side](student, args, train, validation, teacher=self._teacher(phase, other))

    def _teacher(self, phase: Phase, other: RecommenderModel) -> RecommenderModel | None:
        """The other side, alone or beside the CRM of the round before; nobody in the warm-up and for a control."""
        if phase.round == 0 or phase.arm == CONTROL:
            return None
        if phase.side == "llm" or self.config.crm_teachers == "llm":
            return other
        own = copy.deepcopy(self.models["crm"])
        own.load_weights(self._model_folder(phase.previous))
        return RecommenderEnsemble([other, own])

    def _student(self, side: str) -> RecommenderModel:
        """The model to train: a copy, where training cuts a model into shards and does not put it together again."""
        sharded = any(parse_flag_from_env(name) for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))
        sharded = sharded or bool(self.args[side].fsdp) or bool(self.args[side].deepspeed)
        return copy.deepcopy(self.models[side]) if sharded else self.models[side]

    def _start_of(self, phase: Phase) -> Path:
        """Where a phase's student starts: its own last round, in the same arm, or its initial weights."""
        if phase.previous is None or phase.side in self.config.fresh_sides:
            return self.output_dir / "phases" / f"initial-{phase.side}"
        return self._model_folder(phase.previous)

    def _model_folder(self, phase: Phase) -> Path:
        return self._folder(phase) / "model"

    def _folder(self, phase: Phase) -> Path:
        return self.output_dir / "phases" / phase.name

    def _phase_args(self, phase: Phase) -> DistillationArguments:
        """The side's arguments, with the phase's folder and seed, evaluating and keeping the best by default."""
        args = self.args[phase.side]
        changes = {
            "output_dir": str(self._folder(phase)),
            # Both arms of a round get the same seed; two rounds must not, or each would see the same batches again.
            "seed": self.config.seed + 1000 * phase.round,
            "data_seed": None if args.data_seed is None else args.data_seed + 1000 * phase.round,
            # A phase that was stopped goes on with the patience that it had left.
            "restore_callback_states_from_checkpoint": True,
        }
        if phase.side == "llm":
            changes["refresh_item_vectors"] = False
        if args.eval_strategy == "no":
            given = args.metric_for_best_model is not None
            changes |= {
                "eval_strategy": "epoch",
                "save_strategy": "epoch",
                "logging_strategy": "epoch",
                "load_best_model_at_end": True,
                "metric_for_best_model": args.metric_for_best_model if given else METRIC,
                "greater_is_better": args.greater_is_better if given else True,
                "save_total_limit": args.save_total_limit or 1,
            }
        # Made anew, not copied: only so does `accelerate` forget the precision of the side that came before.
        return dataclasses.replace(args, **changes)

    def _converged(self, round_number: int) -> bool:
        """Whether a round brought neither distilled model's best validation metric forward."""
        if round_number == 1:
            return False
        return all(
            self._best_value(side, round_number) - self._best_value(side, round_number - 1) <= self.config.tolerance
            for side in ("crm", "llm")
        )

    def _best_value(self, side: str, until: int) -> float:
        return max(self._value(Phase(side, number, DISTILLED)) for number in self._rounds(side) if number <= until)

    # --- the end -------------------------------------------------------------------------------------------------

    def _finish(self) -> dict:
        final = {}
        for side in ("crm", "llm"):
            for arm in (DISTILLED, CONTROL):
                key = side if arm == DISTILLED else side + CONTROL_SUFFIX
                final[key] = self._test_best(side, arm) if arm in self._arms else None
        test, config = self.sequences["test"], self.config
        results = assemble_results(
            self.state["phases"],
            final,
            dataset=dataset_entry(test, self.vocabulary, config.dataset_name, config.dataset_facts),
            protocol=protocol_entry(config.split, self.args["crm"].seen_items),
            settings=settings_entry(self.state["identity"], self.args, self.models),
            seed=config.seed,
            has_controls=config.controls,
        )
        on_main_process(lambda: write_json(self.output_dir / RESULTS_NAME, results))
        on_main_process(lambda: write_report(results, self.output_dir))
        self.state |= {"finished": True, "weights": on_main_process(lambda: weights_facts(self.output_dir))}
        self._write_state()
        return results

    def _restore_best(self) -> None:
        """Leave both models as they are saved: the caller goes on with them, not with what was tested last."""
        for side, model in self.models.items():
            model.load_weights(self.output_dir / side)

    def _test_best(self, side: str, arm: str) -> dict:
        """Restore a side's best round by validation, test it, and put a distilled one where users find it."""
        phases = [Phase.of(side, number, arm) for number in self._rounds(side)]
        best = max(phases, key=self._value)
        self.models[side].load_weights(self._model_folder(best))
        model = self._student(side)
        folder = str(self.output_dir / "phases" / "test")
        args = dataclasses.replace(self.args[side], output_dir=folder, early_stopping_patience=None)
        # `Trainer` asks for it where the arguments say when to evaluate.
        trainer = TRAINERS[side](model, args, eval_dataset=self.sequences["validation"])
        PhaseProgress.install(trainer, f"{side.upper()} test")
        ranks = trainer.predict(self.sequences["test"]).predictions
        if arm == DISTILLED:
            self._save_model(side, self.output_dir / side)
        record = self.state["phases"][best.name]
        return {
            "round": best.round,
            "validation": record["validation"],
            "late_gain": record["late_gain"],
            "test": ranking_metrics(ranks),
        }

    def _rounds(self, side: str) -> list[int]:
        return rounds_of(self.state["phases"], side)

    def _value(self, phase: Phase) -> float:
        return self.state["phases"][phase.name]["validation"][METRIC]

    # --- what is on disk -----------------------------------------------------------------------------------------

    def _open_state(self) -> None:
        """Read the state of a run that was begun here, or begin one with the models as they are."""
        identity = self._identity()
        initial = on_main_process(lambda: {side: model.content_hash() for side, model in self.models.items()})
        self.state = on_main_process(lambda: read_state(self.output_dir, identity))
        if self.state is not None:
            if self.state["initial"] != initial:
                logger.warning(
                    f"The run in {self.output_dir} began with other weights than these models have, and goes on with "
                    "those: to begin with these, give another output_dir."
                )
            return
        for side in self.models:
            self._save_model(side, self.output_dir / "phases" / f"initial-{side}")
        self.state = {"version": STATE_VERSION, "identity": identity, "phases": {}, "finished": False}
        self.state["initial"] = initial
        self._write_state()

    def _identity(self) -> dict:
        return run_identity(dataclasses.asdict(self.config), self.args, self.models, self.vocabulary, self.sequences)

    def _write_state(self) -> None:
        on_main_process(lambda: write_json(self.output_dir / STATE_NAME, self.state))

    def _save_model(self, side: str, folder: Path, trainer: DistillationTrainer | None = None) -> None:
        """Save a model, that of a trainer if one is given, beside its place and rename it, with a manifest."""
        model, state_dict = self.models[side], None
        if trainer is not None and trainer.model is not model:
            # In shards: every process has to give its own.
            state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)

        def save():
            with whole_folder(folder) as partial:
                model.save_pretrained(partial, state_dict=state_dict)
                if folder.parent != self.output_dir:
                    write_manifest(partial)

        on_main_process(save)


def _keep_only(folder: Path, name: str) -> None:
    for path in folder.iterdir():
        if path.name != name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _last_logged(log_history: list[dict], names: tuple[str, ...]) -> dict | None:
    for entry in reversed(log_history):
        if all(name in entry for name in names):
            return {name: entry[name] for name in names}
    return None
