# SPDX-License-Identifier: Apache-2.0
"""LLM recommenders on other decoders, on pretrained ones, and on what cannot be one."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain_llm import CLOSE, assert_is_the_plain_computation, soft_tokens, trainable
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BitsAndBytesConfig,
    LlamaForCausalLM,
)

from llmd4rec_hf.errors import ConfigurationError
from llmd4rec_hf.models import LLMRecommender


# --- what cannot be built --------------------------------------------------------------------------------------------


def bert(**options):
    return BertModel(
        BertConfig(
            vocab_size=200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **options
        )
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "no place for it"}, r"must contain '\{history\}', where the items go; got 'no place for it'"),
        ({"item_texts": ["a", "b"]}, "item_texts holds 2 texts for 12 items"),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, "Quantised weights cannot be trained"),
        ({"supervision": "first_position"}, "supervision must be one of all_positions, last_position"),
        ({"backbone": "/no/such/folder"}, "Cannot load the tokenizer '/no/such/folder': give a folder or a Hub id"),
    ],
)
def test_errors(tiny_folder, options, message):
    with pytest.raises(ConfigurationError, match=message):
        LLMRecommender.from_backbone(**{"backbone": tiny_folder, "num_items": 12} | options)


def test_unusable_backbones(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    decoder = AutoModel.from_pretrained(tiny_folder)
    adapted = get_peft_model(AutoModel.from_pretrained(tiny_folder), LoraConfig(target_modules=["q_proj"]))
    for backbone, message in [
        (bert(), "BertModel is not causal: a later token changes earlier states. Give a decoder"),
        (
            LlamaForCausalLM(decoder.config),
            r"LlamaForCausalLM is not a bare backbone: .*without head \(its `.base_model`\)",
        ),
        (adapted, "PeftModel.* is not a bare backbone: .*without adapter, which goes into `peft_config`"),
        (torch.nn.Linear(1, 1), "Linear is not a bare backbone"),
        ("/no/such/folder", "Cannot load the language model '/no/such/folder': give a folder or a Hub id"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            LLMRecommender.from_backbone(backbone, 12, tokenizer=tokenizer)


def test_a_folder_that_holds_something_else(tiny_folder, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="Cannot load the language model"):
        LLMRecommender.from_backbone(tmp_path, 12, tokenizer=AutoTokenizer.from_pretrained(tiny_folder))


@pytest.mark.parametrize("training", [True, False])
def test_the_causality_check_leaves_the_mode(make_llm, tiny_folder, training):
    backbone = AutoModel.from_pretrained(tiny_folder).train(training)
    model = LLMRecommender.from_backbone(backbone, 12, tokenizer=AutoTokenizer.from_pretrained(tiny_folder))
    assert model.backbone.training == training


# --- other decoders --------------------------------------------------------------------------------------------------

_SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
FAMILIES = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 8},
    # Shorter than the prompt: the cached prefix slides out of the window.
    "mistral": _GROUPED | {"sliding_window": 4},
    "gemma": _GROUPED | {"head_dim": 8},
    "gemma2": _GROUPED | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": _GROUPED | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "phi3": _GROUPED,
    "gpt_neox": _SIZES,
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "bert": _SIZES | {"is_decoder": True},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tiny_folder, awaken, prompt):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    special = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    dropouts = {"dropout": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "hidden_dropout_prob": 0.0}
    settings = FAMILIES[request.param] | special | {"max_position_embeddings": 64}
    config = AutoConfig.for_model(request.param, **settings)
    for name, value in (dropouts | {"attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}).items():
        if hasattr(config, name):
            setattr(config, name, value)
    model = LLMRecommender.from_backbone(AutoModel.from_config(config), 12, 6, tokenizer=tokenizer, prompt=prompt)
    # As the backbone reads them: some families scale what their table holds.
    words = model.token_embedding(torch.arange(len(tokenizer)))
    model.set_item_vectors(torch.randn(13, 6))
    first_sizes = [values.square().mean().sqrt().item() for values in (soft_tokens(model, range(1, 13)), words)]
    model = awaken(model)
    model.first_sizes = first_sizes
    return model


def test_families_are_causal_and_do_not_mix_rows(family):
    family.eval()
    with torch.no_grad():
        whole = family.encode(torch.tensor([[3, 1, 4, 1, 5], [9, 2, 0, 0, 0]]))
        changed = family.encode(torch.tensor([[3, 1, 4, 7, 5], [9, 2, 0, 0, 0]]))
        alone = family.encode(torch.tensor([[9, 2]]))
    assert torch.equal(whole[0, :3], changed[0, :3])
    assert not torch.allclose(whole[0, 3:], changed[0, 3:], atol=1e-3)
    assert torch.equal(whole[1], changed[1])
    torch.testing.assert_close(whole[1, :2], alone[0], **CLOSE)


def test_families_read_soft_tokens_of_the_size_of_words(family):
    soft, word = family.first_sizes
    assert soft == pytest.approx(word, rel=0.5)


@pytest.mark.parametrize("supervision", ["all_positions", "last_position"])
def test_families_compute_what_plain_concatenation_does(family, batch, supervision):
    family.config.supervision = supervision
    try:
        assert_is_the_plain_computation(family.train(), batch)
    finally:
        family.config.supervision = "all_positions"


def test_families_are_saved_and_loaded(family, batch, tmp_path):
    family.eval().save_pretrained(tmp_path)
    loaded = LLMRecommender.from_pretrained(tmp_path)
    assert type(loaded.backbone) is type(family.backbone)
    assert torch.equal(loaded.encode(batch["item_ids"]), family.encode(batch["item_ids"]))


def test_families_learn(family, batch):
    family.train()
    optimizer = torch.optim.AdamW(family.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = family(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


# --- pretrained models -----------------------------------------------------------------------------------------------

PRETRAINED = {"minilm-l6-v2": ["query", "value"], "stories260k": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretrained_models(shared, name, titles, random_vectors, batch, tmp_path):
    folder = shared / "models" / name
    if not folder.is_dir():
        pytest.skip(f"shared holds no {name}")
    torch.manual_seed(0)
    peft_config = LoraConfig(r=4, target_modules=PRETRAINED[name])
    model = LLMRecommender.from_backbone(folder, 12, 6, item_texts=titles, peft_config=peft_config)
    model.set_item_vectors(random_vectors())
    # What the titles mean shows in their features: boots are closer to boots than to a hose.
    features = torch.nn.functional.normalize(model.item_text_features[1:], dim=1)
    assert features[0] @ features[1] > features[0] @ features[4]

    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-4)
    model.eval()
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]

    with torch.no_grad():
        states = model.encode(torch.tensor([[3, 1, 4, 1, 5], [9, 2, 0, 0, 0]]))
        changed = model.encode(torch.tensor([[3, 1, 4, 7, 5], [9, 2, 0, 0, 0]]))
        torch.testing.assert_close(model.encode(torch.tensor([[9, 2]]))[0], states[1, :2], rtol=1e-3, atol=1e-4)
        assert torch.equal(states[0, :3], changed[0, :3])
        assert not torch.allclose(states[0, 3:], changed[0, 3:], atol=1e-4)
        model.save_pretrained(tmp_path)
        loaded = LLMRecommender.from_pretrained(tmp_path)
        assert torch.equal(loaded.encode(batch["item_ids"]), model.encode(batch["item_ids"]))
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 2_000_000
