# SPDX-License-Identifier: Apache-2.0
"""Real pushes to a Hub on 127.0.0.1, and loading from it in a process that has nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import TOKEN, HubServer
from safetensors.torch import load
from transformers import set_seed

from llmd4rec_hf.models import build_tiny_llm


PROCESS = Path(__file__).with_name("hub_process.py")
REPOSITORY = PROCESS.parents[2]


def run(action: str, folder: Path, server: HubServer) -> subprocess.CompletedProcess:
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in offline}
    environment |= {
        "HF_ENDPOINT": server.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / f"hf_home_{action}"),
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, str(PROCESS), action, str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, cwd=folder)
    assert result.returncode == 0, result.stderr[-4000:]
    return result


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server after all pushes, what the pushing process wrote down, and what the loading one found."""
    folder = tmp_path_factory.mktemp("hub")
    set_seed(0)
    backbone, tokenizer = build_tiny_llm([f"title of thing {n}" for n in range(12)], hidden_size=32, num_layers=2)
    backbone.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    with HubServer() as server:
        server.add_folder("user/base", folder / "base")
        run("push", folder, server)
        firsts = {name: server.repositories[name][0].oid for name in ("user/crm", "user/llm")}
        (folder / "revisions.json").write_text(json.dumps(firsts))
        for name in ("crm", "llm", "run-crm", "run-llm"):
            (folder / f"{name}.md").write_bytes(server.find(f"user/{name}", "main").files["README.md"])
        # The same model, whose configuration names a base that is not there.
        files = dict(server.find("user/llm", "main").files)
        files["config.json"] = files["config.json"].replace(b'"user/base"', b'"user/gone"')
        server.commit("user/moved", "add", files)
        output = run("load", folder, server).stdout
        yield (
            server,
            json.loads((folder / "pushed.json").read_text()),
            json.loads((folder / "found.json").read_text()),
            output,
        )


def difference(left: list, right: list) -> float:
    return (torch.tensor(left) - torch.tensor(right)).abs().max().item()


def test_a_fresh_process_scores_the_same(hub):
    _, pushed, found, _ = hub
    for name in ("llm", "llm-saved", "llm-local", "given"):
        assert difference(found[name], pushed["llm"]) == 0.0
    for name in ("crm-end", "run-crm", "run-llm"):
        assert difference(found[name], pushed[name]) == 0.0
    assert difference(found["crm"], found["crm-by-hand"]) == 0.0
    assert difference(found["crm"], found["crm-auto"]) == 0.0
    assert len(found["recommended"][0]) == 3


def test_pushes_on_the_way_are_whole_models(hub):
    server, _, found, _ = hub
    for name in ("crm", "llm"):
        commits = server.repositories[f"user/{name}"]
        assert [commit.message for commit in commits][:2] == [
            "Training in progress, epoch 1",
            "Training in progress, epoch 2",
        ]
        assert commits[-1].message == "End of training"
        assert set(commits[0].files) >= {"README.md", "config.json", "model.safetensors", "vocabulary.json"}
    assert "tokenizer.json" in server.repositories["user/llm"][0].files
    for name in ("crm", "llm"):
        assert difference(found[f"{name}-first"], found[name]) > 0


def test_no_base_weights_no_optimizer_no_teacher_cache(hub):
    server, *_ = hub
    expected = {"README.md", "config.json", "model.safetensors", "vocabulary.json", "training_args.bin"}
    llm = expected | {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for name, files in {"crm": expected, "end": expected, "llm": llm}.items():
        assert set(server.find(f"user/{name}", "main").files) - {".gitattributes"} == files
    assert set(server.find("user/by-hand", "main").files) == expected - {"training_args.bin"}
    assert set(server.find("user/saved", "main").files) == llm - {"training_args.bin"}
    files = server.find("user/llm", "main").files
    assert not any(name.startswith("backbone.") for name in load(files["model.safetensors"]))
    assert all(".lora_" in name for name in load(files["adapter_model.safetensors"]))
    assert len(files["adapter_model.safetensors"]) + len(files["model.safetensors"]) < 80_000
    # Only whoever asks for it gets the optimizer as well, beside the model.
    whole = server.find("user/whole", "main").files
    assert {path for path in whole if "optimizer" in path} == {"last-checkpoint/optimizer.pt"}


def test_cards(hub):
    server, _, _, output = hub
    for name in ("crm", "llm"):
        card = server.find(f"user/{name}", "main").files["README.md"].decode()
        header, text = card.split("---\n")[1:3]
        header = yaml.safe_load(header)
        assert header["library_name"] == "llmd4rec_hf"
        assert "| ndcg@10 |" in text
        assert "all 12 items, seen items masked" in text
        assert "2505.18120" in text
        # The example ran in the loading process.
        assert f'from_pretrained("user/{name}")' in text
        if name == "llm":
            assert header["base_model"] == "user/base"
            assert "LORA, rank 2" in text
            assert "another recommender's scores" in text
        else:
            assert header["license"] == "mit"
            assert "demo" in header["tags"]
            results = header["model-index"][0]["results"][0]
            assert results["dataset"]["name"] == "walk"
            assert "ndcg@10" in {metric["type"] for metric in results["metrics"]}
    assert output.count("history") == 4 and output.count("item-") == 20


def test_cards_of_a_run(hub):
    server, *_ = hub
    for side in ("crm", "llm"):
        files = server.find(f"user/run-{side}", "main").files
        header, text = files["README.md"].decode().split("---\n")[1:3]
        header = yaml.safe_load(header)
        assert header["license"] == "apache-2.0"
        assert header["model-index"][0]["results"][0]["dataset"]["name"] == "walk"
        assert "|  | test | validation | test, without distillation |" in text
        assert "leave-one-out split, ranked against all 12 items, seen items masked, ties pessimistic" in text
        assert "taught each other" in text
        assert "vocabulary.json" in files and "training_args.bin" not in files
    assert header["base_model"] == "user/base"


def test_where_files_come_from(hub):
    server, _, found, _ = hub
    assert "user/llm" in found["wrong token"]
    assert "user/gone" in found["moved"]
    assert "`backbone=`" in found["moved"]
    assert found["auto-class"] == "LlamaModel"
    assert server.unknown == []
