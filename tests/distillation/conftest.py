# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from cached_rows import make_dataset, make_teacher

from llmd4rec_hf.distillation import TeacherCache


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
