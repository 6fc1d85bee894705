# SPDX-License-Identifier: Apache-2.0
"""Training with 4 and 8 bits through the Trainer: everything that is saved comes back exactly."""

from __future__ import annotations

from operator import itemgetter

import pytest
import torch
from peft import LoraConfig
from trained import losses
from transformers import BitsAndBytesConfig, set_seed

from llmd4rec_hf import LLMRecommender, MutualDistillArguments, MutualDistillTrainer, SequenceCollator
from llmd4rec_hf.models import build_tiny_llm


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def base(tmp_path_factory, vocabulary):
    folder = tmp_path_factory.mktemp("base")
    set_seed(0)
    backbone, tokenizer = build_tiny_llm(vocabulary.texts, hidden_size=64, num_layers=2)
    backbone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_model(base, vocabulary):
    def make(dropout: float = 0.1, **bits) -> LLMRecommender:
        set_seed(1)
        return LLMRecommender.from_backbone(
            base,
            len(vocabulary),
            8,
            item_texts=vocabulary.texts,
            peft_config=LoraConfig(r=4, lora_dropout=dropout),
            quantization_config=BitsAndBytesConfig(**bits),
            max_length=6,
            dropout=dropout,
        )

    return make


@pytest.fixture
def make_trainer(make_crm, splits, tmp_path):
    def make(model, name, device, **settings) -> MutualDistillTrainer:
        defaults = {"num_train_epochs": 4, "per_device_train_batch_size": 16, "learning_rate": 1e-2}
        defaults |= {
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
        }
        args = MutualDistillArguments(
            str(tmp_path / name), use_cpu=device == "cpu", disable_tqdm=True, **{**defaults, **settings}
        )
        return MutualDistillTrainer(model, args, splits["train"], splits["validation"], teacher=make_crm())

    return make


@torch.no_grad()
def hidden(model, splits):
    batch = SequenceCollator(max_length=6)(splits["test"].to_list())
    ids = batch["item_ids"].to(model.device)
    return model.eval().encode(ids, batch["attention_mask"].to(model.device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [NF4, {"load_in_8bit": True}], ids=["nf4", "8bit"])
def test_evaluated_saved_resumed_reloaded(make_model, make_trainer, splits, base, bits, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    whole = make_trainer(make_model(**bits), "whole", device)
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]

    # Evaluations between the epochs leave no trace (but for the random numbers that their data loader draws).
    evaluated, silent = (
        make_trainer(make_model(dropout=0.0, **bits), strategy, device, eval_strategy=strategy)
        for strategy in ("epoch", "no")
    )
    evaluated.train()
    silent.train()
    assert losses(evaluated) == losses(silent)

    # Gone on with from the second epoch's checkpoint, with other weights at first.
    torch.manual_seed(9)
    cut = make_trainer(make_model(**bits), "cut", device)
    cut.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-6")
    assert losses(cut) == losses(whole)
    assert torch.equal(hidden(cut.model, splits), hidden(whole.model, splits))

    # The best model, in the trainer and from its folder, quantised anew.
    best = make_trainer(
        make_model(**bits),
        "best",
        device,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        save_total_limit=1,
    )
    best.train()
    chosen = max((entry for entry in best.state.log_history if "eval_loss" in entry), key=itemgetter("eval_loss"))
    assert chosen["step"] < best.state.global_step
    assert best.state.best_model_checkpoint.endswith(f"checkpoint-{chosen['step']}")
    assert best.evaluate()["eval_loss"] == chosen["eval_loss"]
    loaded = LLMRecommender.from_pretrained(
        best.state.best_model_checkpoint, quantization_config=BitsAndBytesConfig(**bits)
    )
    assert torch.equal(hidden(loaded, splits), hidden(best.model, splits))
    assert {loaded.item_head.weight.dtype, loaded.input_projection.weight.dtype} == {torch.float32}
    assert loaded.item_head.weight.device == loaded.backbone.device

    # In floating point the adapter stands on other base weights, but the order of items is much the same.
    floating = LLMRecommender.from_pretrained(best.state.best_model_checkpoint)
    difference = hidden(floating, splits) - hidden(loaded, splits).to(floating.device)
    assert 0 < difference.abs().mean() < 0.2


@pytest.mark.parametrize(("bits", "tolerance"), [(NF4, 1e-4), ({"load_in_8bit": True}, 0.1)], ids=["nf4", "8bit"])
def test_merged_without_losing_bits(make_model, splits, tmp_path, bits, tolerance):
    """8 bits also round what goes into a layer, so that a merged model computes a little otherwise."""
    model = make_model(**bits)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    before = hidden(model, splits)
    merged = model.merge_and_unload()
    assert merged is model and not model.has_adapter
    torch.testing.assert_close(hidden(model, splits), before, atol=tolerance, rtol=0)
    model.save_pretrained(tmp_path)
    assert torch.equal(hidden(LLMRecommender.from_pretrained(tmp_path), splits), hidden(model, splits))
    with pytest.raises(ValueError, match="saved with its whole backbone"):
        LLMRecommender.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**bits))


def test_a_loaded_quantised_backbone(base, vocabulary):
    """Given as a model it is made ready in the same way, and refused without an adapter."""
    from transformers import AutoModel, AutoTokenizer

    backbone = AutoModel.from_pretrained(base, quantization_config=BitsAndBytesConfig(**NF4))
    settings = {"tokenizer": AutoTokenizer.from_pretrained(base), "max_length": 6}
    with pytest.raises(ValueError, match="Quantised weights cannot be trained"):
        LLMRecommender.from_backbone(backbone, len(vocabulary), 8, **settings)
    model = LLMRecommender.from_backbone(backbone, len(vocabulary), 8, peft_config=LoraConfig(r=2), **settings)
    batch = {"item_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[2, 3, 4]])}
    model.eval()(**batch)
    model.train()(**batch).loss.backward()
    assert "quantization_config" not in model.config.backbone_config
