# SPDX-License-Identifier: Apache-2.0
"""
The loss for catalogues whose scores cost too much: the true item of each position against a sample of all items.

The sample is uniform and shared by all positions of a step. Each of its items stands for many, so that the sums over
it are, on average over samples, those over the whole catalogue. Only the rows of the item matrix that take part are
ever read, and only they get a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from ..errors import ConfigurationError
from .listed_scores import LOG_ZERO, ListedScores
from .loss import (
    DistillationLoss,
    check_labels,
    check_lists,
    check_options,
    loss_of_walk,
)
from .walk import LossSettings, autocast_dtype, default_slice_size
from .weighting import TargetOutcome, sample_weights


def draw_negatives(num_items: int, size: int, seed: int | Sequence[int]) -> torch.LongTensor:
    """
    Items drawn uniformly and without replacement from 1..N, in time and memory of order `size`.

    Args:
        num_items (`int`): number of items N.
        size (`int`): how many to draw, 1..N.
        seed (`int` or `Sequence[int]`): decides the draw; e.g. a run's seed and the step.

    Returns:
        `torch.LongTensor` of shape `(size,)`.

    Raises:
        ConfigurationError: a size outside 1..N.
    """
    if not 1 <= size <= num_items:
        raise ConfigurationError(f"A sample of {num_items} items holds 1..{num_items} of them, got {size}.")
    drawn = np.random.default_rng(seed).choice(num_items, size, replace=False, shuffle=False)
    return torch.from_numpy(drawn).long() + 1


def sampled_distillation_loss(
    hidden: torch.Tensor,
    item_vectors: torch.Tensor,
    labels: torch.Tensor,
    teacher_hidden: torch.Tensor | None = None,
    teacher_item_vectors: torch.Tensor | None = None,
    *,
    negatives: torch.Tensor,
    num_items: int,
    teacher_lists: ListedScores | None = None,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    weighting: str = "rank",
    rank_base: int = 1,
    scale_by_temperature_squared: bool = True,
    chunk_size: int | None = None,
    num_items_in_batch: int | float | torch.Tensor | None = None,
) -> DistillationLoss:
    r"""
    [`distillation_loss`], estimated from a sample of the items.

    Position i takes its true item $y$ once, and each of the $k_i$ negatives that are not $y$ in place of
    $(N - 1) / k_i$ items, in both distributions and at either temperature:

    $$Z_i(T) = e^{s_y / T} + \frac{N - 1}{k_i} \sum_{j \in S \setminus y} e^{s_j / T}$$

    Over all samples the mean of $Z_i$ is the sum over the whole catalogue. Cross-entropy is $\log Z_i(1) - s_y$, on
    average a little below the full one; the KL is that of the two distributions over the true item and the negatives,
    each normalised by its own $Z_i(T)$. With more negatives both approach the full loss, and a sample of all items
    gives it exactly. Ranks, and with them the rank weights, are estimates too: 1 plus $(N - 1) / k_i$ times the number
    of negatives at least as good, rounded, so that a rank is 1 or at least $(N - 1) / k_i$.

    The order of arguments and the precision are those of [`distillation_loss`].

    Args:
        hidden (`torch.Tensor` of shape `(P, d)`):
            The student's hidden state at each supervised position.
        item_vectors (`torch.Tensor` of shape `(k + P, d)`):
            Rows of the student's item matrix: of the negatives, then of the labels.
        labels (`torch.LongTensor` of shape `(P,)`):
            The true next item, in 1..N; no position is ignored.
        teacher_hidden (`torch.Tensor` of shape `(P, d_t)`, *optional*):
            The teacher's hidden states at the same positions. Without a teacher the loss is plain cross-entropy.
        teacher_item_vectors (`torch.Tensor` of shape `(k + P, d_t)`, *optional*):
            Rows of the teacher's item matrix, of the same items.
        negatives (`torch.LongTensor` of shape `(k,)`):
            Different items out of 1..N, as [`draw_negatives`] gives them.
        num_items (`int`):
            Number of items N of the catalogue.
        teacher_lists ([`ListedScores`] of P lists, *optional*):
            In place of the teacher's hidden states and item vectors. The fewer of the listed items a sample holds, the
            less of what the teacher says reaches the student in a step.
        temperature, kl_weight, weighting, rank_base, scale_by_temperature_squared, num_items_in_batch:
            As in [`distillation_loss`].
        chunk_size (`int`, *optional*):
            Rows processed at a time. Chosen from the sample's size and the device by default.

    Returns:
        [`DistillationLoss`]

    Raises:
        ConfigurationError: shapes that do not fit, labels outside 1..N, a temperature that is not positive, an unknown
            weighting.

    Source: the estimate of a softmax's normaliser by uniform sampling is that of Bengio & Senécal (2003) and Jean et
    al. (2015, arXiv 1412.2007), section 3.
    """
    check_options(temperature, weighting, rank_base, chunk_size)
    _check_shapes(hidden, item_vectors, labels, teacher_hidden, teacher_item_vectors, negatives)
    check_labels(labels, num_items)
    check_lists(teacher_lists, len(labels), num_items, teacher_hidden)
    teacher = teacher_lists if teacher_hidden is None else (teacher_hidden, teacher_item_vectors)
    settings = LossSettings(
        temperature=1.0 if teacher is None else float(temperature),
        kl_weight=float(kl_weight),
        weighting=weighting,
        rank_base=rank_base,
        scale_by_temperature_squared=scale_by_temperature_squared,
        chunk_size=chunk_size or default_slice_size(len(negatives), hidden.device),
        matmul_dtype=autocast_dtype(hidden.device.type),
    )
    divisor = max(labels.numel(), 1) if num_items_in_batch is None else num_items_in_batch
    walk = functools.partial(
        _SampledWalk, labels=labels, negatives=negatives, num_items=num_items, teacher=teacher, settings=settings
    )
    result = loss_of_walk(walk, hidden, item_vectors, divisor, settings.kl_weight)
    if teacher is None:
        result.teacher_ranks = None
    return result


class _SampledWalk:
    """One pass over all positions, with the attributes that the walk over all items has."""

    def __init__(self, hidden, item_vectors, need_gradients, *, labels, negatives, num_items, teacher, settings):
        self.labels, self.negatives, self.num_items, self.settings = labels, negatives, num_items, settings
        sizes = len(negatives), settings.matmul_dtype
        self.student = _Side(hidden, item_vectors, *sizes)
        self.teacher = None
        if isinstance(teacher, ListedScores):
            self.teacher = _ListedSide(teacher, labels, negatives, num_items)
        elif teacher is not None:
            self.teacher = _Side(*teacher, *sizes)
        self.ranks = [torch.zeros_like(labels) for _ in range(2)]
        self.cross_entropy, self.kl, self.weights, self.agreement = hidden.new_zeros(
            4, len(labels), dtype=torch.float32
        )
        shapes = hidden.shape, item_vectors.shape
        self.gradients = tuple(hidden.new_zeros(s, dtype=torch.float32) for s in shapes) if need_gradients else None

    def run(self) -> None:
        """Fill the attributes."""
        for start in range(0, len(self.labels), self.settings.chunk_size):
            self._add_chunk(slice(start, min(start + self.settings.chunk_size, len(self.labels))))

    def _add_chunk(self, part: slice) -> None:
        hits = self.negatives == self.labels[part, None]
        others = (len(self.negatives) - hits.sum(dim=1)).clamp_min(1)
        stands_for = (self.num_items - 1) / others
        log_weights = torch.zeros(hits.shape[0], hits.shape[1] + 1, device=hits.device)
        log_weights[:, 1:] = stands_for.log()[:, None].masked_fill(hits, LOG_ZERO)
        scores = self.student.scores(part)
        self.ranks[0][part] = _ranks(scores, hits, stands_for)
        log_probs = (scores + log_weights).log_softmax(dim=1)
        self.cross_entropy[part] = -log_probs[:, 0]
        gradient = log_probs.exp_()
        gradient[:, 0] -= 1
        if self.teacher is not None:
            teacher_scores = self.teacher.scores(part)
            self.ranks[1][part] = _ranks(teacher_scores, hits, stands_for)
            gradient += self._add_kl(part, scores, teacher_scores, log_weights)
        if self.gradients is not None:
            self.student.add_gradients(part, gradient, *self.gradients)

    def _add_kl(self, part, scores, teacher_scores, log_weights) -> torch.Tensor:
        """One chunk's KL, weights and agreement; returns what the KL adds to the gradient of the student's scores."""
        settings = self.settings
        log_q, log_p = ((s / settings.temperature + log_weights).log_softmax(dim=1) for s in (scores, teacher_scores))
        q, p = log_q.exp(), log_p.exp()
        outcomes = TargetOutcome(self.ranks[0][part], log_q[:, 0]), TargetOutcome(self.ranks[1][part], log_p[:, 0])
        weights = sample_weights(*outcomes, settings.weighting, settings.rank_base)
        self.weights[part] = weights
        self.kl[part] = weights * settings.kl_scale * (p * (log_p - log_q)).sum(dim=1)
        self.agreement[part] = torch.minimum(p, q).sum(dim=1)
        return (weights * settings.kl_factor)[:, None] * (q - p)


class _Side:
    """One model's hidden states, and its vectors of the negatives and of the true items."""

    def __init__(self, hidden, item_vectors, size: int, dtype: torch.dtype):
        self.hidden, self.targets = hidden.detach(), item_vectors[size:].detach()
        self.negatives = item_vectors[:size].detach().to(dtype)

    def scores(self, part: slice) -> torch.Tensor:
        """
        Scores of shape `(rows, 1 + k)` in float32: of the true items, then of the negatives. The true item's is never
        rounded, as in the loss over all items.
        """
        own = torch.linalg.vecdot(self.hidden[part].float(), self.targets[part].float())
        others = self.hidden[part].to(self.negatives.dtype) @ self.negatives.T
        return torch.cat([own[:, None], others.float()], dim=1)

    def add_gradients(self, part: slice, gradient, grad_hidden, grad_vectors) -> None:
        """From the gradient of a chunk's scores to those of hidden states and item vectors."""
        size, dtype = len(self.negatives), self.negatives.dtype
        own, others = gradient[:, :1], gradient[:, 1:].to(dtype)
        grad_hidden[part] = own * self.targets[part] + others @ self.negatives
        grad_vectors[:size] += others.T @ self.hidden[part].to(dtype)
        grad_vectors[size:][part] = own * self.hidden[part]


