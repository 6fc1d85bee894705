# SPDX-License-Identifier: Apache-2.0
"""Full-catalogue ranks by counting, and the metrics that follow from them.

Everything works on a hidden state per row and an item matrix, so it never cares which model made them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch

from ..errors import ConfigurationError, DataError


Ties = Literal["pessimistic", "optimistic", "mean"]
TIES: tuple[str, ...] = get_args(Ties)

# Scores of one chunk stay near the cache: on CPU, 2 to 16 MB are equally fast and 32 MB takes twice as long.
_CHUNK_BYTES = 8 * 2**20


class TargetScores(NamedTuple):
    """What [`score_targets`] returns, one value per row.

    Attributes:
        ranks (`torch.LongTensor` of shape `(P,)`):
            Rank of the target, starting at 1.
        nll (`torch.FloatTensor` of shape `(P,)`):
            Negative log-likelihood of the target in nats, softmax over all N items whether seen or not.
    """

    ranks: torch.Tensor
    nll: torch.Tensor


def target_ranks(
    hidden: torch.Tensor,
    item_matrix: torch.Tensor,
    labels: torch.Tensor,
    *,
    seen: torch.Tensor | None = None,
    ties: Ties = "pessimistic",
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Rank of each row's target among all N items, by `hidden @ item_matrix.T`.

    Nothing is sorted: the rank is `1 + (number of items that score higher) + (share of the items that tie)`, so it
    does not depend on where an item stands in the catalogue. A model that gives every item the same score ranks
    last by default, as it should.

    Args:
        hidden (`torch.Tensor` of shape `(P, d)`):
            One hidden state per target, of any floating type.
        item_matrix (`torch.Tensor` of shape `(N + 1, d)`):
            Item vectors. Row 0 is the padding item, which is never ranked, whatever it holds.
        labels (`torch.Tensor` of shape `(P,)`):
            The targets, in 1..N. Leave out the positions that have none.
        seen (`torch.Tensor` of shape `(P, S)`, *optional*):
            Items to leave out of each row's ranking, padded with 0; repeats are fine. A target stays in even if it
            is listed: a repeated purchase must not become impossible to predict.
        ties (`str`, *optional*, defaults to `"pessimistic"`):
            How the other items with the target's own score count: `"pessimistic"` puts them all ahead of it,
            `"optimistic"` none, `"mean"` half of them, rounded up, so that ranks stay whole numbers.
        chunk_size (`int`, *optional*):
            Rows scored at a time; at most `chunk_size * (N + 1)` scores exist. By default as many as 8 MB hold.

    Returns:
        `torch.LongTensor` of shape `(P,)`: ranks from 1, on the device of `hidden`.

    Raises:
        [`~llmd4rec_hf.errors.DataError`]: shapes that do not fit, a label or seen item outside the catalogue, or a
            score that is not finite (a NaN compares as smaller than everything, so it would rank first).
        [`~llmd4rec_hf.errors.ConfigurationError`]: an unknown `ties` or a `chunk_size` below 1.

    Example:

    ```python
    >>> item_matrix = torch.tensor([[9.0], [3.0], [2.0], [2.0], [1.0]])  # row 0 is padding
    >>> target_ranks(torch.ones(2, 1), item_matrix, torch.tensor([1, 2]))
    tensor([1, 3])
    ```
    """
    return score_targets(hidden, item_matrix, labels, seen=seen, ties=ties, chunk_size=chunk_size).ranks


