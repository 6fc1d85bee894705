# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from torch import nn

from llmd4rec_hf.modes import evaluating


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back(training):
    model = nn.Sequential(nn.Dropout()).train(training)
    with evaluating(model):
        assert not model.training and not model[0].training
    assert model.training is model[0].training is training
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert model.training is model[0].training is training


def test_each_part_is_as_it_was():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[0].eval()
    with evaluating(model):
        assert not model[1].training
    assert [model.training, model[0].training, model[1].training] == [True, False, True]
