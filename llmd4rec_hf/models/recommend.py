# SPDX-License-Identifier: Apache-2.0
"""From external item ids to external item ids: what a trained recommender is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import ConfigurationError, DataError, UnknownItemsError
from ..modes import evaluating
from .recommendations import Recommendations


class RecommendationMixin:
    """
    `recommend` and `similar_items` of every [`RecommenderModel`], by its vocabulary, `encode_last` and `item_matrix`.
    """

    @torch.no_grad()
    def recommend(
        self,
        histories: Sequence[Sequence],
        k: int = 10,
        *,
        filter_seen: bool = True,
        candidates: Iterable | None = None,
        on_unknown: str = "raise",
        batch_size: int = 256,
    ) -> Recommendations:
        """
        Best next items for histories of any user, known to the training or not.

        Args:
            histories (`Sequence[Sequence]`): external item ids per history, oldest first.
            k (`int`, *optional*, defaults to 10): how many items to recommend.
            filter_seen (`bool`, *optional*, defaults to `True`): leave out items of the history.
            candidates (`Iterable`, *optional*): external ids to choose from; all items by default.
            on_unknown (`str`, *optional*, defaults to `"raise"`): what to do with ids outside the vocabulary,
                `"raise"` or `"ignore"`; a history of which nothing is left then gets an empty list.
            batch_size (`int`, *optional*, defaults to 256): histories scored at a time.

        Returns:
            [`Recommendations`] on external ids.

        Raises:
            ConfigurationError: the model has no vocabulary, or `k` is not positive.
            DataError: a history that is no list, or an empty one, unless those are ignored.
            UnknownItemsError: an unknown item, unless they are ignored.
        """
        self._check_request(k)
        ids = [_id_list(history, f"History {index}") for index, history in enumerate(_id_list(histories, "histories"))]
        encoded = self._encode_histories(ids, on_unknown)
        answerable = [index for index, history in enumerate(encoded) if len(history) > 0]
        if on_unknown == "raise" and len(answerable) < len(encoded):
            empty = next(index for index, history in enumerate(encoded) if len(history) == 0)
            raise DataError(f"History {empty} is empty: there is nothing to recommend from.")
        allowed = self._candidate_mask(candidates, on_unknown)
        found = Recommendations([[] for _ in encoded], [[] for _ in encoded])
        with evaluating(self):
            item_matrix = self.item_matrix().float()
            for start in range(0, len(answerable), batch_size):
                rows = answerable[start : start + batch_size]
                best = self._recommend_batch([encoded[row] for row in rows], k, filter_seen, allowed, item_matrix)
                for row, (ids, scores) in zip(rows, best, strict=True):
                    found.ids[row], found.scores[row] = self.vocabulary.decode(ids), scores
        return found

    @torch.no_grad()
    def similar_items(
        self,
        item_ids: Sequence,
        k: int = 10,
        *,
        candidates: Iterable | None = None,
        on_unknown: str = "raise",
        batch_size: int = 256,
    ) -> Recommendations:
        """
        For each item the others that the model puts nearest to it: those that follow the same histories.

        Args:
            item_ids (`Sequence`): external item ids.
            k (`int`, *optional*, defaults to 10): how many to return for each.
            candidates (`Iterable`, *optional*): external ids to choose from; all items by default.
            on_unknown (`str`, *optional*, defaults to `"raise"`): what to do with ids outside the vocabulary,
                `"raise"` or `"ignore"`; an item that is ignored gets an empty list.
            batch_size (`int`, *optional*, defaults to 256): items compared with the catalogue at a time.

        Returns:
            [`Recommendations`] on external ids, one list per item and never the item itself. Scores are cosines of
            rows of the item matrix, in [-1, 1].

        Raises:
            ConfigurationError: the model has no vocabulary, or `k` is not positive.
            DataError: `item_ids` are no list.
            UnknownItemsError: an unknown item, unless it is ignored.
        """
        self._check_request(k)
        encoded = self._encode(_id_list(item_ids, "item_ids"), on_unknown)
        allowed = self._candidate_mask(candidates, on_unknown)
        with evaluating(self):
            directions = F.normalize(self.item_matrix().float(), dim=1)
        found = Recommendations([], [])
        for rows in torch.as_tensor(encoded, device=self.device).split(batch_size):
            cosines = directions[rows] @ directions.T
            cosines.masked_fill_(~allowed | (rows == 0).unsqueeze(1), -torch.inf)
            cosines.scatter_(1, rows.unsqueeze(1), -torch.inf)
            for ids, scores in _best(cosines, k):
                found.ids.append(self.vocabulary.decode(ids))
                found.scores.append(scores)
        return found

    def _check_request(self, k: int) -> None:
        if self.vocabulary is None:
            raise ConfigurationError(
                "This model has no item vocabulary, so it cannot read external ids: set `model.vocabulary`."
            )
        if k < 1:
            raise ConfigurationError(f"k must be at least 1, got {k}.")

    def _encode(self, item_ids: list, on_unknown: str) -> np.ndarray:
        """Internal ids in the places of external ones, 0 for those that are unknown and ignored."""
        if on_unknown not in ("raise", "ignore"):
            raise ConfigurationError(f"on_unknown must be 'raise' or 'ignore', got {on_unknown!r}.")
        try:
            return self.vocabulary.encode(item_ids, unknown="zero" if on_unknown == "ignore" else "raise")
        except UnknownItemsError as error:
            raise error.with_remedy("on_unknown='ignore' leaves them out.") from None

    def _encode_histories(self, histories: list[list], on_unknown: str) -> list[np.ndarray]:
        # All at once, because the vocabulary's index is built anew for every call.
        flat = self._encode([item for history in histories for item in history], on_unknown)
        ends = np.cumsum([len(history) for history in histories], dtype=np.int64)
        return [history[history > 0] for history in np.split(flat, ends)[:-1]]

    def _candidate_mask(self, candidates, on_unknown) -> torch.Tensor:
        allowed = torch.zeros(self.config.num_items + 1, dtype=torch.bool, device=self.device)
        if candidates is None:
            allowed[1:] = True
        else:
            chosen = self._encode(_id_list(candidates, "candidates"), on_unknown)
            allowed[torch.as_tensor(chosen, dtype=torch.long, device=self.device)] = True
            allowed[0] = False
        return allowed

    def _recommend_batch(self, histories, k, filter_seen, allowed, item_matrix):
        recent = [torch.as_tensor(history, dtype=torch.long)[-self.config.max_length :] for history in histories]
        item_ids = torch.nn.utils.rnn.pad_sequence(recent, batch_first=True).to(self.device)
        scores = self.encode_last(item_ids).float() @ item_matrix.T
        scores.masked_fill_(~allowed, -torch.inf)
        if filter_seen:
            for row, history in enumerate(histories):
                scores[row, torch.as_tensor(history, dtype=torch.long, device=self.device)] = -torch.inf
        return _best(scores, k)


def _best(scores: torch.Tensor, k: int) -> Iterator[tuple[list[int], list[float]]]:
    """Internal ids and scores of each row's `k` best items; fewer where others are left out, by a score of -inf."""
    values, indices = scores.topk(min(k, scores.shape[1]), dim=1)
    for row_values, row_indices in zip(values, indices, strict=True):
        kept = row_values.isfinite()
        yield row_indices[kept].tolist(), row_values[kept].tolist()


def _id_list(values, name: str) -> list:
    """`list(values)`, but not of a text, which would become a list of its letters."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise DataError(f"{name} must be a list, got {values!r}: one item is a list of one, ['B00001'].")
    return list(values)
