# SPDX-License-Identifier: Apache-2.0
"""Example scripts as modules, and something for them to work on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="session")
def load_script():
    """A function from a script's name to its module."""

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        # pydantic looks up annotations in the module.
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def saved_crm(make_crm, vocabulary, tmp_path) -> str:
    model = make_crm()
    model.vocabulary = vocabulary
    model.save_pretrained(tmp_path / "crm")
    return str(tmp_path / "crm")


@pytest.fixture
def log_file(small_log, tmp_path) -> str:
    small_log.to_csv(tmp_path / "log.csv", index=False)
    return str(tmp_path / "log.csv")


@pytest.fixture
def fails(capsys):
    """Check that a script ends with one clear line and exit code 1."""

    def check(main, words: list[str], message: str) -> None:
        with pytest.raises(SystemExit) as stop:
            main(words)
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 1
        assert error.startswith("error: ")
        assert message in error
        assert "\n" not in error

    return check
