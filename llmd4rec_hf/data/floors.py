# SPDX-License-Identifier: Apache-2.0
"""
What needs no learning: the most popular items, and the items that follow each other.

A model below these floors is under-trained or wrong, so every data card names them.
"""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np

from ..evaluation.ranking import ranking_metrics
from .arrow import to_table


WINDOW, DECAY, NEIGHBOURS = 10, 0.7, 500
# Beyond these the floors are estimated from random users, for a floor needs no third digit: interactions to find
# neighbours in, targets to rank, and neighbours to look at for all of them (some ten seconds).
MOST_FITTED, MOST_RANKED, MOST_WORK = 2_000_000, 50_000, 100_000_000
# Neighbours looked at together: what bounds the memory.
CHUNK_ENTRIES = 1 << 21


def floors(train: datasets.Dataset, test: datasets.Dataset, num_items: int) -> dict[str, Any]:
    """
    HR@10 and NDCG@10 of popularity and of an item-based k-nearest-neighbour rule.

    The neighbours: one item leads to another as often as it stands before it in a training sequence, at most `WINDOW`
    steps away and each further step weighing `DECAY` times as much, divided by the root of both items' counts. Of each
    item the `NEIGHBOURS` nearest count. A candidate's score sums this over the last `WINDOW` items of the history,
    each step back weighing `DECAY` times as much again; where that says nothing, popularity decides. Both rules see
    `train` alone, rank the whole catalogue without the items in the history, and count ties against themselves.

    Args:
        train (`datasets.Dataset`):
            The training split.
        test (`datasets.Dataset`):
            The split to rank: the last item of each row is the target.
        num_items (`int`):
            Size of the catalogue.

    Returns:
        `dict`: `popularity` and `item_knn`, each with `hr@10` and `ndcg@10`, and `fitted_interactions`,
        `ranked_targets`.
    """
    ranks, fitted_interactions = floor_ranks(train, test, num_items)
    found = {}
    for name, values in ranks.items():
        metrics = ranking_metrics(values, ks=(10,))
        found[name] = {key: metrics[key] for key in ("hr@10", "ndcg@10")}
    return {**found, "fitted_interactions": fitted_interactions, "ranked_targets": len(ranks["popularity"])}


def floor_ranks(train: datasets.Dataset, test: datasets.Dataset, num_items: int) -> tuple[dict[str, np.ndarray], int]:
    """
    The ranks that [`floors`] counts, which says what they are of.

    Returns:
        `tuple`: `popularity` and `item_knn`, each of shape `(targets,)` in the order of the rows, 1 is best; and how
        many interactions the neighbours were found in.
    """
    rng = np.random.default_rng(0)  # draws users where there are too many to look at each
    values, lengths = row_items(train)
    popularity = np.bincount(values, minlength=num_items + 1).astype(np.float32)
    values, lengths = _sample(values, lengths, MOST_FITTED, rng)
    neighbours = _neighbours(values, lengths, num_items)
    rows, row_lengths = row_items(test)
    rows, row_lengths = _affordable(rows, row_lengths, neighbours[0], rng)
    ranks = _ranks(rows, row_lengths, neighbours, popularity)
    return dict(zip(("popularity", "item_knn"), ranks, strict=True)), len(values)