@torch.no_grad()
def score_targets(
    hidden: torch.Tensor,
    item_matrix: torch.Tensor,
    labels: torch.Tensor,
    *,
    seen: torch.Tensor | None = None,
    ties: Ties = "pessimistic",
    chunk_size: int | None = None,
) -> TargetScores:
    """Rank and negative log-likelihood of each row's target, in one pass over the scores.

    Takes the arguments of [`target_ranks`] and raises its errors. `seen` changes the ranks alone: the likelihood is
    the one that cross-entropy trains.
    """
    rows, columns = hidden.shape[0], item_matrix.shape[0]
    _check_options(ties, chunk_size)
    _check_shapes(hidden, item_matrix, labels, seen)
    labels = labels.to(hidden.device, torch.long)
    seen = None if seen is None else seen.to(hidden.device, torch.long)
    _check_ids(labels, seen, num_items=columns - 1)

    chunk_size = chunk_size or max(1, _CHUNK_BYTES // (4 * columns))
    ranks = torch.empty(rows, dtype=torch.long, device=hidden.device)
    nll = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    finite = torch.empty(rows, dtype=torch.bool, device=hidden.device)
    # An evaluation under bf16 autocast would score in bf16, where a large catalogue is mostly ties.
    with torch.autocast(hidden.device.type, enabled=False):
        item_vectors = item_matrix.float().T
        buffers = torch.empty(2, min(chunk_size, rows), columns, dtype=torch.float32, device=hidden.device)
        for start in range(0, rows, chunk_size):
            chunk = slice(start, min(start + chunk_size, rows))
            scores, spare = buffers[:, : chunk.stop - start]
            torch.mm(hidden[chunk].float(), item_vectors, out=scores)
            target = scores.gather(1, labels[chunk, None])
            # Both are NaN if any score is: no mask of chunk x N is needed. Padding may hold anything.
            low, high = scores[:, 1:].amin(dim=1), scores[:, 1:].amax(dim=1)
            finite[chunk] = low.isfinite() & high.isfinite()
            scores[:, 0] = -torch.inf
            powers = torch.sub(scores, high.unsqueeze(1), out=spare).exp_()
            nll[chunk] = powers.sum(dim=1).log() + high - target.squeeze(1)
            if seen is not None:
                scores.scatter_(1, seen[chunk], -torch.inf)
                scores.scatter_(1, labels[chunk, None], target)
            ranks[chunk] = _count_ranks(scores, target, ties, spare)
    _check_finite(finite)
    return TargetScores(ranks, nll)


def count_at_least(scores: torch.Tensor, target: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """
    How many scores of each row reach the target's, which is among them: its rank, with ties counted against it.

    Args:
        scores (`torch.FloatTensor` of shape `(C, N)`): of the items of each row.
        target (`torch.FloatTensor` of shape `(C, 1)`): the target's own.
        buffer (`torch.FloatTensor` of shape `(C, N)`): is written over.

    Returns:
        `torch.Tensor` of shape `(C, 1)`: whole floats.
    """
    return _count(torch.ge(scores, target, out=buffer))


def _count(marks: torch.Tensor) -> torch.Tensor:
    """How many of each row's zeros and ones are ones, as whole floats of shape `(C, 1)`."""
    # Floats are added up several times faster than booleans, and whole numbers exactly up to 2**24.
    return marks.sum(dim=1, keepdim=True, dtype=torch.float32 if marks.shape[1] < 2**24 else torch.float64)


def _count_ranks(scores: torch.Tensor, target: torch.Tensor, ties: str, buffer: torch.Tensor) -> torch.Tensor:
    """Ranks `(C,)` of the targets' scores `(C, 1)` among the scores `(C, N + 1)`, which include the target."""
    if ties == "pessimistic":
        ranks = count_at_least(scores, target, buffer)
    else:
        greater = _count(torch.gt(scores, target, out=buffer))
        # "mean": half of the other items that tie count, rounded up; "optimistic": none of them.
        others = count_at_least(scores, target, buffer) - greater - 1 if ties != "optimistic" else 0
        ranks = 1 + greater + (others + 1) // 2
    return ranks.squeeze(1).long()


def _check_options(ties: str, chunk_size: int | None) -> None:
    if ties not in TIES:
        raise ConfigurationError(f"ties={ties!r} is unknown: choose one of {', '.join(TIES)}.")
    if chunk_size is not None and chunk_size < 1:
        raise ConfigurationError(
            f"chunk_size={chunk_size} must be at least 1, or None to choose it from the catalogue."
        )


def _check_shapes(
    hidden: torch.Tensor, item_matrix: torch.Tensor, labels: torch.Tensor, seen: torch.Tensor | None
) -> None:
    shapes = f"hidden {tuple(hidden.shape)}, item_matrix {tuple(item_matrix.shape)}, labels {tuple(labels.shape)}"
    if hidden.ndim != 2 or item_matrix.ndim != 2 or hidden.shape[1] != item_matrix.shape[1]:
        raise DataError(f"Expected hidden (P, d) and item_matrix (N + 1, d), got {shapes}.")
    if item_matrix.shape[0] < 2:
        raise DataError(f"The item matrix needs the padding row and at least one item, got {shapes}.")
    if labels.shape != hidden.shape[:1]:
        raise DataError(f"Expected one label per row of hidden, got {shapes}.")
    if seen is not None and (seen.ndim != 2 or seen.shape[0] != hidden.shape[0]):
        raise DataError(f"Expected seen (P, S) with one row per row of hidden, got {tuple(seen.shape)} and {shapes}.")


def _check_ids(labels: torch.Tensor, seen: torch.Tensor | None, num_items: int) -> None:
    if labels.numel() and not (labels.min() >= 1 and labels.max() <= num_items):
        outside = labels[(labels < 1) | (labels > num_items)]
        raise DataError(
            f"{outside.numel()} labels lie outside 1..{num_items}, the first is {outside[0].item()}. "
            "Select the positions that have a target before ranking."
        )
    if seen is not None and seen.numel() and not (seen.min() >= 0 and seen.max() <= num_items):
        outside = seen[(seen < 0) | (seen > num_items)]
        raise DataError(f"Seen items must lie in 0..{num_items} (0 pads), found {outside[0].item()}.")


def _check_finite(finite: torch.Tensor) -> None:
    if not finite.all():
        bad = (~finite).nonzero().flatten()
        raise DataError(
            f"Non-finite scores in {bad.numel()} of {finite.numel()} rows, the first is row {bad[0].item()}. "
            "The model has diverged or its item matrix is damaged; no rank would mean anything."
        )


def ranking_metrics(
    ranks: torch.Tensor | np.ndarray | Sequence[int], ks: Sequence[int] = (5, 10, 20)
) -> dict[str, float]:
    """Hit rate, NDCG and MRR at each cut-off, for one target per row.

    With a single target the hit rate is the recall, and the ideal DCG is 1, so that NDCG is `1 / log2(rank + 1)`
    (Järvelin and Kekäläinen, 2002, [doi:10.1145/582415.582418](https://doi.org/10.1145/582415.582418)). Every metric
    counts a row whose rank is beyond k as 0 and is the mean over all rows.

    Args:
        ranks (`torch.Tensor`, `np.ndarray` or sequence of shape `(P,)`):
            Ranks from 1, as given by [`target_ranks`].
        ks (`Sequence[int]`, *optional*, defaults to `(5, 10, 20)`):
            The cut-offs.

    Returns:
        `dict[str, float]`: `"hr@k"`, `"ndcg@k"` and `"mrr@k"` in [0, 1] for each k, in the order of `ks`.

    Raises:
        [`~llmd4rec_hf.errors.DataError`]: no ranks, or a rank below 1.
        [`~llmd4rec_hf.errors.ConfigurationError`]: a cut-off below 1.

    Example:

    ```python
    >>> ranking_metrics([1, 3, 100], ks=(10,))
    {'hr@10': 0.6666666666666666, 'ndcg@10': 0.5, 'mrr@10': 0.4444444444444444}
    ```
    """
    if isinstance(ranks, torch.Tensor):
        ranks = ranks.detach().cpu().numpy()
    ranks = np.asarray(ranks, dtype=np.float64).reshape(-1)
    if ranks.size == 0:
        raise DataError("There are no ranks to average: the evaluation data has no row with a target.")
    if not (ranks >= 1).all():
        raise DataError(f"Ranks start at 1, found {ranks[~(ranks >= 1)][0]:g}.")
    metrics = {}
    for k in ks:
        if k < 1:
            raise ConfigurationError(f"ks={tuple(ks)}: a cut-off must be at least 1.")
        hits = ranks <= k
        metrics[f"hr@{k}"] = float(hits.mean())
        metrics[f"ndcg@{k}"] = float((hits / np.log2(ranks + 1)).mean())
        metrics[f"mrr@{k}"] = float((hits / ranks).mean())
    return metrics
