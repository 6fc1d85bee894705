# SPDX-License-Identifier: Apache-2.0
"""The conventional side needs neither PEFT nor bitsandbytes, not even to import this package."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from llmd4rec_hf import ItemVocabulary


# Two environments: one in which the packages are not there, and one in which they are and cannot be imported.
ABSENT = """
import sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
blocked = ("peft", "bitsandbytes")
PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.split(".")[0] in blocked else find_spec(name, *rest)
)
"""
BROKEN = """
import builtins
import sys

real_import = builtins.__import__

def broken_import(name, *rest, **options):
    if name.split(".")[0] in ("peft", "bitsandbytes"):
        raise ImportError(name)
    return real_import(name, *rest, **options)

builtins.__import__ = broken_import
"""

SCRIPT = """
import torch
from safetensors.torch import save_file
from transformers import AutoModel
from llmd4rec_hf import LLMRecommender, SASRecModel

folder = sys.argv[1]
model = SASRecModel.from_pretrained(f"{folder}/crm")
assert model.recommend([["a", "b"]], k=2).ids[0]
with torch.no_grad():
    scores = {"crm": model.encode(torch.tensor([[1, 2, 3]])) @ model.item_matrix().T}
    merged = LLMRecommender.from_pretrained(f"{folder}/merged")
    scores["llm"] = merged.encode(torch.tensor([[1, 2, 3]])) @ merged.item_matrix().T
save_file(scores, f"{folder}/scores.safetensors")
try:
    LLMRecommender.from_pretrained(f"{folder}/llm")
except ImportError as error:
    assert "peft" in str(error)
else:
    raise AssertionError("an adapter without PEFT")
assert not {"peft", "bitsandbytes", "evaluate", "transformers.trainer"} & set(sys.modules)
"""


@torch.no_grad()
def scores(model) -> torch.Tensor:
    return model.eval().encode(torch.tensor([[1, 2, 3]])) @ model.item_matrix().T


@pytest.mark.parametrize("environment", [ABSENT, BROKEN], ids=["absent", "broken"])
def test_loading_and_recommending(make_model, make_llm, environment, tmp_path):
    crm, llm = make_model("sasrec"), make_llm(adapter=True)
    crm.vocabulary = ItemVocabulary(list("abcdefghijkl"))
    crm.save_pretrained(tmp_path / "crm")
    llm.save_pretrained(tmp_path / "llm")
    llm.merge_and_unload().save_pretrained(tmp_path / "merged")
    command = [sys.executable, "-c", environment + SCRIPT, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found = load_file(tmp_path / "scores.safetensors")
    assert torch.equal(found["crm"], scores(crm))
    assert torch.equal(found["llm"], scores(llm))
