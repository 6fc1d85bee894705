# SPDX-License-Identifier: Apache-2.0
"""A training of a CRM, and what tests ask of one that has ended."""

from __future__ import annotations

import torch

from llmd4rec_hf import CRMTrainer


def train(model, args, splits, teacher=None, **kwargs) -> CRMTrainer:
    """A trainer that has trained."""
    trainer = CRMTrainer(model, args, splits["train"], splits["validation"], teacher=teacher, **kwargs)
    trainer.train()
    return trainer


def losses(trainer) -> list[float]:
    """The training loss of each log."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model) -> torch.Tensor:
    """All parameters of a model in one row."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
