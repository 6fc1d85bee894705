# SPDX-License-Identifier: Apache-2.0
"""What every test runs under: no network, no shared caches, one thread per process, no deprecated calls."""

from __future__ import annotations

import gc
import logging
import os
import tempfile
from pathlib import Path

import pytest


# Before the first import of torch or of a Hugging Face library, which read these once. Subprocesses inherit them.
_HF_HOME = tempfile.TemporaryDirectory(prefix="llmd4rec_hf_tests_")  # each xdist worker has its own, gone at exit
os.environ.update(
    HF_HOME=_HF_HOME.name,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # the xdist workers are the parallelism; more threads only get in each other's way
    MPLBACKEND="Agg",
)

# Imports leave hardly any garbage, and would spend a fifth of their time looking for it.
gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.enable()


class _DeprecationRecords(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message:
            self.messages.append(message)


@pytest.fixture(scope="module", autouse=True)
def libraries_are_no_garbage():
    """Every training collects garbage, which among all the libraries' objects takes longer than to train."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_deprecated_transformers_calls():
    """transformers announces most deprecations in its log, where `filterwarnings` does not see them."""
    handler = _DeprecationRecords()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not handler.messages


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the repository: real data sets and small models that may not be redistributed."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("there is no folder `shared` beside the repository")
    return path


# A world small enough to train in: 12 items, 40 users, and models that learn it in a second. Libraries are imported
# where they are needed: the process that hands out the tests to others reads this file too, while those wait for it.
NUM_ITEMS = 12


@pytest.fixture(scope="session")
def small_log():
    """A table of 40 users who walk round a circle of items, with a wobble, from 4 to 9 steps."""
    import numpy as np
    import pandas as pd

    random = np.random.default_rng(7)
    rows = []
    for user in range(40):
        item = int(random.integers(NUM_ITEMS))
        for step in range(int(random.integers(4, 10))):
            rows.append((f"u{user:02d}", f"i{item:02d}", step))
            item = (item + int(random.choice([1, 1, 1, 2]))) % NUM_ITEMS
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])


@pytest.fixture(scope="session")
def vocabulary(small_log):
    from llmd4rec_hf import ItemVocabulary

    ids = sorted(small_log["item_id"].unique())
    return ItemVocabulary(ids, [f"title of thing {name}" for name in ids])


@pytest.fixture(scope="session")
def splits(small_log, vocabulary):
    from llmd4rec_hf import load_interactions, split_leave_one_out

    return split_leave_one_out(load_interactions(small_log), vocabulary)


@pytest.fixture
def make_crm():
    """A SASRec without dropout, so that two trainings differ only where they should."""
    from transformers import set_seed

    from llmd4rec_hf import SASRecConfig, SASRecModel

    def make(seed: int = 0, **config) -> SASRecModel:
        set_seed(seed)
        settings = {"num_items": NUM_ITEMS, "hidden_size": 8, "num_layers": 1, "max_length": 6, "dropout": 0.0}
        return SASRecModel(SASRecConfig(**{**settings, **config}))

    return make


@pytest.fixture
def make_llm(vocabulary):
    """A tiny LLM recommender over the same items, on vectors of width 8."""
    from transformers import set_seed

    from llmd4rec_hf import LLMRecommender
    from llmd4rec_hf.models import build_tiny_llm

    def make(seed: int = 0, **settings) -> LLMRecommender:
        set_seed(seed)
        backbone, tokenizer = build_tiny_llm(vocabulary.texts, hidden_size=16, num_layers=1)
        return LLMRecommender.from_backbone(
            backbone, NUM_ITEMS, 8, tokenizer=tokenizer, prompt="title of {history} thing", max_length=6, **settings
        )

    return make


@pytest.fixture
def make_arguments(tmp_path):
    """Arguments of a short training that saves nothing, in a folder of the test's own."""
    from llmd4rec_hf import CRMArguments

    def make(name: str = "run", kind=CRMArguments, **settings):
        defaults = {
            "use_cpu": True,
            "num_train_epochs": 2,
            "logging_steps": 1,
            "disable_tqdm": True,
            "save_strategy": "no",
        }
        return kind(str(tmp_path / name), **{**defaults, **settings})

    return make


@pytest.fixture
def walker(vocabulary):
    """Knows the circle that all users walk round: the next item, the one after it, and nothing of the others."""
    import numpy as np

    def teacher(histories):
        places = [vocabulary.item_ids.index(history[-1]) for history in histories]
        ids = [[vocabulary.item_ids[(place + step) % len(vocabulary)] for step in (1, 2)] for place in places]
        return ids, [np.log([0.6, 0.2])] * len(histories)

    return teacher


@pytest.fixture
def walks(walker, splits, vocabulary, tmp_path):
    """Its lists."""
    from llmd4rec_hf import ListedTeacherCache

    return ListedTeacherCache.build(
        walker, splits["train"], tmp_path / "walks", name="walker", vocabulary=vocabulary, list_size=2
    )


@pytest.fixture
def unrendered(monkeypatch):
    """Reports whose picture is drawn but not rendered, which takes as long as the trainings of a short run."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: Path(path).touch())