class _ListedSide:
    """A teacher that is known by its lists: what the walk asks of a [`_Side`] that gets no gradient."""

    def __init__(self, lists: ListedScores, labels: torch.Tensor, negatives: torch.Tensor, num_items: int):
        self.lists, self.labels, self.negatives, self.num_items = lists, labels, negatives, num_items

    def scores(self, part: slice) -> torch.Tensor:
        """Scores of shape `(rows, 1 + k)` in float32: of the true items, then of the negatives."""
        own = self.labels[part, None]
        items = torch.cat([own, self.negatives.expand(len(own), -1)], dim=1)
        return self.lists[part].at(items, self.num_items)


def _ranks(scores: torch.Tensor, hits: torch.Tensor, stands_for: torch.Tensor) -> torch.Tensor:
    """Estimated ranks of the true items, ties counted against them."""
    better = (scores[:, 1:] >= scores[:, :1]).logical_and_(~hits).sum(dim=1)
    return 1 + (better * stands_for).round().long()


def _check_shapes(hidden, item_vectors, labels, teacher_hidden, teacher_item_vectors, negatives):
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1] or negatives.dim() != 1:
        raise ConfigurationError(
            f"hidden must be (P, d), labels (P,) and negatives (k,), got {tuple(hidden.shape)}, "
            f"{tuple(labels.shape)} and {tuple(negatives.shape)}."
        )
    rows, size = len(negatives) + len(labels), len(negatives)
    if item_vectors.shape != (rows, hidden.shape[1]) or not size:
        raise ConfigurationError(
            f"item_vectors must be of shape {(rows, hidden.shape[1])}, one row per negative (of which there must be "
            f"one at least) and per label, got {tuple(item_vectors.shape)}."
        )
    if (teacher_hidden is None) != (teacher_item_vectors is None):
        raise ConfigurationError("teacher_hidden and teacher_item_vectors go together: give both or neither.")
    if teacher_hidden is None:
        return
    width = teacher_item_vectors.shape[-1]
    if teacher_hidden.shape != (len(labels), width) or teacher_item_vectors.shape != (rows, width):
        raise ConfigurationError(
            f"The teacher's hidden states and item vectors must be of shapes {(len(labels), width)} and "
            f"{(rows, width)}, got {tuple(teacher_hidden.shape)} and {tuple(teacher_item_vectors.shape)}."
        )
