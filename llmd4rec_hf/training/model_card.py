# SPDX-License-Identifier: Apache-2.0
"""The model card: what a repository's `README.md` says, whether a trainer or a whole run made the model."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData
from transformers import SchedulerType

from .. import models
from ..data import ItemVocabulary
from ..evaluation.report import cell, markdown_table
from ..evaluation.results import CONTROL_SUFFIX, number, protocol_entry, protocol_line, ranking_line
from ..models.adapters import ADAPTER_CONFIG_NAME
from .batching import HistoryTrainer, batches_per_step


TAGS = ("llmd4rec_hf", "recommender-system", "sequential-recommendation")
CITATION = """\
@article{wu2025llmd4rec,
    title  = {Bidirectional Knowledge Distillation for Enhancing Sequential Recommendation with Large Language Models},
    author = {Wu and others},
    journal = {arXiv preprint arXiv:2505.18120},
    year   = {2025},
    url    = {https://arxiv.org/abs/2505.18120},
}"""
_NOT_RESULTS = ("runtime", "_per_second", "_preparation_time", "_compilation_time")


@dataclass
class CardFacts:
    """
    What a card tells.

    Args:
        name (`str`): the heading.
        repository (`str`): what `from_pretrained` is given in the example.
        config (`dict`): the model's configuration, with `architectures`.
        training (`str`): a sentence on how it was trained.
        protocol (`str`): what the results were measured by.
        results (`dict[str, dict[str, float]]`): metrics by column, the first column being the model's own.
        vocabulary ([`ItemVocabulary`], *optional*): the items, for the example.
        adapter (`dict`, *optional*): PEFT's configuration.
        dataset (`str`, *optional*): name of the data.
        settings (`dict[str, object]`): further rows of the table of facts.
        metadata (`dict`): further fields of the card's header: `language`, `license`, `tags`, `datasets`, ...
    """

    name: str
    repository: str
    config: dict
    training: str
    protocol: str
    results: dict[str, dict[str, float]]
    vocabulary: ItemVocabulary | None = None
    adapter: dict | None = None
    dataset: str | None = None
    settings: dict[str, object] = field(default_factory=dict)
    metadata: dict = field(default_factory=dict)

    @property
    def model_class(self) -> str:
        return self.config["architectures"][0]

    @property
    def base_model(self) -> str:
        return self.config.get("backbone_name_or_path") or ""

    @property
    def base_is_on_the_hub(self) -> bool:
        return bool(self.base_model) and not (os.path.isabs(self.base_model) or os.path.exists(self.base_model))


def render_card(facts: CardFacts) -> str:
    """The text of a `README.md`: header, facts, results with their protocol, an example that runs, citation."""
    sections = [
        f"---\n{_header(facts).to_yaml()}\n---",
        f"# {facts.name}",
        f"{_description(facts)} {facts.training}",
        markdown_table(("", ""), [(label, cell(value)) for label, value in _rows(facts).items()]),
        "## Results",
        _results(facts),
        "## Use",
        _example(facts),
        "## Citation",
        f"```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _header(facts: CardFacts) -> ModelCardData:
    metadata = {name: value for name, value in facts.metadata.items() if value is not None}
    tags = [*TAGS, *(["peft"] if facts.adapter else []), *_as_list(metadata.pop("tags", None))]
    task, dataset_config = metadata.pop("task", "other"), metadata.pop("dataset_config", None)
    own = next(iter(facts.results.values()), {})
    if facts.dataset and own:
        metadata["eval_results"] = [
            EvalResult(
                task_type=task,
                task_name="sequential recommendation",
                dataset_type=facts.dataset,
                dataset_name=facts.dataset,
                dataset_config=dataset_config,
                metric_type=metric,
                metric_value=round(value, 6),
            )
            for metric, value in own.items()
        ]
    if facts.base_is_on_the_hub:
        metadata.setdefault("base_model", facts.base_model)
    return ModelCardData(
        library_name="llmd4rec_hf",
        tags=list(dict.fromkeys(tags)),
        model_name=facts.name,
        metrics=[*own] or None,
        **metadata,
    )


def _as_list(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _description(facts: CardFacts) -> str:
    items = f"{facts.config['num_items']:,} items"
    if "backbone_config" not in facts.config:
        return f"`{facts.model_class}`, a sequential recommender over {items}."
    return f"A language model as a recommender: each item of a history is a soft token, and a head ranks {items}."


def _rows(facts: CardFacts) -> dict[str, object]:
    config = facts.config
    rows: dict[str, object] = {"class": f"`{facts.model_class}`", "items": f"{config['num_items']:,}"}
    rows["longest history"] = config["max_length"]
    for name in ("hidden_size", "num_layers", "num_heads", "dropout", "supervision", "item_text"):
        if name in config:
            rows[name.replace("_", " ")] = config[name]
    if "backbone_config" in config:
        rows["base model"] = Path(facts.base_model).name if not facts.base_is_on_the_hub else facts.base_model
        rows["adapter"] = _adapter_line(facts.adapter)
    if facts.dataset:
        rows["data"] = facts.dataset
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "datasets": datasets.__version__}
    rows |= facts.settings
    return rows | {"versions": ", ".join(f"{name} {version}" for name, version in versions.items())}


def _adapter_line(adapter: dict | None) -> str:
    if adapter is None:
        return "none, the whole base model is trained and part of the files"
    kind = "DoRA" if adapter.get("use_dora") else "rsLoRA" if adapter.get("use_rslora") else adapter["peft_type"]
    rank = f", rank {adapter['r']}" if adapter.get("r") else ""
    return f"{getattr(kind, 'value', kind)}{rank}, in PEFT's files"


def _results(facts: CardFacts) -> str:
    if not any(facts.results.values()):
        return "Not evaluated yet."
    metrics = list(dict.fromkeys(metric for column in facts.results.values() for metric in column))
    rows = [(metric, *(number(column.get(metric)) for column in facts.results.values())) for metric in metrics]
    return f"{markdown_table(('', *facts.results), rows)}\n\nProtocol: {facts.protocol}."


def _example(facts: CardFacts) -> str:
    module = "llmd4rec_hf.models" if facts.model_class in models.__all__ else "your_module"
    needs_base = facts.adapter is not None and not facts.base_is_on_the_hub
    backbone = f', backbone="{Path(facts.base_model).name or "path/to/base"}"' if needs_base else ""
    lines = [
        f"from {module} import {facts.model_class}",
        "",
        f'model = {facts.model_class}.from_pretrained("{facts.repository}"{backbone})',
    ]
    if facts.vocabulary is not None:
        history = facts.vocabulary.decode(list(range(1, min(2, len(facts.vocabulary)) + 1)))
        lines.append(f"print(model.recommend([{history!r}], k=5).to_pandas())")
    notes = ["It needs the package `llmd4rec_hf`. Histories and recommendations are in the ids of the training data."]
    if needs_base:
        notes.append("The base model is not on the Hub: give its folder as `backbone`.")
    if facts.adapter is not None:
        notes.append(
            "A `quantization_config` loads the base in 8 or 4 bits. PEFT alone loads the adapter onto the bare base "
            "model, and so does `AutoModel` with this repository's id; the item head comes with the class above only."
        )
    return "```python\n{}\n```\n\n{}".format("\n".join(lines), " ".join(notes))


# --- where the facts come from -----------------------------------------------------------------------------------


def trainer_card(
    trainer: HistoryTrainer, has_teacher: bool, model_name: str | None = None, dataset=None, **metadata
) -> str:
    """The card of a trainer's model, with the results of the best or else the last evaluation."""
    model, args, settings = trainer.accelerator.unwrap_model(trainer.model), trainer.args, trainer.settings
    repository = trainer.hub_model_id or args.hub_model_id or Path(args.output_dir).name
    batches, budget = batches_per_step(args), settings.max_positions_per_batch
    batch = f"{args.train_batch_size * batches} histories"
    if budget is not None:
        batch = f"{batches} x at most {budget} padded positions"
    rows: dict[str, object] = {
        "learning rate": f"{args.learning_rate:g}, {SchedulerType(args.lr_scheduler_type).value}",
        "batch": batch,
        "steps": f"{trainer.state.global_step} ({trainer.state.epoch or 0:.4g} epochs), seed {args.seed}",
    }
    size = settings.num_sampled_items
    if size is not None and size < model.config.num_items:
        rows["loss"] = f"over the true items and {size:,} others, drawn for each step"
    training = "It was trained without a teacher."
    if has_teacher:
        rows["distillation"] = (
            f"KL weight {settings.kl_weight:g}, temperature {settings.temperature:g}, {settings.weighting} weighting"
        )
        training = "It learned from the data and from another recommender's scores (one direction of LLMD4Rec)."
    protocol = protocol_entry("the last item of each row", settings.seen_items)
    return render_card(
        CardFacts(
            name=model_name or repository.split("/")[-1],
            repository=repository,
            config={**model.config.to_dict(), "architectures": [type(model).__name__]},
            training=training,
            protocol=f"{protocol['split']}, {ranking_line(protocol, model.config.num_items)}",
            results=_logged_results(trainer),
            vocabulary=model.vocabulary,
            adapter=_adapter_of(model),
            dataset=", ".join(_as_list(dataset)) or None,
            settings=rows,
            metadata=metadata,
        )
    )


def _adapter_of(model) -> dict | None:
    has_adapter = isinstance(model, models.LLMRecommender) and model.has_adapter
    return model.backbone.peft_config["default"].to_dict() if has_adapter else None


def _logged_results(trainer: HistoryTrainer) -> dict[str, dict[str, float]]:
    """Metrics by what was evaluated: at the best step, or else the last, and after the training."""
    history = trainer.state.log_history
    ended = max((index for index, entry in enumerate(history) if "train_runtime" in entry), default=len(history))
    found = [
        (index, entry["step"], name, metrics)
        for index, entry in enumerate(history)
        for name, metrics in _evaluation(entry).items()
    ]
    best = trainer.args.load_best_model_at_end and trainer.state.best_global_step
    shown = best or max((step for _, step, *_ in found), default=None)
    return {name: metrics for index, step, name, metrics in found if step == shown or index > ended}


def _evaluation(entry: dict) -> dict[str, dict[str, float]]:
    """Of a log what an evaluation found, by the name of what was evaluated; nothing of other logs."""
    prefixes = [
        name.removesuffix("runtime") for name in entry if name.endswith("_runtime") and name != "train_runtime"
    ]
    if not prefixes:
        return {}
    # `eval_`, `eval_NAME_` for one of several sets, or one of the user's own.
    prefix = min(prefixes, key=len)
    own = {name.removeprefix(prefix): value for name, value in entry.items() if name.startswith(prefix)}
    metrics = {
        name: value
        for name, value in own.items()
        if isinstance(value, (int, float)) and name != "loss" and not name.endswith(_NOT_RESULTS)
    }
    # Which rows `eval` stands for is not known: `evaluate` takes any.
    name = "evaluation" if prefix == "eval_" else prefix.removeprefix("eval_").removesuffix("_")
    return {name: metrics} if metrics else {}


def run_card(results: dict, folder: str | os.PathLike, side: str, repository: str, **metadata) -> str:
    """
    The card of one of the two models of a run.

    Args:
        results (`dict`): what `results.json` holds.
        folder (`str`): the model's folder, `output_dir/crm` or `output_dir/llm`.
        side (`str`): `"crm"` or `"llm"`.
        repository (`str`): the Hub id that the card is for.
        metadata: further fields of the header: `license`, `language`, `tags`, `datasets`, ...
    """
    folder, final = Path(folder), results["final"]
    control = final.get(side + CONTROL_SUFFIX)
    columns = {"test": final[side]["test"], "validation": final[side]["validation"]}
    if control is not None:
        columns["test, without distillation"] = control["test"]
    adapter = folder / ADAPTER_CONFIG_NAME
    teacher = "a language model" if side == "crm" else "a conventional recommender"
    return render_card(
        CardFacts(
            name=repository.split("/")[-1],
            repository=repository,
            config=json.loads((folder / "config.json").read_text()),
            training=_training_line(teacher, final[side]["round"], results["rounds"][-1]["round"]),
            protocol=protocol_line(results),
            results=columns,
            vocabulary=ItemVocabulary.from_pretrained(folder),
            adapter=json.loads(adapter.read_text()) if adapter.is_file() else None,
            dataset=results["dataset"]["name"] or None,
            settings={"users": f"{results['dataset']['users']:,}", "seed": results["seed"]},
            metadata=metadata,
        )
    )


def _training_line(teacher: str, best: int, rounds: int) -> str:
    taught = f"It and {teacher} taught each other (LLMD4Rec)"
    if best == 0:
        return f"{taught}, but in none of {rounds} rounds better than before on validation: this one was not taught."
    return f"{taught}; this is round {best} of {rounds}, the best on validation."
