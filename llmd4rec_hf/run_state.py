# SPDX-License-Identifier: Apache-2.0
"""What a run keeps on disk besides results: its state by phases, its models, and a lock against a second run."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

from datasets import DatasetDict
from filelock import FileLock, Timeout
from transformers.utils import logging

from .data import ItemVocabulary, data_hash
from .errors import RunStateError
from .files import file_facts, find_damage, is_altered, write_json
from .models import RecommenderModel
from .processes import on_every_process, on_main_process
from .training import DistillationArguments
from .training.batching import batches_per_step


logger = logging.get_logger(__name__)

STATE_NAME = "state.json"
STATE_VERSION = 1
LOCK_NAME = ".lock"
HOLDER_NAME = ".lock_holder.json"
DISTILLED, CONTROL = "distilled", "control"
# A process that was killed leaves its lock to the workers of its data loaders, for as long as they take to notice.
_LOCK_SECONDS = 3
# Arguments that say where and how a run goes on, not what comes out of it: with others it is still the same run.
_NOT_IDENTITY = {
    *("output_dir", "logging_dir", "disable_tqdm", "report_to", "log_level", "run_name", "project"),
    *("push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "hub_private_repo", "hub_always_push"),
    # What one changes after a run died of too little memory or disk.
    *("per_device_eval_batch_size", "eval_accumulation_steps", "loss_chunk_size", "save_total_limit"),
    # Words about the data; the sequences themselves are compared by their hashes.
    *("dataset_name", "dataset_facts"),
    # Their product with the number of processes counts: rows_per_step, or batches_per_step under a budget.
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
}


@dataclass(frozen=True)
class Phase:
    """One training of one model."""

    side: str
    round: int
    arm: str

    @classmethod
    def of(cls, side: str, round_number: int, arm: str) -> Phase:
        """The phase that made an arm's model of a round; in round 0 both arms share the warm-up."""
        return cls(side, round_number, arm if round_number else DISTILLED)

    @property
    def previous(self) -> Phase | None:
        """The training of the same model in the round before. The LLM's first is in round 1."""
        first = 1 if self.side == "llm" else 0
        return Phase.of(self.side, self.round - 1, self.arm) if self.round > first else None

    @property
    def teacher(self) -> Phase | None:
        """The training of the other model, from which this one learns or takes item vectors."""
        if self.round == 0:
            return None
        if self.side == "crm":
            return Phase.of("llm", self.round, self.arm)
        return Phase.of("crm", self.round - 1, self.arm)

    @property
    def name(self) -> str:
        return f"{self.round}-{self.side}-{self.arm}"

    @property
    def title(self) -> str:
        what = "CRM" if self.side == "crm" else "LLM"
        if self.round == 0:
            return f"{what} warm-up"
        return f"{what} round {self.round}" + (", control" if self.arm == CONTROL else "")


