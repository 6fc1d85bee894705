# SPDX-License-Identifier: Apache-2.0
"""The conventional side needs neither PEFT nor bitsandbytes, not even to import this package."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from peft import LoraConfig
from safetensors.torch import load_file

from llmd4rec_hf import ItemVocabulary


# Neither can be imported, nor does anything that looks for them find them.
BLOCKED = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("peft", "bitsandbytes"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""

SCRIPT = (
    BLOCKED
    + """
import torch
from safetensors.torch import save_file
from transformers import AutoModel
from llmd4rec_hf import LLMRecommender, SASRecModel

folder = sys.argv[1]
model = SASRecModel.from_pretrained(f"{folder}/crm")
assert model.recommend([["a", "b"]], k=2).ids[0]
assert AutoModel.from_pretrained(f"{folder}/crm").content_hash() == model.content_hash()
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
assert not {"peft", "bitsandbytes"} & set(sys.modules)
"""
)


@torch.no_grad()
def scores(model) -> torch.Tensor:
    return model.eval().encode(torch.tensor([[1, 2, 3]])) @ model.item_matrix().T


def test_loading_and_recommending(make_model, make_llm, tiny_folder, tmp_path):
    crm, llm = make_model("sasrec"), make_llm(adapter=True)
    crm.vocabulary = ItemVocabulary(list("abcdefghijkl"))
    crm.save_pretrained(tmp_path / "crm")
    llm.save_pretrained(tmp_path / "llm")
    llm.merge_and_unload().save_pretrained(tmp_path / "merged")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    found = load_file(tmp_path / "scores.safetensors")
    assert torch.equal(found["crm"], scores(crm))
    assert torch.equal(found["llm"], scores(llm))
    assert LoraConfig  # here PEFT is installed
