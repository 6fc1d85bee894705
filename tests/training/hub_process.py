# SPDX-License-Identifier: Apache-2.0
"""What `test_hub.py` runs in processes of their own, because the Hub's address is read at import."""

from __future__ import annotations

import gc
import json
import re
import sys
from pathlib import Path

import pandas as pd
import torch
from peft import LoraConfig
from transformers import AutoModel, PreTrainedModel, TrainerCallback, set_seed

from llmd4rec_hf import (
    CRMArguments,
    CRMTrainer,
    ItemVocabulary,
    LLMRecommender,
    MutualDistillArguments,
    MutualDistillation,
    MutualDistillationConfig,
    MutualDistillTrainer,
    SASRecConfig,
    SASRecModel,
    load_interactions,
    split_leave_one_out,
)
from llmd4rec_hf.errors import ConfigurationError
from llmd4rec_hf.hub import push_run


IDS = [f"item-{number}" for number in range(12)]
TITLES = [f"title of thing {number}" for number in range(12)]
HISTORIES = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [12, 0, 0, 0]])
SETTINGS = {
    "use_cpu": True,
    "disable_tqdm": True,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "save_strategy": "epoch",
    "eval_strategy": "epoch",
    "save_total_limit": 1,
    "push_to_hub": True,
    "hub_always_push": True,
}


class WaitForPush(TrainerCallback):
    """Epochs of a millisecond would overwrite the files of the last one before they are uploaded."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_epoch_begin(self, *_, **__):
        self.trainer._finish_current_push()


@torch.no_grad()
def scores(model: PreTrainedModel) -> list:
    return (model.eval().encode(HISTORIES) @ model.item_matrix().T).tolist()


def push(folder: Path) -> None:
    """Train both models, with pushes on the way, and write down their scores."""
    log = {"user_id": [], "item_id": [], "timestamp": []}
    for user in range(24):
        for step in range(4 + user % 4):
            log["user_id"].append(f"u{user}")
            log["item_id"].append(IDS[(user + step) % 12])
            log["timestamp"].append(step)
    vocabulary = ItemVocabulary(IDS, TITLES)
    splits = split_leave_one_out(load_interactions(pd.DataFrame(log)), vocabulary)
    set_seed(0)
    crm = SASRecModel(SASRecConfig(num_items=12, hidden_size=8, num_layers=1, max_length=6))
    crm.vocabulary = vocabulary
    args = CRMArguments(str(folder / "crm"), hub_model_id="user/crm", **SETTINGS)
    trainer = CRMTrainer(crm, args, splits["train"], splits["validation"])
    trainer.add_callback(WaitForPush(trainer))
    trainer.train()
    trainer.push_to_hub(dataset="walk", license="mit", tags="demo", blocking=True)

    llm = LLMRecommender.from_backbone(
        "user/base", 12, 8, item_texts=TITLES, peft_config=LoraConfig(r=2), max_length=6, prompt="title of {history}"
    )
    llm.vocabulary = vocabulary
    args = MutualDistillArguments(str(folder / "llm"), hub_model_id="user/llm", learning_rate=1e-2, **SETTINGS)
    trainer = MutualDistillTrainer(llm, args, splits["train"], splits["validation"], teacher=crm)
    trainer.add_callback(WaitForPush(trainer))
    trainer.train()
    trainer.push_to_hub()

    # Without a trainer, and with the checkpoint beside the model.
    crm.push_to_hub("user/by-hand")
    llm.save_pretrained(folder / "saved", push_to_hub=True, repo_id="user/saved")
    settings = {**SETTINGS, "num_train_epochs": 1}
    args = CRMArguments(str(folder / "whole"), hub_model_id="user/whole", hub_strategy="checkpoint", **settings)
    CRMTrainer(crm, args, splits["train"], splits["validation"]).train()
    args = CRMArguments(str(folder / "end"), hub_model_id="user/end", hub_strategy="end", **settings)
    trainer = CRMTrainer(crm, args, splits["train"], splits["validation"])
    trainer.train()
    trainer.save_model()
    pushed = {"llm": scores(llm), "crm-end": scores(crm)}

    # Both models of a run.
    quick = {"use_cpu": True, "disable_tqdm": True, "num_train_epochs": 1}
    config = MutualDistillationConfig(str(folder / "run"), rounds=1, dataset_name="walk")
    args = MutualDistillArguments("unused", **quick), CRMArguments("unused", **quick)
    MutualDistillation(llm, crm, splits, vocabulary, config, *args).run()
    push_run(folder / "run", "user/run", license="apache-2.0")
    (folder / "pushed.json").write_text(json.dumps(pushed | {"run-llm": scores(llm), "run-crm": scores(crm)}))


def load(folder: Path) -> None:
    """Load everything from the Hub, first with and then without a network."""
    found = {"llm": scores(LLMRecommender.from_pretrained("user/llm"))}
    found["llm-saved"] = scores(LLMRecommender.from_pretrained("user/saved"))
    found["llm-local"] = scores(LLMRecommender.from_pretrained("user/llm", local_files_only=True))
    found["crm"] = scores(SASRecModel.from_pretrained("user/crm"))
    found["crm-auto"] = scores(AutoModel.from_pretrained("user/crm"))
    found["crm-by-hand"] = scores(SASRecModel.from_pretrained("user/by-hand"))
    found["crm-end"] = scores(SASRecModel.from_pretrained("user/end"))
    first = json.loads((folder / "revisions.json").read_text())
    found["crm-first"] = scores(SASRecModel.from_pretrained("user/crm", revision=first["user/crm"]))
    found["llm-first"] = scores(LLMRecommender.from_pretrained("user/llm", revision=first["user/llm"]))
    # transformers sees an adapter, and loads what that was trained on.
    found["auto-class"] = type(AutoModel.from_pretrained("user/llm")).__name__
    found["recommended"] = LLMRecommender.from_pretrained("user/llm").recommend([["item-1", "item-2"]], k=3).ids
    try:
        LLMRecommender.from_pretrained("user/llm", token="hf_other", cache_dir=folder / "empty")
    except ConfigurationError as error:
        found["wrong token"] = str(error)
    try:
        LLMRecommender.from_pretrained("user/moved")
    except ConfigurationError as error:
        found["moved"] = str(error)
    found["given"] = scores(LLMRecommender.from_pretrained("user/moved", backbone="user/base"))
    found["run-crm"] = scores(SASRecModel.from_pretrained("user/run-crm"))
    found["run-llm"] = scores(LLMRecommender.from_pretrained("user/run-llm"))
    for name in ("crm", "llm", "run-crm", "run-llm"):
        card = Path(folder / f"{name}.md").read_text()
        (example,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
        exec(example, {})
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    gc.freeze()  # for the trainings to collect their own garbage alone
    {"push": push, "load": load}[sys.argv[1]](Path(sys.argv[2]))
