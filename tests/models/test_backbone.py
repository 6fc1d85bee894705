# SPDX-License-Identifier: Apache-2.0
"""Quantised and adapted backbones. What every decoder has to satisfy is in `test_llm_recommender.py`."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BitsAndBytesConfig

from llmd4rec_hf.errors import ConfigurationError
from llmd4rec_hf.models import LLMRecommender, build_tiny_llm


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- adapters --------------------------------------------------------------------------------------------------------


def adapted(folder, peft_config):
    return LLMRecommender.from_backbone(folder, 12, 6, peft_config=peft_config)


def test_lora_takes_all_linear_layers_by_default(tiny_folder):
    peft_config = LoraConfig(r=2)
    model = adapted(tiny_folder, peft_config)
    layers = {name.split(".lora_A")[0].split(".")[-1] for name in trainable(model) if "lora_A" in name}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert peft_config.target_modules is None, "the given configuration stays as it was"


@pytest.mark.parametrize(
    "peft_config",
    [
        LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]),
        LoraConfig(r=2, use_rslora=True, target_modules=["q_proj"]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["dora", "rslora", "ia3"],
)
def test_other_adapters_learn_and_are_saved(tiny_folder, peft_config, batch, random_vectors, tmp_path):
    model = adapted(tiny_folder, peft_config).train()
    model.set_item_vectors(random_vectors())
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path)
    loaded = LLMRecommender.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(batch["item_ids"]), model.encode(batch["item_ids"]))


@pytest.mark.parametrize(
    ("peft_config", "message"),
    [
        (PromptTuningConfig(num_virtual_tokens=2), "PromptTuningConfig adds virtual tokens"),
        (LoraConfig(target_modules=["no_such_layer"]), "PEFT cannot adapt LlamaModel: .*no_such_layer"),
    ],
)
def test_adapters_that_cannot_be(tiny_folder, peft_config, message):
    with pytest.raises(ConfigurationError, match=message):
        adapted(tiny_folder, peft_config)


def test_an_adapter_of_another_backbone(tiny_folder, tmp_path, titles):
    adapted(tiny_folder, LoraConfig(r=2)).save_pretrained(tmp_path)
    other, _ = build_tiny_llm(titles, hidden_size=32)
    with pytest.raises(ConfigurationError, match="(?s)The adapter does not fit this LlamaModel: .*size mismatch"):
        LLMRecommender.from_pretrained(tmp_path, backbone=other)


# --- four bits -------------------------------------------------------------------------------------------------------

needs_bitsandbytes = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")


def four_bits():
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


@pytest.fixture
def four_bit_model(tmp_path, titles, random_vectors, prompt):
    torch.manual_seed(0)
    backbone, tokenizer = build_tiny_llm([*titles, prompt], hidden_size=64)
    backbone.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = LLMRecommender.from_backbone(
        tmp_path / "base",
        12,
        6,
        prompt=prompt,
        item_texts=titles,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        quantization_config=four_bits(),
    )
    model.set_item_vectors(random_vectors())
    return model


def gradients(model, batch):
    model.train().zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


@needs_bitsandbytes
def test_four_bits_train_evaluate_train(four_bit_model, batch):
    """bitsandbytes repacks its weights in the first evaluation on some CPUs, and could not be trained after it."""
    from bitsandbytes.nn import Linear4bit

    model = four_bit_model
    assert sum(isinstance(module, Linear4bit) for module in model.backbone.modules()) == 14
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    before = gradients(model, batch)
    with torch.no_grad():
        first = model.eval()(**batch).loss
    after = gradients(model, batch)
    assert before.keys() == after.keys()
    assert all(torch.equal(grad, after[name]) for name, grad in before.items())
    assert any(grad.any() for name, grad in before.items() if "lora_B" in name)
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).loss, first)

    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
    gradients(model, batch)
    optimizer.step()
    with torch.no_grad():
        assert model.eval()(**batch).loss < first


@needs_bitsandbytes
def test_four_bits_are_saved_and_loaded(four_bit_model, batch, tmp_path):
    from bitsandbytes.nn import Linear4bit

    model = four_bit_model
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        expected = model.eval().encode(batch["item_ids"])
    model.save_pretrained(tmp_path / "model")
    assert set(load_file(tmp_path / "model" / "model.safetensors")) == {
        "input_projection.weight",
        "input_projection.bias",
        "item_head.weight",
        "item_vectors",
        "input_text_projection.weight",
        "head_text_projection.weight",
        "item_text_features",
    }
    loaded = LLMRecommender.from_pretrained(tmp_path / "model", quantization_config=four_bits())
    assert any(isinstance(module, Linear4bit) for module in loaded.modules())
    with torch.no_grad():
        assert torch.equal(loaded.encode(batch["item_ids"]), expected)
        assert torch.equal(loaded.item_matrix(), model.item_matrix())
    assert loaded.content_hash() == model.content_hash()


@needs_bitsandbytes
def test_four_bit_encoders_with_item_text(tiny_folder, tmp_path, titles, batch):
    """An encoder reads titles through a second, bidirectional model, into which quantised weights do not fit."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(tmp_path)
    model = LLMRecommender.from_backbone(
        tmp_path,
        12,
        6,
        tokenizer=tokenizer,
        item_texts=titles,
        peft_config=LoraConfig(r=4, target_modules=["query", "value"]),
        quantization_config=four_bits(),
    )
    assert model.item_text_features[1:].std() > 0.9
    assert all(grad.isfinite().all() for grad in gradients(model, batch).values())


@needs_bitsandbytes
@torch.no_grad()
def test_four_bits_are_merged_in_floating_point(four_bit_model, batch, tmp_path):
    """Rounded to four bits again, most of the adapter would be lost."""
    model = four_bit_model.eval()
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    expected = model.encode(batch["item_ids"])
    model.merge_and_unload()
    assert not model.has_adapter
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model.encode(batch["item_ids"]), expected, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path / "merged")
    loaded = LLMRecommender.from_pretrained(tmp_path / "merged")
    assert torch.equal(loaded.encode(batch["item_ids"]), model.encode(batch["item_ids"]))


@needs_bitsandbytes
def test_a_loaded_four_bit_backbone_needs_an_adapter_too(four_bit_model, tmp_path):
    base = AutoModel.from_pretrained(tmp_path / "base", quantization_config=four_bits())
    with pytest.raises(ConfigurationError, match="Quantised weights cannot be trained"):
        LLMRecommender.from_backbone(base, 12, tokenizer=four_bit_model.tokenizer)
