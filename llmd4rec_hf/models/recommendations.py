# SPDX-License-Identifier: Apache-2.0
"""What `recommend` and `similar_items` return, and the forms in which other tools read it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..errors import DataError


@dataclass
class Recommendations:
    """
    Best items per query (a history, or an item), best first.

    Attributes:
        ids (`list[list]`): external item ids, one list per query. Shorter than `k` where fewer items are left.
        scores (`list[list[float]]`): their scores, descending: logits of the model's next-item softmax, or cosines
            between items.
    """

    ids: list[list]
    scores: list[list[float]]

    def __len__(self) -> int:
        return len(self.ids)

    def to_pandas(self, user_ids: Sequence | None = None) -> pd.DataFrame:
        """
        One row per recommendation.

        Args:
            user_ids (`Sequence`, *optional*): the users that the histories are of. With them the frame is what
                RecTools' metrics read.

        Returns:
            `pandas.DataFrame` with the columns `history` (its index), or `user_id`, and `item_id`, `score`, `rank`
            (1-based).

        Raises:
            DataError: not one user id per history.
        """
        first = "history" if user_ids is None else "user_id"
        return pd.DataFrame(list(self._rows(user_ids)), columns=[first, "item_id", "score", "rank"])

    def to_run(self, user_ids: Sequence | None = None) -> dict[str, dict[str, float]]:
        """
        Scores by user and item, all ids as strings: `ranx.Run(recommendations.to_run(user_ids))`.

        Users without a recommendation are there too, with an empty dictionary, so that they count in a mean.

        Args:
            user_ids (`Sequence`, *optional*): the users that the histories are of; their index by default.

        Raises:
            DataError: not one user id per history, or a user that is there twice.
        """
        users = [str(user) for user in self._users(user_ids)]
        if len(set(users)) < len(users):
            raise DataError("A run has one entry per user, and user_ids holds a user twice.")
        run: dict[str, dict[str, float]] = {user: {} for user in users}
        for user, item_id, score, _ in self._rows(user_ids):
            run[str(user)][str(item_id)] = score
        return run

    def save_trec(
        self, path: str | os.PathLike, user_ids: Sequence | None = None, run_name: str = "llmd4rec_hf"
    ) -> None:
        """
        Write a TREC run: `user Q0 item rank score run_name` per line, as trec_eval, ranx and others read it.

        Args:
            path (`str`): the file.
            user_ids (`Sequence`, *optional*): the users that the histories are of; their index by default.
            run_name (`str`, *optional*, defaults to `"llmd4rec_hf"`): the last column.

        Raises:
            DataError: not one user id per history, or an id with a space in it, which the format cannot hold.
        """
        lines = []
        for user, item_id, score, rank in self._rows(user_ids):
            lines.append(f"{trec_word(user)} Q0 {trec_word(item_id)} {rank} {score!r} {trec_word(run_name)}\n")
        Path(path).write_text("".join(lines), encoding="utf-8")

    def _rows(self, user_ids: Sequence | None) -> Iterator[tuple]:
        for user, ids, scores in zip(self._users(user_ids), self.ids, self.scores, strict=True):
            for rank, (item_id, score) in enumerate(zip(ids, scores, strict=True), start=1):
                yield user, item_id, score, rank

    def _users(self, user_ids: Sequence | None) -> Sequence:
        if user_ids is None:
            return range(len(self))
        if len(user_ids) != len(self):
            raise DataError(f"{len(user_ids)} user ids for {len(self)} histories: give one per history.")
        return user_ids


def save_qrels(path: str | os.PathLike, user_ids: Sequence, item_ids: Sequence) -> None:
    """
    Write the true items as TREC qrels: `user 0 item 1` per line, the other half of what metrics are computed from.

    Args:
        path (`str`): the file.
        user_ids (`Sequence`): the users.
        item_ids (`Sequence`): the external id of the one true item of each.

    Raises:
        DataError: not one item per user, or an id with a space in it.
    """
    if len(user_ids) != len(item_ids):
        raise DataError(f"{len(item_ids)} true items for {len(user_ids)} users: give one per user.")
    lines = [f"{trec_word(user)} 0 {trec_word(item)} 1\n" for user, item in zip(user_ids, item_ids, strict=True)]
    Path(path).write_text("".join(lines), encoding="utf-8")


def trec_word(value: object) -> str:
    """An id as it stands in a TREC file; one with a space in it is a `DataError`."""
    text = str(value)
    if text.split() != [text]:
        raise DataError(
            f"{text!r} cannot stand in a TREC file, whose columns are parted by spaces: take ids without spaces, or "
            "write no such file."
        )
    return text
