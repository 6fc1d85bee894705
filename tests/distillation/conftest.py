# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
from cached_rows import make_dataset, make_teacher

from llmd4rec_hf.distillation import TeacherCache, loss


@pytest.fixture(params=["torch", "numba"])
def walk_by(request, monkeypatch):
    """Both ways over the positions, whatever the catalogue's size."""
    if request.param == "numba":
        pytest.importorskip("numba")
    monkeypatch.setattr(loss, "_MIN_COMPILED_ITEMS", 0 if request.param == "numba" else math.inf)
    return request.param


@pytest.fixture(scope="module")
def dataset():
    return make_dataset()


@pytest.fixture(scope="module")
def teacher():
    return make_teacher()


@pytest.fixture
def cache(teacher, dataset, tmp_path):
    return TeacherCache.build(teacher, dataset, tmp_path / "cache", batch_size=2)


@pytest.fixture(scope="module")
def wide_teacher():
    """Nine items span nine of its 160 dimensions: without the mean of all items, eight."""
    return make_teacher(2, width=160)
