# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    AutoPeftModel,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PolyConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModel, LlamaModel

from llmd4rec_hf import LLMRecommender, MutualDistillArguments, MutualDistillTrainer
from llmd4rec_hf.errors import ConfigurationError
from llmd4rec_hf.models.dropout import Dropout


KINDS = {
    "lora": LoraConfig(r=2),
    "dora": LoraConfig(r=2, use_dora=True),
    "rslora": LoraConfig(r=2, use_rslora=True),
    "loha": LoHaConfig(r=2),
    "vera": VeraConfig(r=2),
    "ia3": IA3Config(),
    "lora for a model with a head": LoraConfig(r=2, task_type="CAUSAL_LM"),
    "lora of the embedding": LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
}


def trained(model, batch):
    """Some steps, so that the adapter is no longer without effect."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("adapter_kind", KINDS)
def test_any_adapter(tiny_folder, random_vectors, batch, tmp_path, adapter_kind):
    def make():
        torch.manual_seed(0)
        options = {"peft_config": KINDS[adapter_kind], "prompt": "a user {history}"}
        return LLMRecommender.from_backbone(tiny_folder, 12, 6, **options).eval()

    model, plain = make(), make()
    model.set_item_vectors(random_vectors())
    plain.set_item_vectors(random_vectors())
    trained(model, batch)
    model.save_pretrained(tmp_path)
    # Into a model of the same kind, in place, as trainers resume.
    other = make()
    other.load_weights(tmp_path)
    # By PEFT alone, on the bare backbone.
    bare = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_folder), tmp_path).eval()
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        hidden = model.encode(batch["item_ids"])
        assert not torch.allclose(hidden, plain.encode(batch["item_ids"]), atol=1e-3)
        assert torch.equal(LLMRecommender.from_pretrained(tmp_path).encode(batch["item_ids"]), hidden)
        assert torch.equal(other.encode(batch["item_ids"]), hidden)
        assert torch.equal(bare(tokens).last_hidden_state, model.backbone(tokens).last_hidden_state)


def test_the_adapter_names_the_class_that_it_is_for(make_llm, tmp_path):
    make_llm(adapter=True).save_pretrained(tmp_path)
    assert isinstance(AutoPeftModel.from_pretrained(tmp_path).get_base_model(), LlamaModel)


def test_one_adapter_is_saved(make_llm, tmp_path):
    """A second one would be left out without a word."""
    model = make_llm(adapter=True)
    model.backbone.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigurationError, match=r"the adapters \['default', 'second'\], and one is saved"):
        model.save_pretrained(tmp_path)
    model.backbone.delete_adapter("second")
    model.save_pretrained(tmp_path)


def test_lora_gets_all_linear_layers(tiny_folder):
    given = LoraConfig(r=2)
    model = LLMRecommender.from_backbone(tiny_folder, 12, peft_config=given)
    adapted = {name.split(".")[-4] for name, p in model.backbone.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert given.target_modules is None, "the user's own is left as it is"
    given = LoraConfig(r=2, target_modules="all-linear")
    LLMRecommender.from_backbone(tiny_folder, 12, peft_config=given)
    assert given.target_modules == "all-linear"


def test_dropouts_of_an_adapter_draw_cheap_masks(tiny_folder, tmp_path):
    built = LLMRecommender.from_backbone(tiny_folder, 12, peft_config=LoraConfig(r=2, lora_dropout=0.1))
    built.save_pretrained(tmp_path)
    for model in (built, LLMRecommender.from_pretrained(tmp_path, is_trainable=True)):
        kinds = {type(part) for name, part in model.named_modules() if name.endswith("lora_dropout.default")}
        assert kinds == {Dropout}


def test_refused_adapters(tiny_folder):
    with pytest.raises(ConfigurationError, match=r"peft_config must be .* LoraConfig\(\), got dict"):
        LLMRecommender.from_backbone(tiny_folder, 12, peft_config={"r": 2})
    with pytest.raises(ConfigurationError, match="PromptTuningConfig adds virtual tokens"):
        LLMRecommender.from_backbone(tiny_folder, 12, peft_config=PromptTuningConfig(num_virtual_tokens=2))
    for given in (
        LoraConfig(target_modules=["nothing"]),
        PolyConfig(target_modules=["q_proj"]),  # asks for a task per row
    ):
        with pytest.raises(ConfigurationError, match="PEFT cannot adapt LlamaModel"):
            LLMRecommender.from_backbone(tiny_folder, 12, peft_config=given)


def test_an_adapter_that_could_not_be_loaded_again(tiny_folder, make_llm):
    """One that changes the base by numbers that it draws, and those that leave head and projections out."""
    given = LoraConfig(init_lora_weights="pissa_niter_2", target_modules=["q_proj"])
    with pytest.raises(ConfigurationError, match="'pissa_niter_2' changes the base weights at random.*give 'pissa'"):
        LLMRecommender.from_backbone(tiny_folder, 12, peft_config=given)
    llm = make_llm()
    with pytest.raises(ConfigurationError, match=r"from_backbone\(peft_config"):
        llm.add_adapter(LoraConfig(r=2))
    args = MutualDistillArguments("unused", use_cpu=True)
    with pytest.raises(ConfigurationError, match="got PeftModel: give its adapter to LLMRecommender.from_backbone"):
        MutualDistillTrainer(get_peft_model(llm, LoraConfig(r=2, target_modules=["q_proj"])), args)


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (AdaptionPromptConfig(adapter_len=2, adapter_layers=1), "the kind ADAPTION_PROMPT is no part of a layer"),
        (LoraConfig(r=2, layer_replication=[[0, 2], [0, 2]]), "several layers share their weights"),
        (LoraConfig(r=2, lora_bias=True), "lora_bias asks for layers that have a bias"),
    ],
)
def test_an_adapter_that_cannot_be_merged_stays_whole(tiny_folder, batch, given, reason):
    model = trained(LLMRecommender.from_backbone(tiny_folder, 12, peft_config=given), batch)
    before, hidden = model.content_hash(), model.encode(batch["item_ids"])
    with pytest.raises(ConfigurationError, match=f"cannot be merged: .*{reason}.* saved with the model"):
        model.merge_and_unload()
    assert model.content_hash() == before
    assert torch.equal(model.encode(batch["item_ids"]), hidden)


def test_an_adapter_on_another_base(make_llm, tmp_path):
    make_llm(adapter=True).save_pretrained(tmp_path)
    config = AutoModel.from_pretrained(
        json.loads((tmp_path / "config.json").read_text())["backbone_name_or_path"]
    ).config
    config.hidden_size *= 2
    with pytest.raises(ConfigurationError, match="does not fit"):
        LLMRecommender.from_pretrained(tmp_path, backbone=AutoModel.from_config(config))


def test_bf16_base_under_heads_and_adapter_in_full_precision(make_llm, batch):
    model = make_llm(adapter=True, dtype=torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    full = {dtype for name, dtype in kinds.items() if "lora_" in name or not name.startswith("backbone.")}
    assert full == {torch.float32}
    assert {dtype for name, dtype in kinds.items() if "base_layer" in name} == {torch.bfloat16}
    model(**batch).loss.backward()
    assert model.item_head.weight.grad.isfinite().all()


FIRST_FORMAT = {
    "model_type", "architectures", "num_items", "item_dim", "max_length", "supervision", "prefix_ids", "suffix_ids",
    "item_text", "dropout", "backbone_name_or_path", "backbone_config",
}  # fmt: skip


@pytest.mark.parametrize("adapter", [True, False])
def test_files_of_the_first_release(make_llm, batch, tmp_path, adapter):
    """They say nothing of their version, nor whatever was added since."""
    model = make_llm(adapter=adapter, text=True).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format_version"] == 1
    (tmp_path / "config.json").write_text(json.dumps({name: config[name] for name in FIRST_FORMAT}))
    loaded = LLMRecommender.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(batch["item_ids"]), model.encode(batch["item_ids"]))
    assert torch.equal(loaded.item_matrix(), model.item_matrix())
