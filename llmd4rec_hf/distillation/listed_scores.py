# SPDX-License-Identifier: Apache-2.0
"""What a black box says of a position: its best items, and by that how much is left for all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ConfigurationError


# The logarithm of 0. Not minus infinity: times a probability of 0 that is not a number, nor is the difference of two.
LOG_ZERO = -1e30
# What a list may leave over by rounding alone. Spread over a large catalogue and softened by a temperature, it would
# weigh more than the list itself.
_ROUNDING = 1e-6


@dataclass
class ListedScores:
    r"""
    A teacher's distributions over all N items, each given by the log-probabilities of some items.

    What the listed ones leave of the probability, $m = 1 - \sum_i p_i$, is spread evenly over the items that are not
    listed. So this is a distribution over the whole catalogue, from which KL, ranks, temperature and weights follow as
    from any other; renormalised to 1, the lists of a recommender, whose softmax is flat, would claim much more than it
    said. Less than 1e-6 left over counts as rounding: all other items then have the probability 0.

    All items that are not listed tie, and ties count against the true item: if it is one of them, its rank is N (but
    for listed items that are less probable still). The rank weights then tell the student not to listen, since about
    that item the teacher has said nothing.

    Args:
        ids (`torch.LongTensor` of shape `(P, k)`): different items of 1..N; 0 fills up a shorter list.
        log_probs (`torch.Tensor` of shape `(P, k)`): their log-probabilities over the whole catalogue, in nats, at
            the temperature 1; of any value where `ids` is 0.

    Raises:
        ConfigurationError: two shapes that differ, or are not of this form.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor

    def __post_init__(self):
        if self.ids.dim() != 2 or not self.ids.shape[1] or self.ids.shape != self.log_probs.shape:
            raise ConfigurationError(
                f"ids and log_probs must both be (P, k), with a k of at least 1, got {tuple(self.ids.shape)} and "
                f"{tuple(self.log_probs.shape)}."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, positions) -> ListedScores:
        """The lists of some positions, which a slice, a mask or an index names."""
        return ListedScores(self.ids[positions], self.log_probs[positions])

    def rest(self, num_items: int) -> torch.Tensor:
        """
        The log-probability of each item that is not listed.

        Args:
            num_items (`int`): number of items N of the catalogue.

        Returns:
            `torch.FloatTensor` of shape `(P, 1)`, in nats.
        """
        listed = self.ids > 0
        mass = 1 - self.log_probs.float().exp().masked_fill(~listed, 0).sum(dim=1, keepdim=True)
        others = (num_items - listed.sum(dim=1, keepdim=True)).clamp_min(1)
        return (mass / others).log().where(mass > _ROUNDING, LOG_ZERO)

    def dense(self, num_items: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """
        The log-probability of every item.

        Args:
            num_items (`int`): number of items N of the catalogue.
            out (`torch.FloatTensor` of shape `(P, N + 1)`, *optional*): where to write them; column 0 is padding.

        Returns:
            `torch.FloatTensor` of shape `(P, N)`, in nats.
        """
        out = self.log_probs.new_empty(len(self), num_items + 1, dtype=torch.float32) if out is None else out
        # What fills up a list goes into the column of padding.
        out.copy_(self.rest(num_items)).scatter_(1, self.ids, self.log_probs.float().clamp_min(LOG_ZERO))
        return out[:, 1:]

    def at(self, items: torch.Tensor, num_items: int) -> torch.Tensor:
        """
        The log-probabilities of some items of each position.

        Args:
            items (`torch.LongTensor` of shape `(P, m)`): items of 1..N.
            num_items (`int`): number of items N of the catalogue.

        Returns:
            `torch.FloatTensor` of shape `(P, m)`, in nats.
        """
        ids, order = self.ids.sort(dim=1)
        place = torch.searchsorted(ids, items).clamp_max(ids.shape[1] - 1)
        listed = self.log_probs.float().clamp_min(LOG_ZERO).gather(1, order.gather(1, place))
        return listed.where(ids.gather(1, place) == items, self.rest(num_items))
