# SPDX-License-Identifier: Apache-2.0
"""What the package has no place for and a comparison needs: a sum of models, and SASRec's first loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

from llmd4rec_hf import CRMTrainer, RecommenderModel


class EnsembleConfig(PreTrainedConfig):
    """Configuration of [`Ensemble`]."""

    model_type = "quality-ensemble"
    max_length: int = 50

    def __init__(self, num_items: int = 1, max_length: int = 50, **kwargs):
        self.num_items, self.max_length = num_items, max_length
        super().__init__(**kwargs)


class Ensemble(RecommenderModel):
    """
    The mean of the members' log-probabilities, up to a constant per history: their scores' mean, which is the product
    of their hidden states and item matrices side by side.
    """

    config_class = EnsembleConfig

    def __init__(self, members: list[RecommenderModel]):
        first = members[0].config
        super().__init__(EnsembleConfig(num_items=first.num_items, max_length=first.max_length))
        self.members = torch.nn.ModuleList(members)
        self.vocabulary = members[0].vocabulary

    def item_matrix(self) -> torch.Tensor:
        return torch.cat([member.item_matrix() for member in self.members], dim=1)

    def encode(self, item_ids, attention_mask=None) -> torch.Tensor:
        states = [member.encode(item_ids, attention_mask) for member in self.members]
        return torch.cat(states, dim=-1) / len(states)


class BinaryCrossEntropyTrainer(CRMTrainer):
    """Each true item against one other, drawn uniformly from the whole catalogue: how SASRec was trained first."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(inputs["item_ids"], inputs["attention_mask"])
        keep = inputs["labels"] != -100
        hidden, labels = outputs.hidden[keep], inputs["labels"][keep]
        others = torch.randint_like(labels, 1, len(outputs.item_matrix))
        scores, other_scores = (
            torch.linalg.vecdot(hidden.float(), outputs.item_matrix[items].float()) for items in (labels, others)
        )
        loss = F.softplus(-scores).sum() + F.softplus(other_scores).sum()
        loss = loss / self._loss_divisor(labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss
