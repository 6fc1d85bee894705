# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from functools import partial

import pytest


@pytest.fixture
def arguments(make_arguments):
    return partial(make_arguments, per_device_train_batch_size=8, logging_nan_inf_filter=False, logging_steps=500)
