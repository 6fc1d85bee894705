# SPDX-License-Identifier: Apache-2.0
"""What every test runs under: no network, no shared caches, one thread per process, no deprecated calls."""

from __future__ import annotations

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


class _DeprecationRecords(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message:
            self.messages.append(message)


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
