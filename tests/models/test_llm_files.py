# SPDX-License-Identifier: Apache-2.0
"""How an LLM recommender is saved, loaded and merged, with an adapter and without."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel
from plain_llm import trainable
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertModel, BitsAndBytesConfig

from llmd4rec_hf.data import ItemVocabulary
from llmd4rec_hf.errors import ConfigurationError
from llmd4rec_hf.models import LLMRecommender, LLMRecommenderConfig


OWN_TENSORS = {"input_projection.weight", "input_projection.bias", "item_head.weight", "item_vectors"}
TEXT_TENSORS = {
    "input_text_projection.weight",
    "head_text_projection.weight",
    "item_text_features",
}


@pytest.mark.parametrize("text", [True, False])
def test_files_with_an_adapter(make_llm, titles, tmp_path, text):
    model = make_llm(adapter=True, text=text)
    model.vocabulary = ItemVocabulary(list(range(12)), titles)
    model.save_pretrained(tmp_path)
    own, adapter = (load_file(tmp_path / f"{name}.safetensors") for name in ("model", "adapter_model"))
    assert set(own) == OWN_TENSORS | (TEXT_TENSORS if text else set()), "no base weights"
    assert len(adapter) == 16
    assert all(name.startswith("base_model.model.layers.") and ".lora_" in name for name in adapter)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"config.json", "adapter_config.json", "vocabulary.json", "tokenizer.json"}
    assert "README.md" not in names, "PEFT's card would claim the whole repository"


def test_files_without_an_adapter(make_llm, tmp_path):
    model = make_llm()
    model.save_pretrained(tmp_path)
    backbone = {f"backbone.{name}" for name in model.backbone.state_dict()}
    assert set(load_file(tmp_path / "model.safetensors")) == OWN_TENSORS | backbone
    assert not list(tmp_path.glob("adapter*"))


def test_the_adapter_loads_on_the_bare_backbone(make_llm, tiny_folder, tmp_path):
    model = make_llm(adapter=True).eval()
    model.save_pretrained(tmp_path)
    bare = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_folder), tmp_path).eval()
    tokens = torch.tensor([[5, 6, 7]])
    states, plain = bare(tokens).last_hidden_state, AutoModel.from_pretrained(tiny_folder)(tokens).last_hidden_state
    assert torch.equal(states, model.backbone(tokens).last_hidden_state)
    assert not torch.allclose(states, plain, atol=1e-2)


def test_a_loaded_adapter_is_the_saved_one(make_llm, tmp_path):
    model = make_llm(adapter=True)
    model.save_pretrained(tmp_path)
    loaded = dict(LLMRecommender.from_pretrained(tmp_path).named_parameters())
    saved = {name: value for name, value in model.named_parameters() if "lora_" in name}
    assert len(saved) == 16 and all(value.any() for value in saved.values())
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())


@pytest.mark.parametrize("is_trainable", [True, False])
def test_adapters_are_loaded_for_training_on_demand(make_llm, batch, tmp_path, is_trainable):
    make_llm(adapter=True).save_pretrained(tmp_path)
    model = LLMRecommender.from_pretrained(tmp_path, is_trainable=is_trainable)
    assert any("lora_" in name for name in trainable(model)) == is_trainable
    assert {"item_head.weight", "input_projection.weight"} < set(trainable(model))
    model.train()(**batch).loss.backward()


def test_saving_again_what_was_loaded(make_llm, tmp_path):
    make_llm(adapter=True, text=True).save_pretrained(tmp_path / "first")
    model = LLMRecommender.from_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    assert LLMRecommender.from_pretrained(tmp_path / "second").content_hash() == model.content_hash()


@pytest.mark.parametrize("adapter", [True, False])
def test_the_tokenizer_travels_with_the_model(make_llm, tmp_path, adapter):
    model = make_llm(adapter=adapter)
    model.save_pretrained(tmp_path)
    loaded = LLMRecommender.from_pretrained(tmp_path)
    text = "green garden hose"
    assert loaded.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]


def test_without_an_adapter_nothing_but_the_folder_is_needed(tiny_folder, make_llm, batch, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "base")
    model = make_llm(backbone=tmp_path / "base").eval()
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "base")
    loaded = LLMRecommender.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.encode(batch["item_ids"]), model.encode(batch["item_ids"]))


def test_a_base_that_is_gone(tiny_folder, make_llm, batch, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "base")
    model = make_llm(backbone=tmp_path / "base", adapter=True).eval()
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ConfigurationError, match="Cannot load the language model '.*base'"):
        LLMRecommender.from_pretrained(tmp_path / "model")
    for backbone in (tiny_folder, AutoModel.from_pretrained(tiny_folder)):
        loaded = LLMRecommender.from_pretrained(tmp_path / "model", backbone=backbone)
        assert torch.equal(loaded.encode(batch["item_ids"]), model.encode(batch["item_ids"]))


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.bfloat16), ("bfloat16", torch.bfloat16), ("auto", torch.float32)],
)
def test_precision_of_the_loaded_backbone(make_llm, batch, tmp_path, adapter, dtype, expected):
    make_llm(adapter=adapter).save_pretrained(tmp_path)
    loaded = LLMRecommender.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.backbone.dtype == expected
    assert LLMRecommender.from_pretrained(tmp_path, torch_dtype=dtype).backbone.dtype == expected
    assert loaded.item_head.weight.dtype == torch.float32
    assert loaded(**batch).loss.isfinite()


@pytest.mark.parametrize("adapter", [True, False])
def test_how_the_backbone_attends_can_be_chosen(make_llm, tmp_path, adapter):
    make_llm(adapter=adapter).save_pretrained(tmp_path)
    loaded = LLMRecommender.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.backbone.config._attn_implementation == "eager"
    with pytest.raises(TypeError, match="attention"):
        LLMRecommender.from_pretrained(tmp_path, attention="eager")


@pytest.mark.parametrize("adapter", [True, False])
def test_weights_in_shards(make_llm, batch, tmp_path, adapter):
    model = make_llm(adapter=adapter, text=True).eval()
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    loaded, other = LLMRecommender.from_pretrained(tmp_path), make_llm(adapter=adapter, text=True).eval()
    other.load_weights(tmp_path)
    for found in (loaded, other):
        assert torch.equal(found.encode(batch["item_ids"]), model.encode(batch["item_ids"]))
        assert torch.equal(found.item_matrix(), model.item_matrix())


def test_shards_that_a_push_has_left_on_the_hub(make_llm, tmp_path):
    """Uploads delete nothing: an earlier model's stay beside a later one's weights."""
    make_llm(seed=1, adapter=True).save_pretrained(tmp_path / "first", max_shard_size="1KB")
    model = make_llm(adapter=True)
    model.save_pretrained(tmp_path / "second")
    shutil.copytree(tmp_path / "second", tmp_path / "first", dirs_exist_ok=True)
    assert LLMRecommender.from_pretrained(tmp_path / "first").content_hash() == model.content_hash()


@pytest.mark.parametrize("adapter", [True, False])
def test_a_file_that_does_not_fit(make_llm, tmp_path, adapter):
    model = make_llm(adapter=adapter)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors.pop("item_head.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    for load in (LLMRecommender.from_pretrained, model.load_weights):
        with pytest.raises(ConfigurationError, match=r"do not fit this model: missing \['item_head.weight'\]"):
            load(tmp_path)
    save_file(tensors | {"item_head.weight": head, "stray": head.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError, match=r"unexpected \['stray'\]"):
        LLMRecommender.from_pretrained(tmp_path)


def test_another_catalogue(make_llm, tmp_path):
    make_llm(adapter=True).save_pretrained(tmp_path)
    config = LLMRecommenderConfig.from_pretrained(tmp_path)
    config.num_items += 1
    with pytest.raises(ConfigurationError, match=r"(?s)The weights in .* do not fit this model: .*item_head.weight"):
        LLMRecommender.from_pretrained(tmp_path, config=config)


def test_a_whole_model_is_not_loaded_in_fewer_bits(make_llm, tmp_path):
    make_llm().save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="saved with its whole backbone, without an adapter"):
        LLMRecommender.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_content_hash_is_of_what_is_trained(make_llm):
    """Frozen base weights are not saved, and not hashed: for a large base that would take minutes per round."""
    model = make_llm(adapter=True)
    first = model.content_hash()
    with torch.no_grad():
        next(parameter for parameter in model.backbone.parameters() if not parameter.requires_grad).add_(1)
    assert model.content_hash() == first
    whole = make_llm()
    first = whole.content_hash()
    with torch.no_grad():
        whole.token_embedding.weight[3, 3] += 1
    assert whole.content_hash() != first


# --- merging ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_merging_the_adapter(tiny_folder, make_llm, batch, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "base")
    model = make_llm(backbone=tmp_path / "base", adapter=True, text=True).eval()
    expected, matrix = model.encode(batch["item_ids"]), model.item_matrix()
    assert model.merge_and_unload() is model
    assert not model.has_adapter
    assert not any("lora" in name for name in model.state_dict())
    torch.testing.assert_close(model.encode(batch["item_ids"]), expected, rtol=1e-3, atol=1e-4)
    shutil.rmtree(tmp_path / "base")
    model.save_pretrained(tmp_path / "merged")
    loaded = LLMRecommender.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded.encode(batch["item_ids"]), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(loaded.item_matrix(), matrix)


def test_merging_without_an_adapter(make_llm):
    model = make_llm()
    before = model.content_hash()
    assert model.merge_and_unload().content_hash() == before


def test_a_model_merged_into_its_own_folder(make_llm, batch, tmp_path):
    model = make_llm(adapter=True).eval()
    model.save_pretrained(tmp_path)
    model.merge_and_unload().save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    loaded = LLMRecommender.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(batch["item_ids"]), model.encode(batch["item_ids"]))
    # It is trained as a whole again, as what is loaded is.
    assert len(trainable(model)) == len(trainable(loaded)) == len(list(model.parameters()))


def test_one_loaded_backbone_serves_one_recommender(tiny_folder, make_llm, tmp_path):
    """PEFT puts an adapter into it in place: a second one would overwrite the first."""
    make_llm(adapter=True).save_pretrained(tmp_path)
    backbone = AutoModel.from_pretrained(tiny_folder)
    LLMRecommender.from_pretrained(tmp_path, backbone=backbone)
    for second in (
        lambda: LLMRecommender.from_pretrained(tmp_path, backbone=backbone),
        lambda: make_llm(backbone=backbone, adapter=True),
    ):
        with pytest.raises(ConfigurationError, match="without adapter"):
            second()


def test_which_base_it_was_is_remembered(tiny_folder, make_llm, batch, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "bases" / "second")
    model = LLMRecommender.from_backbone(
        str(tmp_path / "bases"), 12, 6, subfolder="second", peft_config=LoraConfig(r=2)
    ).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = LLMRecommender.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.encode(batch["item_ids"]), model.encode(batch["item_ids"]))
    # A revision says nothing of a folder, but it is asked for where the base is on the Hub.
    named = LLMRecommender.from_backbone(tiny_folder, 12, 6, revision="v1")
    assert named.config.backbone_revision == "v1"


def test_a_base_that_is_not_causal(make_llm, tmp_path):
    make_llm(adapter=True).save_pretrained(tmp_path)
    encoder = BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ConfigurationError, match="BertModel is not causal"):
        LLMRecommender.from_pretrained(tmp_path, backbone=encoder)


def test_an_encoder_has_room_for_the_longest_history(make_llm, tmp_path):
    config = BertConfig(
        vocab_size=400,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        is_decoder=True,
        max_position_embeddings=8,
    )
    tokenizer = make_llm().tokenizer
    LLMRecommender.from_backbone(BertModel(config), 12, tokenizer=tokenizer, prompt="{history}", max_length=8)
    with pytest.raises(ConfigurationError, match="has 8 positions, and prompt and longest history take 9"):
        LLMRecommender.from_backbone(BertModel(config), 12, tokenizer=tokenizer, prompt="{history}", max_length=9)


def test_a_folder_of_another_kind(make_crm, tmp_path):
    make_crm().save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="holds no LLM recommender"):
        LLMRecommender.from_pretrained(tmp_path)


def test_a_setting_can_be_changed_at_loading(make_llm, tmp_path):
    make_llm(dropout=0.1).save_pretrained(tmp_path)
    model = LLMRecommender.from_pretrained(tmp_path, dropout=0.4)
    assert model.config.dropout == model.dropout.p == 0.4


def test_a_setting_beside_a_configuration_is_not_dropped(make_llm, tmp_path):
    llm = make_llm(dropout=0.1)
    llm.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="dropout"):
        LLMRecommender.from_pretrained(tmp_path, config=llm.config, dropout=0.4)


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_torn_weights_are_named(make_llm, tmp_path, name):
    llm = make_llm(adapter=True)
    llm.save_pretrained(tmp_path)
    with open(tmp_path / name, "r+b") as file:
        file.truncate(50)
    with pytest.raises(ConfigurationError, match="fit this model"):
        llm.load_weights(tmp_path)
    for _ in range(2):  # and then those that are gone
        with pytest.raises(ConfigurationError, match=re.escape(str(tmp_path))):
            LLMRecommender.from_pretrained(tmp_path)
        (tmp_path / name).unlink(missing_ok=True)
