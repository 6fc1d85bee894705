# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import llmd4rec_hf


ROOT = Path(__file__).resolve().parents[1]

PUBLIC_NAMES = [
    "CRMArguments",
    "CRMTrainer",
    "GRU4RecConfig",
    "GRU4RecModel",
    "ItemVocabulary",
    "LLMRecommender",
    "LLMRecommenderConfig",
    "ListedScores",
    "ListedTeacherCache",
    "MutualDistillArguments",
    "MutualDistillTrainer",
    "MutualDistillation",
    "MutualDistillationConfig",
    "RankingMetric",
    "RecommenderEnsemble",
    "RecommenderModel",
    "SASRecConfig",
    "SASRecModel",
    "SequenceCollator",
    "TeacherCache",
    "distillation_loss",
    "load_interactions",
    "rank_weights",
    "ranking_metrics",
    "split_by_time",
    "split_leave_one_out",
    "target_ranks",
]


def test_no_other_name_is_public_and_the_reference_has_them_all():
    assert sorted(llmd4rec_hf.__all__) == PUBLIC_NAMES
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    assert [name for name in PUBLIC_NAMES if f"::: llmd4rec_hf.{name}\n" not in pages] == []


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_name(name):
    assert getattr(llmd4rec_hf, name).__name__ == name
    assert name in llmd4rec_hf.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = llmd4rec_hf.no_such_name


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """The sdist, and the wheel made from that sdist. Built from a copy: setuptools leaves its scratch files behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.cfg", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("llmd4rec_hf", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source / "dist"), str(source)]
    build = subprocess.run(command, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stdout + build.stderr
    return source / "dist"


def package_files(root: Path) -> set[str]:
    """Every file of the package: one that is not Python must be named under package-data to be installed."""
    files = (path.relative_to(root) for path in (root / "llmd4rec_hf").rglob("*") if path.is_file())
    return {str(path) for path in files if "__pycache__" not in path.parts}


def test_wheel(distributions):
    (wheel,) = distributions.glob("*.whl")
    assert wheel.name == f"llmd4rec_hf-{llmd4rec_hf.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"llmd4rec_hf-{llmd4rec_hf.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        licence = archive.read(f"{info}/licenses/LICENSE").decode()
    assert package_files(ROOT) == {name for name in names if not name.startswith(info)}
    assert "llmd4rec_hf/py.typed" in names
    assert "License-Expression: Apache-2.0" in metadata
    assert f"Version: {llmd4rec_hf.__version__}\n" in metadata
    assert licence == (ROOT / "LICENSE").read_text()


def test_sdist(distributions):
    (sdist,) = distributions.glob("*.tar.gz")
    prefix = f"llmd4rec_hf-{llmd4rec_hf.__version__}/"
    assert sdist.name == f"{prefix[:-1]}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(prefix) for name in archive.getnames()}
    assert package_files(ROOT) | {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert not {name for name in names if name.startswith("tests/")}
