# SPDX-License-Identifier: Apache-2.0
"""What a run's `results.json` holds, put together from the records of its phases."""

from __future__ import annotations

import inspect
import json
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import datasets
import torch
import transformers
from datasets import Dataset

from .data import ItemVocabulary, data_hash
from .data.arrow import column_array
from .models import RecommenderModel
from .run_state import CONTROL, DISTILLED, Phase
from .training import DistillationArguments
from .version import __version__


# Arguments that a reader asks for first, at their defaults too.
_ASKED_FOR = {
    *("temperature", "kl_weight", "weighting", "learning_rate", "num_train_epochs", "rows_per_step"),
    *("batches_per_step", "lr_scheduler_type", "warmup_steps", "weight_decay", "early_stopping_patience"),
}


def assemble_results(
    phases: dict[str, dict],
    final: dict,
    *,
    dataset: dict,
    protocol: dict,
    settings: dict,
    seed: int,
    has_controls: bool,
) -> dict:
    """
    A run's results, as [`~llmd4rec_hf.evaluation.results`] describes them.

    Args:
        phases (`dict[str, dict]`): the records of all phases, by their names.
        final (`dict`): what the test of each side's best round came to.
        dataset (`dict`): see [`dataset_entry`].
        protocol (`dict`): see [`~llmd4rec_hf.evaluation.results.protocol_entry`].
        settings (`dict`): see [`settings_entry`].
        seed (`int`): of the run.
        has_controls (`bool`): whether both models were also trained without distillation.
    """
    return {
        "dataset": dataset,
        "protocol": protocol,
        "settings": settings,
        "seed": seed,
        "versions": _versions(),
        "rounds": [_round_entry(phases, number, has_controls) for number in rounds_of(phases, "crm")],
        "final": final,
        "seconds": {name: record["seconds"] for name, record in phases.items()},
    }


def dataset_entry(test: Dataset, vocabulary: ItemVocabulary, name: str, facts: dict | None) -> dict:
    """
    What there is to say about the data.

    Args:
        test ([`~datasets.Dataset`]): the test split, which holds all interactions.
        vocabulary ([`ItemVocabulary`]): the items.
        name (`str`): to be shown.
        facts (`dict`, *optional*): what else is known, or known better.
    """
    return {
        "name": name,
        "users": len(test),
        "items": len(vocabulary),
        "interactions": int(column_array(test, "length").sum()),
        "hash": data_hash(test),
        **(facts or {}),
        "test_rows": len(test),
    }


def settings_entry(
    identity: dict, args: dict[str, DistillationArguments], models: dict[str, RecommenderModel]
) -> dict:
    """
    What decided a run, flat: its own settings, the trainers' arguments that are asked for first or are not at their
    defaults, those of the models and of the LLM's adapter, and the hashes of what was learned from.

    Args:
        identity (`dict`): what [`~llmd4rec_hf.run_state.run_identity`] found.
        args, models (`dict`): by side.
    """
    kept = {
        key: value for key, value in identity.items() if key.split(".")[0] in ("config", "sequences", "vocabulary")
    }
    kept.pop("config.seed", None)  # stands beside
    for side, its_args in args.items():
        defaults = json.loads(type(its_args)("unused", use_cpu=its_args.use_cpu).to_json_string())
        own = {*inspect.signature(type(models[side].config).__init__).parameters, *models[side].added_settings()}
        for key, value in identity.items():
            owner, _, name = key.partition(".")
            if owner == f"{side}_args" and (name in _ASKED_FOR or value != defaults.get(name)):
                kept[key] = value
            elif owner == side and name in own:
                kept[key] = value
    return {key: value for key, value in kept.items() if value is not None}


def rounds_of(phases: dict[str, dict], side: str) -> list[int]:
    """The rounds in which a side was trained, ascending."""
    return sorted(int(name.split("-")[0]) for name in phases if name.endswith(f"-{side}-{DISTILLED}"))


def late_gain(history: list[float]) -> float | None:
    """
    By what share the best value of a training rose in the last tenth of its evaluations, in the last one at least:
    about nothing where it was trained to the end. `None` where that cannot be said.

    Args:
        history (`list[float]`): the metric at each evaluation, higher is better.
    """
    late = max(1, len(history) // 10)
    before = max(history[:-late], default=0.0)
    return max(history) / before - 1 if before else None


def _round_entry(phases: dict[str, dict], number: int, has_controls: bool) -> dict:
    entry: dict = {"round": number, "crm": None, "llm": None, "crm_control": None, "llm_control": None}
    entry["distillation"] = {}
    for side in ("crm", "llm"):
        for arm, key in ((DISTILLED, side), (CONTROL, f"{side}_control")):
            record = phases.get(Phase(side, number, arm).name)
            if record is not None:
                entry[key] = {"validation": record["validation"], "test": None}
        record = phases.get(Phase(side, number, DISTILLED).name)
        entry["distillation"][side] = record["distillation"] if record else None
    if number == 0 and has_controls:
        entry["crm_control"] = entry["crm"]
    return entry


def _versions() -> dict[str, str]:
    versions = {
        "llmd4rec_hf": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        **{name: version(name) for name in ("accelerate", "peft", "numpy")},
    }
    # With it sums are rounded in another way; it need not be there.
    with suppress(PackageNotFoundError):
        versions["numba"] = version("numba")
    return versions
