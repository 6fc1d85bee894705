# SPDX-License-Identifier: Apache-2.0
"""What a run is refused for before anything is trained: models, data and arguments that do not go together."""

from __future__ import annotations

from collections.abc import Collection

from datasets import Dataset, DatasetDict
from transformers.integrations import get_reporting_integration_callbacks

from .data import ItemVocabulary
from .data.arrow import column_array
from .data.sequences import item_id_range
from .errors import ConfigurationError
from .evaluation import ranking_metrics
from .models import LLMRecommender, RecommenderModel
from .training import TRAINERS, DistillationArguments
from .training.arguments import refuse_what_has_no_effect


# What each split is for, for messages.
USES = {"train": "learn from", "validation": "choose the best by", "test": "test on"}


def check_run(
    models: dict[str, RecommenderModel],
    args: dict[str, DistillationArguments],
    sequences: DatasetDict,
    vocabulary: ItemVocabulary,
    fresh_sides: Collection[str],
) -> None:
    """
    Args:
        models, args (`dict`): by side, `"llm"` and `"crm"`.
        sequences ([`~datasets.DatasetDict`]): the splits.
        vocabulary ([`ItemVocabulary`]): the run's.
        fresh_sides (`Collection[str]`): which sides begin every round anew.

    Raises:
        ConfigurationError: they do not go together, or would end a phase after others have been trained.
    """
    for side, trainer in TRAINERS.items():
        kind = trainer.arguments_class
        if not isinstance(args[side], kind):
            raise ConfigurationError(f"{side}_args must be {kind.__name__}, got {type(args[side]).__name__}.")
        _check_arguments(side, args[side])
    if args["crm"].init_item_vectors and "crm" not in fresh_sides:
        raise ConfigurationError(
            "With init_item_vectors the CRM begins every round anew: set fresh_students to 'crm' or 'both'."
        )
    if not args["llm"].refresh_item_vectors:
        raise ConfigurationError("In a run MutualDistillationConfig.refresh decides: set it to 'off' instead.")
    if args["llm"].seen_items != args["crm"].seen_items:
        raise ConfigurationError("llm_args and crm_args must agree on seen_items, or their metrics do not compare.")
    _check_models(models, vocabulary)
    _check_sequences(sequences, vocabulary)
    _check_lengths(models, args, sequences["train"])


def _check_arguments(side: str, args: DistillationArguments) -> None:
    """Raise for what would end a phase when those before it have been trained already."""
    bounds = {"learning_rate": 0, "num_train_epochs": 0, "weight_decay": 0}
    bounds |= dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1
    )
    for name, least in bounds.items():
        if getattr(args, name) < least:
            raise ConfigurationError(f"{side}_args: {name} must be at least {least}, got {getattr(args, name)}.")
    for name in ("save_only_model", "ignore_data_skip"):
        if getattr(args, name):
            raise ConfigurationError(f"{side}_args: with {name} a run that was stopped would end with other results.")
    if args.prediction_loss_only:
        raise ConfigurationError(f"{side}_args: a run chooses by ranks, which prediction_loss_only leaves out.")
    metrics = ("loss", *ranking_metrics([1]))
    best = args.metric_for_best_model
    if best is not None and best.removeprefix("eval_") not in metrics:
        raise ConfigurationError(
            f"{side}_args: metric_for_best_model must be one of {', '.join(metrics)}, got {best!r}."
        )
    # Where nothing is said of evaluations, a run says it all.
    if args.early_stopping_patience is not None and best is None and args.eval_strategy != "no":
        raise ConfigurationError(f"{side}_args: early_stopping_patience waits for a better metric_for_best_model.")
    try:
        refuse_what_has_no_effect(args)
    except ConfigurationError as error:
        raise ConfigurationError(f"{side}_args: {error}") from error
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigurationError(f"{side}_args: report_to={args.report_to}: {error}") from error


def _check_models(models: dict[str, RecommenderModel], vocabulary: ItemVocabulary) -> None:
    for side, kind in {"llm": LLMRecommender, "crm": RecommenderModel}.items():
        if not isinstance(models[side], kind):
            raise ConfigurationError(f"{side} must be a {kind.__name__}, got {type(models[side]).__name__}.")
    for side, model in models.items():
        if model.config.num_items != len(vocabulary):
            raise ConfigurationError(
                f"The {side.upper()} scores {model.config.num_items} items and the vocabulary holds {len(vocabulary)}"
                ": build both models with num_items=len(vocabulary)."
            )
        # A model that was trained over other items would take each for another one.
        if model.vocabulary is not None and model.vocabulary.item_ids != vocabulary.item_ids:
            raise ConfigurationError(
                f"The {side.upper()} has another vocabulary than this run: "
                f"{model.vocabulary.first_difference(vocabulary)}. Build the run's vocabulary as the model's was, or "
                "train the model anew."
            )
    width, taken = models["crm"].item_matrix().shape[1], models["llm"].config.item_dim
    if taken != width:
        raise ConfigurationError(
            f"The CRM's item vectors are of width {width} and the LLM takes {taken}: build the LLM with "
            f"item_dim={width}."
        )


def _check_sequences(sequences: DatasetDict, vocabulary: ItemVocabulary) -> None:
    for name, use in USES.items():
        if name not in sequences:
            raise ConfigurationError(f"sequences must hold train, validation and test; {name} is missing.")
        missing = {"item_ids", "row_id", "length"} - set(sequences[name].column_names)
        if missing:
            raise ConfigurationError(
                f"The {name} sequences lack {', '.join(sorted(missing))}: split_leave_one_out and its like make them."
            )
        if len(sequences[name]) == 0:
            raise ConfigurationError(f"The {name} sequences are empty: there is nothing to {use}.")
        low, high = item_id_range(sequences[name])
        if low < 1 or high > len(vocabulary):
            raise ConfigurationError(
                f"The {name} sequences hold the item id {low if low < 1 else high}, outside of the vocabulary's "
                f"1..{len(vocabulary)}: split the log with this vocabulary."
            )


def _check_lengths(models, args, train: Dataset) -> None:
    longest = int(column_array(train, "length").max()) - 1
    reads = {side: min(longest, model.config.max_length) for side, model in models.items()}
    if reads["llm"] != reads["crm"]:
        raise ConfigurationError(
            "Each model teaches the other at every position that it reads, so both must read equally far: the LLM "
            f"reads {models['llm'].config.max_length} items and the CRM {models['crm'].config.max_length}, of "
            f"histories of up to {longest}. Build both with the same max_length."
        )
    for side, positions in reads.items():
        budget = args[side].max_positions_per_batch
        if budget is not None and positions > budget:
            raise ConfigurationError(
                f"{side}_args: max_positions_per_batch={budget}, but the longest history takes {positions} positions: "
                f"raise it to {positions} or more."
            )
