# SPDX-License-Identifier: Apache-2.0
"""A narrower teacher: the best low-rank form of its scores, with its error known beforehand.

A teacher of width 1024 costs a student of width 64 many times its own step, all of it in `hidden @ item_matrix.T`. But
what a trained teacher says seldom fills its width. Among all factorisations of a given rank the one below is closest
to the full score matrix (Eckart and Young, 1936), and it is found without ever forming that matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


# What is held in double precision at a time: rows of an item matrix, numbers of a score matrix.
_ITEMS_AT_A_TIME = 1 << 15
_SCORES_AT_A_TIME = 1 << 23


@dataclass
class LowRankTeacher:
    """
    A teacher's scores in fewer dimensions: `scores = (hidden @ projection) @ item_matrix.T`.

    Attributes:
        projection (`torch.Tensor` of shape `(d_t, r)`): takes the teacher's hidden states to the new width.
        item_matrix (`torch.Tensor` of shape `(N + 1, r)`): the new item matrix; row 0 is padding.
        error (`float`): root mean square error of a score, in nats, over the positions that were counted and all
            items. A constant added to all of a position's scores is no error: no softmax sees it.
        sizes (`torch.Tensor` of shape `(r,)`): root mean square of each new dimension of the hidden states, falling;
            the item matrix's columns are orthonormal.
    """

    projection: torch.Tensor
    item_matrix: torch.Tensor
    error: float
    sizes: torch.Tensor

    def item_vectors(self, width: int, spread: float | None = None) -> torch.Tensor:
        """
        Item vectors for a student to begin with.

        Of each axis's share in the scores they take the root, so that minor axes are not lost, and all of the spread:
        hidden states of unit components then give scores that spread so far.

        Args:
            width (`int`): the student's number of dimensions, `r` or more; further ones are zero.
            spread (`float`, *optional*): root mean square of the scores, in nats; the teacher's own by default.

        Returns:
            `torch.Tensor` of shape `(N + 1, width)`; row 0, padding, is zero.
        """
        total = self.sizes.square().sum() if spread is None else spread**2 * (len(self.item_matrix) - 1)
        vectors = self.item_matrix * (self.sizes * (total / self.sizes.sum().clamp_min(1e-12))).sqrt()
        return torch.nn.functional.pad(vectors, (0, width - vectors.shape[1]))


def reduce_teacher(
    hidden_moment: torch.Tensor, item_matrix: torch.Tensor, max_error: float = 0.0, max_rank: int | None = None
) -> LowRankTeacher:
    r"""
    The narrowest form of a teacher whose scores are off by at most `max_error`, or the best one of `max_rank`.

    With the items' second moment $W^\top W = R^\top R$, the scores $H W^\top = (H R^\top)(W R^{-1})^\top$ have
    orthonormal columns on the right, so their best approximation of rank r keeps the r largest principal axes of
    $H R^\top$, which are eigenvectors of $R\,(H^\top H)\,R^\top$; the eigenvalues left out add up to the squared
    error.

    Args:
        hidden_moment (`torch.Tensor` of shape `(d_t, d_t)`): mean of $h h^\top$ over positions.
        item_matrix (`torch.Tensor` of shape `(N + 1, d_t)`): the teacher's item matrix; row 0 is padding.
        max_error (`float`, *optional*, defaults to 0.0): largest root mean square error of a score, in nats.
        max_rank (`int`, *optional*): largest rank, whatever the error then is.

    Returns:
        [`LowRankTeacher`]
    """
    items = item_matrix[1:]
    # What all items share shifts every score of a position alike.
    centre = items.mean(dim=0, dtype=torch.float64)
    root, inverse_root = _square_roots(_centred_moment(items, centre))
    values, axes = torch.linalg.eigh(root @ hidden_moment.double() @ root)
    values, axes = values.flip(0).clamp_min(0), axes.flip(1)
    errors = (values.flip(0).cumsum(0).flip(0) / items.shape[0]).sqrt()
    # errors[r] is the error of keeping r axes; one is kept at least.
    rank = max(1, min(int((errors > max_error).sum()), max_rank or len(errors)))
    kept = axes[:, :rank]
    reduced = item_matrix.new_zeros(item_matrix.shape[0], rank)
    for part, narrow in zip(items.split(_ITEMS_AT_A_TIME), reduced[1:].split(_ITEMS_AT_A_TIME), strict=True):
        narrow.copy_((part.double() - centre) @ (inverse_root @ kept))
    error = float(errors[rank]) if rank < len(errors) else 0.0
    sizes = values[:rank].sqrt().to(item_matrix.dtype)
    return LowRankTeacher((root @ kept).to(item_matrix.dtype), reduced, error, sizes)


def score_errors(
    hidden: torch.Tensor, item_matrix: torch.Tensor, other_hidden: torch.Tensor, other_item_matrix: torch.Tensor
) -> tuple[float, float]:
    """
    How far another form of a teacher is from it: the root mean square error of a score, constants per position apart,
    and the mean KL(teacher || other form) at temperature 1, both in nats.

    Args:
        hidden (`torch.Tensor` of shape `(P, d_t)`): the teacher's hidden states.
        item_matrix (`torch.Tensor` of shape `(N + 1, d_t)`): the teacher's item matrix; row 0 is padding.
        other_hidden (`torch.Tensor` of shape `(P, r)`): those of the other form.
        other_item_matrix (`torch.Tensor` of shape `(N + 1, r)`): the other form's item matrix.
    """
    rows = max(1, _SCORES_AT_A_TIME // len(item_matrix))
    square, divergence = 0.0, 0.0
    for part, other_part in zip(hidden.split(rows), other_hidden.split(rows), strict=True):
        scores, other = (part @ item_matrix[1:].T).double(), (other_part @ other_item_matrix[1:].T).double()
        difference = scores - other
        square += float((difference - difference.mean(dim=1, keepdim=True)).square().mean(dim=1).sum())
        log_p, log_q = scores.log_softmax(dim=1), other.log_softmax(dim=1)
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
    return (square / len(hidden)) ** 0.5, divergence / len(hidden)


def _centred_moment(items: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Sum over items of their outer product about the centre."""
    moment = items.new_zeros(items.shape[1], items.shape[1], dtype=torch.float64)
    for part in items.split(_ITEMS_AT_A_TIME):
        centred = part.double() - centre
        moment.addmm_(centred.T, centred)
    return moment


def _square_roots(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric square root of a second moment and its pseudo-inverse."""
    values, axes = torch.linalg.eigh(moment)
    values = values.clamp_min(0)
    roots = values.sqrt()
    inverse = torch.where(values > values.max() * 1e-14, 1 / roots.clamp_min(1e-300), 0.0)
    return (axes * roots) @ axes.T, (axes * inverse) @ axes.T
