# SPDX-License-Identifier: Apache-2.0
"""
Train one of the models of `models.yaml`, and those it is built upon, and write what it does on the test set.

    python benchmarks/quality/run.py sasrec_from_llm --data DATA/amazon_beauty --backbone minilm-l6-v2

A model that is there already is taken as it is, and an interrupted one is gone on with.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from transformers import set_seed
from transformers.utils import logging

from llmd4rec_hf import (
    CRMArguments,
    CRMTrainer,
    GRU4RecConfig,
    GRU4RecModel,
    LLMRecommender,
    MutualDistillArguments,
    MutualDistillTrainer,
    RecommenderEnsemble,
    SASRecConfig,
    SASRecModel,
)
from llmd4rec_hf.data import data_hash, prepare
from llmd4rec_hf.data.arrow import column_array
from llmd4rec_hf.data.floors import floor_ranks
from llmd4rec_hf.evaluation import ranking_metrics
from llmd4rec_hf.files import whole_folder, write_json
from llmd4rec_hf.training.checkpoints import last_whole_checkpoint


sys.path.insert(0, str(Path(__file__).parent.parent))
from baselines import BinaryCrossEntropyTrainer  # noqa: E402
from common import installed_versions, machine  # noqa: E402


logger = logging.get_logger("llmd4rec_hf")
HERE = Path(__file__).parent
METRIC = "ndcg@10"
SPECIFICATION = yaml.safe_load((HERE / "models.yaml").read_text())
SASREC = (SASRecConfig, SASRecModel)
CRMS = {"sasrec": SASREC, "binary": SASREC, "follower": SASREC, "gru4rec": (GRU4RecConfig, GRU4RecModel)}


@dataclasses.dataclass
class Study:
    """One data set and seed, and the folder in which its models are."""

    data: Path
    backbone: str
    seed: int
    folder: Path
    bf16: bool

    def __post_init__(self):
        self.prepared = prepare(str(self.data), None)
        self.sequences, self.vocabulary = self.prepared.sequences, self.prepared.vocabulary

    def settings(self, name: str) -> dict:
        """A model's own settings over those of its kind."""
        own = SPECIFICATION["models"][name]
        kind = SPECIFICATION["kinds"].get(own["kind"], {})
        of_data = SPECIFICATION.get("datasets", {}).get(self.data.name, {}).get(own["kind"], {})
        merged = {
            part: {**kind.get(part, {}), **of_data.get(part, {}), **own.get(part, {})} for part in ("model", "args")
        }
        return {**own, **merged}

    def model(self, name: str):
        """A trained model, trained now if it is not there."""
        folder, settings = self.folder / name, self.settings(name)
        if settings["kind"] == "ensemble":
            return RecommenderEnsemble([self.model(member) for member in settings["of"]])
        if not (folder / "model").is_dir():
            self._train(name, folder)
        model = self._build(name)
        model.load_weights(folder / "model")
        return model

    def _build(self, name: str):
        settings = self.settings(name)
        set_seed(self.seed)
        if settings["kind"] == "llm":
            from peft import LoraConfig

            model = LLMRecommender.from_backbone(
                self.backbone,
                len(self.vocabulary),
                item_texts=self.vocabulary.texts,
                item_text_cache=self.folder.parent / "item_text",
                peft_config=LoraConfig(r=16, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"),
                **settings["model"],
            )
        else:
            config, kind = CRMS[settings["kind"]]
            model = kind(config(num_items=len(self.vocabulary), **settings["model"]))
        model.vocabulary = self.vocabulary
        return model

    def _train(self, name: str, folder: Path) -> None:
        settings = self.settings(name)
        sources = {role: self.model(settings[role]) for role in ("vectors", "teacher") if role in settings}
        model = self._build(name)
        if "vectors" in sources:
            model.set_item_vectors(sources["vectors"].item_matrix())
        if settings.get("titles"):
            model.set_item_vectors(self._build("llm").title_vectors(model.config.hidden_size))
        trainer = self._trainer(model, settings, folder, sources.get("teacher"))
        started = time.monotonic()
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
        facts = {
            "seconds": time.monotonic() - started,
            "epochs": trainer.state.epoch,
            "validation": trainer.state.best_metric,
            "history": [entry["eval_" + METRIC] for entry in trainer.state.log_history if "eval_" + METRIC in entry],
        }
        write_json(folder / "training.json", facts)
        with whole_folder(folder / "model") as partial:
            model.save_pretrained(partial)

    def _trainer(self, model, settings, folder, teacher=None, seen_items="mask"):
        is_llm = settings["kind"] == "llm"
        arguments, trainer = (MutualDistillArguments, MutualDistillTrainer) if is_llm else (CRMArguments, CRMTrainer)
        if settings["kind"] == "binary":
            trainer = BinaryCrossEntropyTrainer
        own = {
            "seed": self.seed,
            "bf16": self.bf16,
            "use_cpu": not torch.cuda.is_available(),
            "seen_items": seen_items,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "logging_strategy": "epoch",
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": METRIC,
            "greater_is_better": True,
            "restore_callback_states_from_checkpoint": True,
            "report_to": "none",
            "disable_tqdm": not sys.stderr.isatty(),
        }
        if is_llm:
            own["refresh_item_vectors"] = False
        args = arguments(str(folder), **own | settings["args"])
        return trainer(model, args, self.sequences["train"], self.sequences["validation"], teacher=teacher)

    def test(self, name: str) -> tuple[dict, np.ndarray]:
        """What a result file says of a model, and its rank per test user, seen items left out."""
        settings = self.settings(name)
        training = parameters = None
        if settings["kind"] == "rule":
            ranks = {
                "mask": floor_ranks(self.sequences["train"], self.sequences["test"], len(self.vocabulary))[0][name]
            }
        else:
            model = self.model(name)
            ranks = {policy: self._model_ranks(model, settings, policy) for policy in ("mask", "keep")}
            parameters = sum(parameter.numel() for parameter in model.parameters())
        if (self.folder / name).is_dir():
            training = json.loads((self.folder / name / "training.json").read_text())
        result = {
            "model": name,
            "dataset": self.data.name,
            "seed": self.seed,
            "settings": settings,
            "bf16": self.bf16,
            "test": {policy: ranking_metrics(values) for policy, values in ranks.items()},
            "slices": self._slices(ranks["mask"]),
            "training": training,
            "parameters": parameters,
            "data_hash": data_hash(self.sequences["test"]),
        }
        return result, ranks["mask"]

    def _model_ranks(self, model, settings: dict, seen_items: str) -> np.ndarray:
        trainer = self._trainer(model, settings, self.folder / "test", seen_items=seen_items)
        return trainer.predict(self.sequences["test"]).predictions

    def _slices(self, ranks: np.ndarray) -> dict:
        """NDCG@10 where the history is short, and where the true item is rare in training."""
        lengths = column_array(self.sequences["test"], "length") - 1
        targets = np.array([row[-1] for row in self.sequences["test"]["item_ids"]])
        train = np.concatenate(self.sequences["train"]["item_ids"])
        counts = np.bincount(train, minlength=len(self.vocabulary) + 1)[targets]
        parts = {"short histories": lengths <= np.median(lengths), "rare items": counts <= np.median(counts)}
        found = {}
        for part, mask in parts.items():
            for side, rows in ((part, mask), ("not " + part, ~mask)):
                found[side] = {"users": int(rows.sum()), METRIC: ranking_metrics(ranks[rows])[METRIC]}
        return found


def needs_backbone(name: str) -> bool:
    """Whether a model, or one that it is built upon, is an LLM or begins with an LLM's title vectors."""
    own = SPECIFICATION["models"][name]
    sources = [own[role] for role in ("vectors", "teacher") if role in own] + own.get("of", [])
    return own["kind"] == "llm" or own.get("titles", False) or any(map(needs_backbone, sources))


def command_of(options: argparse.Namespace) -> str:
    """What makes a result again; folders are called by their names, since elsewhere they lie somewhere else."""
    words = ["python benchmarks/quality/run.py", options.name, "--data", options.data.name]
    if options.backbone is not None:
        folder = Path(options.backbone)
        words += ["--backbone", folder.name if folder.is_dir() else options.backbone]
    return " ".join([*words, "--seed", str(options.seed), *([] if options.bf16 else ["--no-bf16"])])


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, test, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SPECIFICATION["models"], metavar="MODEL", help="one of models.yaml")
    parser.add_argument("--data", type=Path, required=True, help="folder of a data set with titles")
    parser.add_argument("--backbone", default=None, help="folder or Hub id of the LLM")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="where the models are kept")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(argv)
    if options.backbone is None and needs_backbone(options.name):
        parser.error(f"{options.name} is built upon an LLM: give its folder or Hub id as --backbone")
    folder = options.runs / options.data.name / f"seed-{options.seed}"
    study = Study(options.data, options.backbone, options.seed, folder, options.bf16)
    result, ranks = study.test(options.name)
    result = {"command": command_of(options), "machine": machine(), "versions": installed_versions(), **result}
    target = HERE / "results" / options.data.name
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / f"{options.name}-seed{options.seed}.json", result)
    np.save(target / f"{options.name}-seed{options.seed}.npy", ranks.astype(np.min_scalar_type(ranks.max())))
    test = result["test"]["mask"]
    what = f"{options.name} {options.data.name} seed {options.seed}"
    print(f"{what}: HR@10 {test['hr@10']:.4f} NDCG@10 {test[METRIC]:.4f}")


if __name__ == "__main__":
    main()
