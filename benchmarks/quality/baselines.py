# SPDX-License-Identifier: Apache-2.0
"""What the package has no place for and a comparison needs: SASRec's first loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmd4rec_hf import CRMTrainer


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