class RunLock:
    """
    Holds a folder against a second run, in a `with` block. The system lets go of it when the process ends, however it
    ends: there are no stale locks to clear away. Over a network file system it holds as far as that passes locks on.

    Args:
        folder (`Path`): made if it is not there.

    Raises:
        RunStateError: another run has it, the message says which; or a process does not find the folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = FileLock(str(folder / LOCK_NAME), timeout=_LOCK_SECONDS)

    def __enter__(self) -> RunLock:
        on_main_process(self._acquire)
        try:
            on_every_process(self._check_found)
        except RunStateError:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._lock.release()

    def _acquire(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise RunStateError(
                f"Another run works in {self.folder} ({self._holder()}): wait for it, or give another output_dir."
            ) from None
        holder = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_json(self.folder / HOLDER_NAME, holder)

    def _check_found(self) -> None:
        if not (self.folder / HOLDER_NAME).is_file():
            raise RunStateError(
                f"The main process has made {self.folder}, and there is none in {Path.cwd()} on {platform.node()}: "
                "all processes have to find the same folder. Give the full path of one that all machines share."
            )

    def _holder(self) -> str:
        try:
            holder = json.loads((self.folder / HOLDER_NAME).read_text())
            return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "it did not say which"


def run_identity(
    config: dict,
    args: dict[str, DistillationArguments],
    models: dict[str, RecommenderModel],
    vocabulary: ItemVocabulary,
    sequences: DatasetDict,
) -> dict:
    """
    What makes two runs the same run, flat, so that a difference can be named.

    Args:
        config (`dict`): the run's settings.
        args (`dict[str, DistillationArguments]`): the trainers' arguments, by side.
        models (`dict[str, RecommenderModel]`): the models, by side.
        vocabulary ([`ItemVocabulary`]): the items.
        sequences ([`~datasets.DatasetDict`]): the splits.
    """
    identity = {f"config.{k}": v for k, v in config.items() if k not in _NOT_IDENTITY}
    for side, its_args in args.items():
        settings = json.loads(its_args.to_json_string())
        identity |= {f"{side}_args.{k}": v for k, v in settings.items() if k not in _NOT_IDENTITY}
        batches = batches_per_step(its_args)
        if its_args.max_positions_per_batch is None:
            identity[f"{side}_args.rows_per_step"] = its_args.train_batch_size * batches
        else:
            identity[f"{side}_args.batches_per_step"] = batches
        model = json.loads(models[side].config.to_json_string(use_diff=False))
        model |= models[side].added_settings()
        identity |= {f"{side}.{k}": v for k, v in model.items() if k != "backbone_config"}
    identity["vocabulary"] = vocabulary.content_hash
    identity |= {f"sequences.{name}": data_hash(split) for name, split in sequences.items()}
    return json.loads(json.dumps(identity, sort_keys=True, default=str))


def read_state(folder: Path, identity: dict) -> dict | None:
    """
    The state of the run that was begun in `folder`, or `None`. What it says is done is there, and as it was written.

    Args:
        folder (`Path`): the run's.
        identity (`dict`): what makes two runs the same run, flat.

    Raises:
        RunStateError: a damaged state or model, or another run's state.
    """
    path = folder / STATE_NAME
    if not path.is_file():
        return None
    afresh = "give another output_dir, or delete this one"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        version, found, phases = state["version"], dict(state["identity"]), state["phases"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunStateError(f"{path} is damaged ({error}): {afresh}.") from error
    if version != STATE_VERSION:
        raise RunStateError(f"{path} is of version {version}, this release reads {STATE_VERSION}: {afresh}.")
    different = sorted(key for key in identity | found if identity.get(key) != found.get(key))
    if different:
        key = different[0]
        raise RunStateError(
            f"{folder} holds a run with other settings ({key}: {found.get(key)!r} there, {identity.get(key)!r} here): "
            f"{afresh}."
        )
    for initial in sorted((folder / "phases").glob("initial-*")):
        if damage := find_damage(initial):
            raise RunStateError(f"{damage}. All models of this run began with it: {afresh}.")
    state["phases"] = _usable(folder, phases)
    state["finished"] = state["finished"] and len(state["phases"]) == len(phases)
    return state


def _usable(folder: Path, phases: dict) -> dict:
    """The recorded phases up to the first whose model is gone: that one and those that built on it are run again."""
    usable = {}
    for name, record in phases.items():
        model = folder / "phases" / name / "model"
        if not model.exists():
            logger.warning(f"{model} is gone: the run is repeated from {name} on.")
            break
        if damage := find_damage(model):
            raise RunStateError(
                f"{damage}. Put it back from a copy, or delete {model}: the run is then repeated from {name} on."
            )
        usable[name] = record
    return usable


def weights_facts(folder: Path) -> dict:
    """Size and checksum of every weights file of a run's final models, by its path in `folder`."""
    paths = [path for side in ("crm", "llm") for path in sorted((folder / side).glob("*.safetensors"))]
    return {path.relative_to(folder).as_posix(): file_facts(path) for path in paths}


def read_results(folder: Path, name: str, weights: dict) -> dict | None:
    """A finished run's results, if they and the models they are of are as they were written."""
    altered = next((path for path, facts in weights.items() if is_altered(folder / path, facts)), None)
    try:
        if altered is None:
            return json.loads((folder / name).read_text(encoding="utf-8"))
        problem = f"{folder / altered} is missing, torn or altered"
    except (OSError, ValueError) as error:
        problem = f"{folder / name} cannot be read ({error})"
    logger.warning(f"{problem}: the end of the run is repeated.")
    return None
