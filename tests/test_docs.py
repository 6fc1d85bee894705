# SPDX-License-Identifier: Apache-2.0
"""Every code block of README and docs runs, or says why not; the site builds; every public name is described."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
import shlex
import shutil
import sys
import types
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from transformers import set_seed

from llmd4rec_hf import (
    CRMArguments,
    ItemVocabulary,
    LLMRecommender,
    MutualDistillArguments,
    MutualDistillation,
    MutualDistillationConfig,
    SASRecConfig,
    SASRecModel,
    load_interactions,
    split_leave_one_out,
)
from llmd4rec_hf.data import load_items, make_demo
from llmd4rec_hf.data.formats import FORMATS
from llmd4rec_hf.models import build_tiny_llm
from llmd4rec_hf.training.arguments import DistillationArguments


REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S
)
EXAMPLES = {path.stem for path in (REPOSITORY / "examples").glob("*.py")}


# --- the blocks ------------------------------------------------------------------------------------------------------


def blocks(page: str, language: str) -> list[str]:
    """The code of a page that is to be run."""
    found = BLOCK.finditer((REPOSITORY / page).read_text(encoding="utf-8"))
    return [match["code"] for match in found if match["language"] == language and not match["reason"]]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Where a reader of the docs might stand: a log, a catalogue, a language model, and the demo's run, all tiny."""
    folder = tmp_path_factory.mktemp("docs")
    log, items = make_demo(num_users=60, num_items=40)
    log.to_csv(folder / "interactions.csv")
    items.select_columns(["item_id", "title"]).to_csv(folder / "items.csv")
    interactions = load_interactions(log)
    vocabulary = ItemVocabulary.from_interactions(interactions, load_items(items))
    set_seed(0)
    backbone, tokenizer = build_tiny_llm(vocabulary.texts, hidden_size=16, num_layers=1)
    for part in (backbone, tokenizer):
        part.save_pretrained(folder / "Qwen" / "Qwen2.5-0.5B")
    crm = SASRecModel(SASRecConfig(num_items=len(vocabulary), hidden_size=8, num_layers=1))
    llm = LLMRecommender.from_backbone(backbone, len(vocabulary), 8, tokenizer=tokenizer)
    config = MutualDistillationConfig(str(folder / "runs" / "demo"), rounds=1, controls=False, dataset_name="demo")
    quick = {"num_train_epochs": 1, "report_to": "none", "disable_tqdm": True}
    MutualDistillation(
        llm,
        crm,
        split_leave_one_out(interactions, vocabulary),
        vocabulary,
        config,
        MutualDistillArguments(str(folder / "llm"), **quick),
        CRMArguments(str(folder / "crm"), **quick),
    ).run()
    return folder


