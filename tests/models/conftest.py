# SPDX-License-Identifier: Apache-2.0
"""Tiny models of every kind. Their weights are large, so that whatever can leak from one state into another shows."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

from llmd4rec_hf.models import (
    GRU4RecConfig,
    GRU4RecModel,
    LLMRecommender,
    SASRecConfig,
    SASRecModel,
    build_tiny_llm,
)


TITLES = [
    "red leather boots",
    "blue rubber boots",
    "green wool hat",
    "red wool hat with a very long title that goes on and on",
    "garden hose",
    "garden chair",
    "blue chair",
    "leather sofa",
    "wool blanket",
    "rubber duck",
    "boots",
    "hose for a garden and a chair",
]
PROMPT = "a user chose these items {history} the next item is"
SIZES = SimpleNamespace(num_items=len(TITLES), item_dim=6, max_length=7, width=16)

CRM_KINDS = ["sasrec", "gru4rec"]
LLM_KINDS = [
    f"llm{mode}{adapter}{text}" for mode in ("", "-last") for adapter in ("", "-lora") for text in ("", "-text")
]


def pytest_generate_tests(metafunc):
    """Tests that name `kind`, `crm_kind` or `llm_kind` run once for each."""
    for name, kinds in (("kind", CRM_KINDS + LLM_KINDS), ("crm_kind", CRM_KINDS), ("llm_kind", LLM_KINDS)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, kinds)


@pytest.fixture(scope="session")
def titles():
    return TITLES


@pytest.fixture(scope="session")
def prompt():
    return PROMPT


@pytest.fixture(scope="session")
def sizes():
    return SIZES


@torch.no_grad()
def _enlarge(module, factor):
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.mul_(factor)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved decoder with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_llm")
    torch.manual_seed(0)
    backbone, tokenizer = build_tiny_llm([*TITLES, PROMPT], hidden_size=SIZES.width)
    _enlarge(backbone, 15)
    backbone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def lora():
    return lambda **options: LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], **options
    )


@pytest.fixture(scope="session")
def random_vectors():
    def draw(seed=0, item_dim=SIZES.item_dim):
        return torch.randn(SIZES.num_items + 1, item_dim, generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture(scope="session")
def awaken(random_vectors):
    """What a new LLM recommender has at zero or nearly so gets values, as after some training."""

    def apply(model):
        generator = torch.Generator().manual_seed(3)
        model.set_item_vectors(random_vectors())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or name in ("item_head.weight", "head_text_projection.weight"):
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
                elif name.startswith("input_"):
                    parameter.mul_(3)
        return model

    return apply


@pytest.fixture(scope="session")
def make_llm(tiny_folder, lora, awaken):
    """Makes an LLM recommender in training mode; `awake=False` leaves it as the constructor does."""

    def make(seed=0, *, adapter=False, text=False, awake=True, backbone=None, **options):
        torch.manual_seed(seed)
        options = {"max_length": SIZES.max_length, "prompt": PROMPT, **options}
        model = LLMRecommender.from_backbone(
            backbone if backbone is not None else tiny_folder,
            SIZES.num_items,
            SIZES.item_dim,
            peft_config=lora() if adapter else None,
            item_texts=TITLES if text else None,
            **options,
        )
        return (awaken(model) if awake else model).train()

    return make


@pytest.fixture(scope="session")
def make_model(make_llm):
    """Makes a model of one of the kinds above, in training mode, without dropout."""

    def make(kind, seed=0, **options):
        if kind.startswith("llm"):
            supervision = "last_position" if "-last" in kind else "all_positions"
            return make_llm(seed, adapter="-lora" in kind, text="-text" in kind, supervision=supervision, **options)
        torch.manual_seed(seed)
        options = {"num_items": SIZES.num_items, "max_length": SIZES.max_length, "dropout": 0.0, **options}
        if kind == "gru4rec":
            model = GRU4RecModel(GRU4RecConfig(hidden_size=8, num_layers=2, **options))
        else:
            model = SASRecModel(SASRecConfig(hidden_size=8, num_heads=2, **options))
        _enlarge(model, 2)
        return model.train()

    return make


@pytest.fixture(scope="session")
def still_model(make_model):
    """Like `make_model`, in evaluation mode, and kept: not to be changed by a test."""
    models = {}

    def get(kind):
        if kind not in models:
            models[kind] = make_model(kind).eval()
        return models[kind]

    return get


BATCH = {
    "item_ids": [[3, 1, 4, 1, 5], [9, 2, 0, 0, 0], [12, 0, 0, 0, 0], [6, 5, 3, 8, 0]],
    "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]],
    "labels": [[1, 4, 1, 5, 11], [2, 7, -100, -100, -100], [10, -100, -100, -100, -100], [5, 3, 8, -100, -100]],
}


@pytest.fixture
def batch():
    return {name: torch.tensor(values) for name, values in copy.deepcopy(BATCH).items()}
