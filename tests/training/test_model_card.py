# SPDX-License-Identifier: Apache-2.0
"""The card by itself; that it is pushed and its example runs is in `test_hub.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, OFTConfig
from transformers import TrainingArguments

from llmd4rec_hf import CRMArguments, CRMTrainer, MutualDistillTrainer
from llmd4rec_hf.errors import RunStateError
from llmd4rec_hf.hub import push_run


@pytest.fixture
def card(tmp_path):
    def read(trainer, **options) -> tuple[dict, str]:
        trainer.create_model_card(**options)
        header, text = (tmp_path / "run" / "README.md").read_text().split("---\n")[1:3]
        return yaml.safe_load(header), text

    (tmp_path / "run").mkdir()
    return read


@pytest.fixture
def args(tmp_path):
    return CRMArguments(str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, save_strategy="no", num_train_epochs=1)


def test_what_push_to_hub_forwards(make_crm, args, splits, card):
    trainer = CRMTrainer(make_crm(), args, eval_dataset=splits["validation"])
    metrics = trainer.evaluate()
    header, text = card(
        trainer,
        language="en",
        license="mit",
        tags=["shop", "llmd4rec_hf"],
        model_name="my-model",
        tasks="recommendation",
        dataset_tags="user/log",
        dataset=["log"],
        dataset_args="small",
    )
    assert (header["language"], header["license"], header["datasets"]) == ("en", "mit", "user/log")
    assert header["tags"].count("llmd4rec_hf") == 1 and "shop" in header["tags"]
    (entry,) = header["model-index"][0]["results"]
    assert header["model-index"][0]["name"] == "my-model"
    assert entry["task"]["type"] == "recommendation"
    assert entry["dataset"] == {"name": "log", "type": "log", "config": "small"}
    values = {metric["type"]: metric["value"] for metric in entry["metrics"]}
    assert "|  | evaluation |" in text
    assert values["ndcg@10"] == pytest.approx(metrics["eval_ndcg@10"], abs=1e-6)
    assert f"| ndcg@10 | {metrics['eval_ndcg@10']:.4f} |" in text
    assert text.lstrip().startswith("# my-model")


def test_before_any_evaluation_and_without_vocabulary(make_crm, args, card):
    header, text = card(CRMTrainer(make_crm(), args))
    assert "Not evaluated yet." in text
    assert "model-index" not in header and "metrics" not in header
    assert "recommend(" not in text
    assert 'SASRecModel.from_pretrained("run")' in text


def test_the_best_evaluation_is_shown(make_crm, args, card):
    trainer = CRMTrainer(make_crm(), args)
    trainer.state.log_history = [
        {"eval_ndcg@10": 0.9, "eval_runtime": 0.1, "step": 1},
        {"loss": 1.0, "step": 2},
        {"eval_ndcg@10": 0.4, "eval_runtime": 0.1, "step": 2},
    ]
    assert "| ndcg@10 | 0.4000 |" in card(trainer)[1]
    args.load_best_model_at_end, trainer.state.best_global_step = True, 1
    assert "| ndcg@10 | 0.9000 |" in card(trainer)[1]
    # What is evaluated once the training has ended is the best model.
    trainer.state.log_history += [
        {"my_runtime": 1.0, "step": 7},
        {"train_runtime": 9.0, "train_ndcg@10": 0.3, "step": 2},
        {"test_ndcg@10": 0.7, "test_runtime": 0.1, "step": 2},
    ]
    assert "|  | evaluation | test |" in card(trainer)[1]
    assert "| ndcg@10 | 0.9000 | 0.7000 |" in card(trainer)[1]


def test_a_column_for_each_set_and_numbers_alone(make_crm, args, splits, card):
    def compute_metrics(prediction):
        return {"mean": prediction.predictions.mean(), "worst_loss": 9, "said": "a text"}

    sets = {"validation": splits["validation"], "test": splits["test"]}
    trainer = CRMTrainer(make_crm(), args, eval_dataset=sets, compute_metrics=compute_metrics)
    values = trainer.evaluate()
    header, text = card(trainer, dataset="log")
    means = [f"{values[f'eval_{name}_mean']:.4f}" for name in sets]
    assert f"|  | validation | test |\n| --- | ---: | ---: |\n| mean | {means[0]} | {means[1]} |\n" in text
    assert header["metrics"] == ["mean", "worst_loss"]


def test_what_a_step_holds_is_stated(make_crm, args, card):
    assert "| batch | 256 histories |" in card(CRMTrainer(make_crm(), args))[1]
    args.max_positions_per_batch, args.num_sampled_items = 512, 4096
    # Of fewer items than that the loss takes all.
    assert "others, drawn for each step" not in card(CRMTrainer(make_crm(), args))[1]
    text = card(CRMTrainer(make_crm(num_items=5000), args))[1]
    assert "| batch | 1 x at most 512 padded positions |" in text
    assert "| loss | over the true items and 4,096 others, drawn for each step |" in text


def test_a_base_model_that_is_not_on_the_hub_is_not_named_by_its_path(make_llm, tmp_path, card):
    model = make_llm(peft_config=LoraConfig(r=2, use_dora=True))
    model.config.backbone_name_or_path = str(tmp_path / "my-base")
    trainer = MutualDistillTrainer(model, TrainingArguments(str(tmp_path / "run"), use_cpu=True))
    header, text = card(trainer)
    assert "base_model" not in header
    assert str(tmp_path) not in text
    assert 'backbone="my-base"' in text
    assert "DoRA, rank 2" in text
    header, _ = card(trainer, finetuned_from="user/other")
    assert header["base_model"] == "user/other"


def test_an_adapter_that_is_not_sized_by_its_rank(make_llm, tmp_path, card):
    model = make_llm(peft_config=OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]))
    trainer = MutualDistillTrainer(model, TrainingArguments(str(tmp_path / "run"), use_cpu=True))
    assert "| adapter | OFT, in PEFT's files |" in card(trainer)[1]


def test_only_a_finished_run_is_pushed(tmp_path):
    with pytest.raises(RunStateError, match=r"no results.json: let the run end"):
        push_run(Path(tmp_path), "user/run")