@pytest.fixture
def reader(world, monkeypatch, tmp_path):
    """Stands in a copy of that world, where trainings end after an epoch and runs after a round."""
    arguments_post_init, config_post_init = DistillationArguments.__post_init__, MutualDistillationConfig.__post_init__

    def one_epoch(self):
        arguments_post_init(self)
        self.num_train_epochs, self.disable_tqdm = 1.0, True

    def one_round(self):
        config_post_init(self)
        self.rounds, self.controls = 1, False

    monkeypatch.setattr(DistillationArguments, "__post_init__", one_epoch)
    monkeypatch.setattr(MutualDistillationConfig, "__post_init__", one_round)
    # Pages that add to it leave it as it was.
    monkeypatch.setattr("llmd4rec_hf.data.formats.FORMATS", list(FORMATS))
    shutil.copytree(world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_runs_from_top_to_bottom(reader, monkeypatch, page):
    pytest.importorskip("onnxruntime")
    module = types.ModuleType(f"page_{Path(page).stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look up their annotations
    for number, code in enumerate(blocks(page, "python"), start=1):
        exec(compile(code, f"{page}, Python block {number}", "exec"), vars(module))
    plt.close("all")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_the_commands_of_a_page_run(reader, page):
    for code in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            run_command(shlex.split(line, comments=True), page)


def run_command(words: list[str], page: str) -> None:
    """
    `python examples/NAME.py ...` in this process. Of `make TARGET` only that there is one, and of a training under
    `accelerate launch` only that its options are right: tests/examples/test_train.py runs one.
    """
    if not words:
        return
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (REPOSITORY / "Makefile").read_text(), re.M), f"{page}: {words}"
        return
    script = next((word for word in words if word.startswith("examples/") and word.endswith(".py")), None)
    assert script and words[0] in ("python", "accelerate"), f"{page}: nobody knows how to run {words}"
    spec = importlib.util.spec_from_file_location("command", REPOSITORY / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = words[words.index(script) + 1 :]
    module.main(options) if words[0] == "python" else module.parse(options)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_still_fits(page):
    """Options and names that have been renamed are found even where nothing is run."""
    for match in BLOCK.finditer((REPOSITORY / page).read_text(encoding="utf-8")):
        if match["language"] == "python":
            compile(match["code"], page, "exec")
            for module, names in re.findall(r"^from (llmd4rec_hf[\w.]*) import (\w+(?:, \w+)*)$", match["code"], re.M):
                assert all(hasattr(importlib.import_module(module), name) for name in names.split(", "))
        for name in re.findall(r"examples/(\w+)\.py", match["code"]):
            assert name in EXAMPLES, f"{page} names examples/{name}.py"
        for script, options in re.findall(r"examples/(\w+)\.py((?:[^\n]*\\\n)*[^\n]*)", match["code"]):
            source = (REPOSITORY / "examples" / f"{script}.py").read_text()
            for option in re.findall(r"--(\w+)", options):
                known = f'"--{option}"' in source or (script == "train" and option.startswith(("crm_", "llm_")))
                assert known, f"{page} gives {script}.py the option --{option}"


def test_the_cells_of_the_notebook_run(reader, monkeypatch):
    shown = []
    display = types.ModuleType("IPython.display")
    display.display, display.Image, display.Markdown = shown.append, lambda path: Path(path).stat().st_size, str
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr("llmd4rec_hf.data.make_demo", lambda **sizes: make_demo(num_users=60, num_items=40))
    cells = json.loads((REPOSITORY / "examples" / "demo.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"demo.ipynb, cell {number}", "exec"), names)
    assert shown[0] > 10_000 and "CRM, distilled" in shown[1]
    plt.close("all")


# --- the site --------------------------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning(tmp_path, monkeypatch, caplog):
    mkdocs = pytest.importorskip("mkdocs.config")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    with caplog.at_level("WARNING", logger="mkdocs"):
        site = mkdocs.load_config(str(REPOSITORY / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site"))
        importlib.import_module("mkdocs.commands.build").build(site)
    assert not caplog.records
    page = (tmp_path / "site" / "reference" / "distillation" / "index.html").read_text()
    assert "<math" in page and 'id="llmd4rec_hf.distillation_loss"' in page
    # Everything that a page loads lies in the site.
    for path in (tmp_path / "site").rglob("index.html"):
        assert not re.search(r'(src|href)="https?://[^"]+\.(js|css|woff2?)', path.read_text())


# --- docstrings ------------------------------------------------------------------------------------------------------

MODULES = ("", ".data", ".distillation", ".evaluation", ".models", ".training", ".export", ".hub")


def public_objects() -> dict[str, object]:
    """Everything that a module offers, and the public methods of its classes."""
    found = {}
    for suffix in MODULES:
        module = importlib.import_module("llmd4rec_hf" + suffix)
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", [name for name in own if not name.startswith("_")]):
            value = getattr(module, name)
            found[f"{value.__module__}.{value.__qualname__}"] = value
            if inspect.isclass(value):
                for method, function in vars(value).items():
                    function = getattr(function, "__func__", getattr(function, "fget", function))
                    if not method.startswith("_") and inspect.isfunction(function):
                        found[f"{value.__module__}.{value.__qualname__}.{method}"] = getattr(value, method)
    return found


PUBLIC = public_objects()


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_described(name):
    value = PUBLIC[name]
    doc = inspect.getdoc(value) or ""
    assert len(doc.split()) >= 3, "no docstring"
    if "Args:" not in doc or isinstance(value, property):
        return
    for parameter in inspect.signature(value).parameters.values():
        if parameter.name in ("self", "cls", "args", "kwargs"):
            continue
        assert re.search(rf"\b{parameter.name}\b", doc), f"{parameter.name} is not described"


@pytest.mark.parametrize("name", sorted(name for name, value in PUBLIC.items() if inspect.isfunction(value)))
def test_functions_say_what_they_take_raise_and_of_which_shape(name):
    function = PUBLIC[name]
    doc, source = inspect.getdoc(function), inspect.getsource(function)
    required = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
    is_module_level = "." not in function.__qualname__
    if is_module_level and len(required) > 1:
        assert "Args:" in doc or "arguments of" in doc, "arguments are not described"
    if is_module_level and "raise " in source:
        assert "Raises:" in doc or "errors" in doc, "errors are not described"
    tensors = [p.name for p in required if str(p.annotation).startswith("torch.") and "Tensor" in p.annotation]
    for tensor in tensors if "Args:" in doc else ():
        described = doc.split("Args:")[1]
        assert re.search(rf"\b{tensor} \([^\n]*(shape|int)", described), f"{tensor} has no shape"


UNITS = {
    **dict.fromkeys(("kl", "cross_entropy"), "nats"),
    **dict.fromkeys(("log_probs", "student_log_probs", "teacher_log_probs"), "nats"),
    "max_length": "items|histor",
    "batch_size": "rows|histories",
    "agreement": r"\[0,\s+1\]",
    "weight_mean": r"\[0,\s+2\]",
}


def test_quantities_are_described_with_their_units():
    missing, found = [], set()
    for name, value in PUBLIC.items():
        # An entry ends where the next one begins.
        for entry in re.finditer(r"^ *(\w+) \(.*\):.*(?:\n(?! *\w+ \(`).*)*", inspect.getdoc(value) or "", re.M):
            found.add(entry[1])
            if entry[1] in UNITS and not re.search(UNITS[entry[1]], entry[0]):
                missing.append(f"{name}: {entry[1]}")
    assert not missing
    assert set(UNITS) <= found, "a quantity of the list is gone"


@pytest.mark.parametrize("name", sorted(name for name in PUBLIC if "$$" in (inspect.getdoc(PUBLIC[name]) or "")))
def test_formulas_name_their_source(name):
    doc = inspect.getdoc(PUBLIC[name])
    assert re.search(r"Source: |arXiv|doi:|\(\D+, \d{4}\)", doc), "the formula's source is not named"
