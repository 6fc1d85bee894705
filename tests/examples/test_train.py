# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmd4rec_hf import RecommenderModel
from llmd4rec_hf.data import prepare
from llmd4rec_hf.errors import ConfigurationError
from llmd4rec_hf.evaluation.results import FLOOR_KEY


REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "train.py"
QUICK = ["--rounds", "1", "--crm_num_train_epochs", "1", "--llm_num_train_epochs", "1", "--use_cpu"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def log_file(small_log, tmp_path) -> Path:
    path = tmp_path / "interactions.csv"
    small_log.to_csv(path, index=False)
    return path


@pytest.fixture
def items_file(vocabulary, tmp_path) -> Path:
    path = tmp_path / "items.csv"
    lines = [f"{name},{text}" for name, text in zip(vocabulary.item_ids, vocabulary.texts, strict=True)]
    path.write_text("\n".join(["item_id,title", *lines]))
    return path


def test_a_log_and_a_catalogue_give_two_models_and_a_report(script, log_file, items_file, tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["--dataset", str(log_file), "--items", str(items_file), "--item_text", "--output_dir", str(folder)]
    script.main([*words, *QUICK, "--hidden_size", "16"])
    results = json.loads((folder / "results.json").read_text())
    assert results["dataset"]["users"] == 40
    assert results["dataset"]["name"] == "interactions.csv"
    # A rule that learns nothing, for the report's cautions.
    assert 0 <= results["dataset"][FLOOR_KEY] <= 1
    assert {path.name for path in folder.iterdir()} >= {"crm", "llm", "report.md", "report.png", "results.json"}
    assert "CRM, distilled" in capsys.readouterr().out
    assert json.loads((folder / "crm" / "config.json").read_text())["hidden_size"] == 16


@pytest.mark.parametrize("config", sorted(path.name for path in (REPOSITORY / "examples" / "configs").glob("*.yaml")))
def test_every_configuration_trains(config, script, log_file, items_file, tmp_path, unrendered):
    words = ["--config", str(REPOSITORY / "examples" / "configs" / config), "--output_dir", str(tmp_path / "run")]
    words += ["--dataset", str(log_file), "--items", str(items_file), *QUICK, "--hidden_size", "16", "--no-controls"]
    script.main(words)
    final = json.loads((tmp_path / "run" / "results.json").read_text())["final"]
    assert {side: 0 <= final[side]["test"]["ndcg@10"] <= 1 for side in ("crm", "llm")} == {"crm": True, "llm": True}


def test_a_crm_that_begins_with_titles_and_learns_from_both(script, log_file, items_file, tmp_path, unrendered):
    words = ["--dataset", str(log_file), "--items", str(items_file), "--item_text", "--title_vectors", *QUICK]
    words += ["--crm_teachers", "both", "--hidden_size", "16", "--no-controls", "--output_dir", str(tmp_path / "run")]
    script.main(words)
    phases = tmp_path / "run" / "phases"
    crm, llm = (RecommenderModel.from_pretrained(phases / name) for name in ("initial-crm", "initial-llm"))
    torch.testing.assert_close(crm.item_matrix(), llm.title_vectors())
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["identity"]["config.crm_teachers"] == "both"


def test_launched_and_started_again_the_second_run_finds_everything_done(script, tmp_path, log_file, capsys, caplog):
    """The README's command, as a user gives it."""
    folder = tmp_path / "run"
    words = ["--dataset", str(log_file), "--output_dir", str(folder), *QUICK]
    command = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        "--num_processes",
        "1",
        str(SCRIPT),
        *words,
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert "finished run" not in result.stdout + result.stderr
    written = (folder / "results.json").read_bytes()
    script.main(words)
    printed = capsys.readouterr()
    assert "finished run" in printed.out + printed.err + caplog.text
    assert (folder / "results.json").read_bytes() == written


def bad_inputs(tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "columns.csv").write_text("user_id,rating\n1,5\n")
    (tmp_path / "short.csv").write_text("user_id,item_id,timestamp\n1,2,3\n1,3,4\n2,2,5\n")
    (tmp_path / "good.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"1,{i},{i}\n" for i in range(9)))
    (tmp_path / "bad.yaml").write_text("- 1\n- 2\n")
    (tmp_path / "on.yaml").write_text("on: 1\n")
    (tmp_path / "latin.yaml").write_bytes("prompt: café {history}\n".encode("latin-1"))
    (tmp_path / "bert").mkdir(exist_ok=True)
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    good = ["--dataset", str(tmp_path / "good.csv")]
    prepare(tmp_path / "good.csv", output_dir=tmp_path / "prepared", with_floors=False)
    return {
        "wrong path": (["--dataset", str(tmp_path / "nowhere.csv")], "nowhere.csv"),
        "empty file": (["--dataset", str(tmp_path / "empty.csv")], "empty"),
        "missing column": (["--dataset", str(tmp_path / "columns.csv")], "item_id"),
        "no user with three items": (["--dataset", str(tmp_path / "short.csv")], "3"),
        "options of prepared data": (
            ["--dataset", str(tmp_path / "prepared"), "--k_core", "3"],
            "so --k_core would have no effect: leave them out",
        ),
        "unknown LLM": ([*good, "--llm", str(tmp_path / "no-model")], "no-model"),
        "unknown CRM": ([*good, "--crm", str(tmp_path / "no-model")], "no-model"),
        "a CRM that is none": ([*good, "--crm", str(tmp_path / "bert")], "'bert', which is no recommender"),
        "item text without titles": ([*good, "--item_text"], "--items"),
        "bad temperature": ([*good, "--llm_temperature", "0"], "temperature must be positive"),
        "prompt without history": ([*good, "--prompt", "hello"], "{history}"),
        "bad configuration": (["--config", str(tmp_path / "bad.yaml")], "bad.yaml"),
        "an option that YAML takes for true": (["--config", str(tmp_path / "on.yaml")], "on.yaml must hold"),
        "configuration in another encoding": (["--config", str(tmp_path / "latin.yaml")], "latin.yaml: 'utf-8' codec"),
        "no width": ([*good, "--hidden_size", "0"], "hidden_size must be at least 1, got 0"),
        "too much dropout": ([*good, "--dropout", "2"], "dropout must be in [0, 1), got 2.0"),
        "too much dropout of the LLM": ([*good, "--llm_dropout", "1"], "dropout must be in [0, 1), got 1.0"),
        "learning away from it": ([*good, "--llm_learning_rate", "-1"], "llm_args: learning_rate must be at least 0"),
        "empty batches": (
            [*good, "--llm_per_device_train_batch_size", "0"],
            "llm_args: per_device_train_batch_size must be at least 1",
        ),
        "a metric that is not measured": (
            [*good, "--crm_metric_for_best_model", "hr10"],
            "crm_args: metric_for_best_model must be one of loss, hr@5",
        ),
        "an integration that is not there": ([*good, "--llm_report_to", "paper"], "paper is not supported"),
        "half precision that is not there": ([*good, "--crm_fp16", "yes", "--crm_bf16", "yes"], "The CRM's training"),
        "heads that do not divide": ([*good, "--rounds", "0"], "rounds must be at least 1"),
    }


@pytest.mark.parametrize("case", sorted(bad_inputs(Path(os.environ["HF_HOME"]))))
def test_bad_input_is_one_clear_line_and_leaves_nothing(script, case, tmp_path, capsys):
    words, message = bad_inputs(tmp_path)[case]
    folder = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        script.main([*words, "--output_dir", str(folder), "--use_cpu"])
    assert stop.value.code == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error:")
    assert message in error
    assert len(error.splitlines()) == 1
    assert not folder.exists()


def test_options_that_a_folder_was_prepared_with_may_be_given_again(script, tmp_path):
    rows = "".join(f"{user},{item},{item}\n" for user in range(4) for item in range(9))
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + rows)
    prepare(tmp_path / "log.csv", output_dir=tmp_path / "data", with_floors=False, k_user=3, k_item=3)
    words = ["--dataset", str(tmp_path / "data"), "--output_dir", "x", "--use_cpu", "--k_core"]
    assert len(script.load_data(script.parse([*words, "3"])[0]).vocabulary) == 9
    with pytest.raises(ConfigurationError, match="--k_core would have no effect"):
        script.load_data(script.parse([*words, "2"])[0])


def test_an_llm_recommender_is_no_base_model(script, make_llm, log_file, tmp_path, capsys):
    make_llm().save_pretrained(tmp_path / "llm")
    with pytest.raises(SystemExit):
        script.main(["--dataset", str(log_file), "--llm", str(tmp_path / "llm"), "--output_dir", "not-written"])
    assert "is an LLM recommender already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--crm_epochs", "3"], "unknown training argument --crm_epochs"),
        (["--epochs", "3"], "unknown option --epochs"),
        (["--rounds", "2", "3"], "'3' belongs to no option"),
        (["items.csv", "--dataset", "log.csv"], "'items.csv' belongs to no option"),
        (["--crm_learning_rate", "1e-3", "items.csv", "--dataset", "log.csv"], "'items.csv' belongs to no option"),
        (["--seed", "-1"], "argument --seed"),
        (["--push_to_hub"], "--hub_model_id"),
        (["--no-item_text", "--title_vectors"], "--title_vectors needs --item_text"),
        (["--format", "pickle"], "invalid choice"),
        (["--llm_weighting", "best"], "invalid choice"),
    ],
)
def test_wrong_options_are_named(script, words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--output_dir", str(tmp_path / "run"), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_line_wins_over_the_file_and_numbers_are_numbers(script, tmp_path):
    config = tmp_path / "run.yaml"
    # YAML takes 1e-4 for a string.
    config.write_text("rounds: 5\ncrm_learning_rate: 1e-4\nllm_bf16: false\ncontrols: false\nitem_text: true\n")
    words = ["--config", str(config), "--output_dir", "x", "--rounds", "2", "--llm_kl_weight", "3", "--use_cpu"]
    options, crm_args, llm_args = script.parse(words)
    assert (options.rounds, options.controls, options.item_text) == (2, False, True)
    assert crm_args.learning_rate == 1e-4
    assert llm_args.kl_weight == 3.0
    assert not llm_args.bf16
    assert crm_args.use_cpu


def test_a_file_may_hold_lists_mappings_and_the_output_folder(script, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "output_dir: x\ncolumns: [user_id=u, item_id=i]\ncrm_lr_scheduler_type: cosine_with_restarts\n"
        "crm_lr_scheduler_kwargs: {num_cycles: 2}\nllm_report_to: [none]\n"
    )
    options, crm_args, llm_args = script.parse(["--config", str(config)])
    assert options.output_dir == "x"
    assert dict(options.columns) == {"user_id": "u", "item_id": "i"}
    assert crm_args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert llm_args.report_to == []


def test_the_demo_has_its_own_settings(script):
    options, crm_args, _ = script.parse(["--output_dir", "x"])
    assert options.dataset == "demo"
    assert options.item_text
    assert crm_args.early_stopping_patience is not None


def test_a_real_language_model_learns_with_lora_on_real_data(script, shared, tmp_path, unrendered):
    folder = tmp_path / "run"
    words = ["--dataset", str(shared / "data" / "amazon18_giftcards"), "--llm", str(shared / "models" / "stories260k")]
    script.main([*words, "--item_text", "--output_dir", str(folder), *QUICK])
    results = json.loads((folder / "results.json").read_text())
    assert (results["dataset"]["users"], results["dataset"]["items"]) == (458, 148)
    # Six items of a hundred and forty-eight by chance.
    assert results["final"]["llm"]["test"]["hr@10"] > 10 / 148
    assert (folder / "llm" / "adapter_model.safetensors").is_file()