def row_items(dataset: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The items of all rows one after the other, and the rows' lengths."""
    lists = to_table(dataset.select_columns(["item_ids"]))["item_ids"]
    lengths = [chunk.value_lengths().to_numpy() for chunk in lists.chunks]
    values = [chunk.flatten().to_numpy() for chunk in lists.chunks]
    return np.concatenate(values or [np.empty(0, np.int32)]), np.concatenate(lengths or [np.empty(0, np.int32)])


def _sample(values: np.ndarray, lengths: np.ndarray, most: int, rng: np.random.Generator):
    """Random whole sequences with about `most` items together."""
    if len(values) <= most:
        return values, lengths
    order = rng.permutation(len(lengths))
    return _chosen(values, lengths, order[: np.searchsorted(np.cumsum(lengths[order]), most)])


def _chosen(values: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Some rows' items and lengths, in the order of the data."""
    chosen = np.zeros(len(lengths), bool)
    chosen[rows] = True
    return values[np.repeat(chosen, lengths)], lengths[chosen]


def _neighbours(values: np.ndarray, lengths: np.ndarray, num_items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Similar items as compressed rows: where each item's neighbours start, who they are, and how similar."""
    row = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    keys, weights = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for distance in range(1, WINDOW + 1):
        together = row[distance:] == row[:-distance]
        first, then = values[:-distance][together], values[distance:][together]
        different = first != then
        keys.append(first[different].astype(np.int64) * (num_items + 1) + then[different])
        weights.append(np.full(len(keys[-1]), DECAY ** (distance - 1), np.float32))
    keys, together = _sum_equal(np.concatenate(keys), np.concatenate(weights))
    first, then = np.divmod(keys, num_items + 1)
    counts = np.bincount(values, minlength=num_items + 1)
    similarity = together / np.sqrt(counts[first] * counts[then])
    nearest = _nearest(first, similarity)
    first, then, similarity = first[nearest], then[nearest], similarity[nearest]
    return np.searchsorted(first, np.arange(num_items + 2)), then.astype(np.int32), similarity


def _nearest(first: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    """Which pairs are among the `NEIGHBOURS` most similar of their first item."""
    starts = np.searchsorted(first, first)
    nearest = np.ones(len(first), bool)
    crowded = np.flatnonzero(np.bincount(first)[first] > NEIGHBOURS) if len(first) else starts
    order = crowded[np.lexsort((-similarity[crowded], first[crowded]))]
    # Sorted among themselves, the pairs of an item still fill the same places.
    nearest[order[crowded - starts[crowded] >= NEIGHBOURS]] = False
    return nearest


def _work(values: np.ndarray, lengths: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """How many neighbours have to be looked at for each row."""
    back = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(values)) - 1
    counts = (starts[values + 1] - starts[values]) * ((back > 0) & (back <= WINDOW)) + 1
    return np.add.reduceat(counts, np.cumsum(lengths) - lengths)


def _affordable(
    values: np.ndarray, lengths: np.ndarray, starts: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Random rows, as many as `MOST_RANKED` and `MOST_WORK` allow."""
    order = rng.permutation(len(lengths))
    count = np.searchsorted(np.cumsum(_work(values, lengths, starts)[order]), MOST_WORK)
    return _chosen(values, lengths, order[: max(1, min(count, MOST_RANKED))])


def _sum_equal(keys: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct keys in order, and the sum of each one's weights."""
    order = np.argsort(keys, kind="stable")
    keys, weights = keys[order], weights[order].astype(np.float64)
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[starts], np.add.reduceat(weights, starts) if len(starts) else weights


def _ranks(
    values: np.ndarray, lengths: np.ndarray, neighbours: tuple, popularity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """
    The target's rank in each row, by popularity and by neighbours.

    No row of scores over the catalogue is ever made: what is not a neighbour is counted by its popularity.
    """
    row = np.repeat(np.arange(len(lengths)), lengths)
    back = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(values)) - 1  # 0 is the target
    work = np.cumsum(_work(values, lengths, neighbours[0]))
    edges = np.unique([0, *np.searchsorted(work, np.arange(CHUNK_ENTRIES, work[-1], CHUNK_ENTRIES)), len(lengths)])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    # How many items are at least as popular as each one, itself among them.
    as_popular = len(popularity) - np.searchsorted(np.sort(popularity), popularity)
    as_popular -= popularity[0] >= popularity  # padding
    parts = []
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        here = slice(offsets[begin], offsets[end])
        parts.append(_chunk_ranks(values[here], row[here] - begin, back[here], neighbours, popularity, as_popular))
    by_popularity, by_neighbours = zip(*parts, strict=True)
    return np.concatenate(by_popularity), np.concatenate(by_neighbours)


def _chunk_ranks(
    items: np.ndarray,
    row: np.ndarray,
    back: np.ndarray,
    neighbours: tuple,
    popularity: np.ndarray,
    as_popular: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    width, rows = len(popularity), int(row[-1]) + 1
    target = items[back == 0]
    own = np.arange(rows) * width + target
    cells = row.astype(np.int64) * width + items
    seen = np.setdiff1d(cells[back > 0], own)  # a repeated target stays a candidate
    rank = as_popular[target] - _count_rows(
        seen[popularity[seen % width] >= popularity[target[seen // width]]], rows, width
    )

    recent = (back > 0) & (back <= WINDOW)
    near, score = _near(items[recent], row[recent], DECAY ** (back[recent] - 1.0), neighbours, width)
    unseen = ~np.isin(near, seen, assume_unique=True, kind="sort")
    near, score = near[unseen], score[unseen]
    # Popularity orders what the neighbours leave equal: too little to change anything else.
    score = score + popularity[near % width] / (popularity.sum() + 1) * 1e-6
    place = np.minimum(np.searchsorted(near, own), max(len(near) - 1, 0))
    found = near[place] == own if len(near) else np.zeros(rows, bool)
    own_score = np.where(found, score[place] if len(near) else 0, -np.inf)
    above = _count_rows(near[score >= own_score[near // width]], rows, width)
    # Without a score of its own the target stands among the rest, which popularity orders below all neighbours.
    popular = near[popularity[near % width] >= popularity[target[near // width]]]
    return rank, np.where(found, above, above + rank - _count_rows(popular, rows, width))


def _near(
    items: np.ndarray, row: np.ndarray, weight: np.ndarray, neighbours: tuple, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The cells (row x item) that any recent item is similar to, in order, and their scores."""
    starts, others, similarity = neighbours
    counts = starts[items + 1] - starts[items]
    # Every neighbour of every recent item, as one flat list of places in the compressed rows.
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - starts[items], counts)
    cells = np.repeat(row.astype(np.int64) * width, counts) + others[place]
    return _sum_equal(cells, similarity[place] * np.repeat(weight, counts))


def _count_rows(cells: np.ndarray, rows: int, width: int) -> np.ndarray:
    return np.bincount(cells // width, minlength=rows)
