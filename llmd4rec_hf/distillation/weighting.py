# SPDX-License-Identifier: Apache-2.0
"""How much a student listens to its teacher, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..errors import ConfigurationError


class TargetOutcome(NamedTuple):
    """
    How a model does on the true items; what a weighting is a function of.

    Attributes:
        ranks (`torch.LongTensor` of shape `(P,)`): rank of the true item, 1 is best.
        log_probs (`torch.FloatTensor` of shape `(P,)`): its log-probability at the loss's temperature, in nats. `None`
            for `"rank"`, which asks for ranks alone.
    """

    ranks: torch.Tensor
    log_probs: torch.Tensor | None


def rank_weights(student_ranks: torch.Tensor, teacher_ranks: torch.Tensor, base: int = 1) -> torch.Tensor:
    r"""
    The paper's sample weights: a student listens where its teacher ranks the true item better.

    $$w = \mathrm{clip}\left(1 + \frac{r_s - r_t}{\max(r_t, 1)}, 0, 2\right) \text{ if } r_s > r_t, \text{ else }
    \mathrm{clip}\left(1 - \frac{r_t - r_s}{\max(r_s, 1)}, 0, 2\right)$$

    With the roles swapped the two weights of a sample always add up to 2; equal ranks give 1.

    Args:
        student_ranks (`torch.Tensor` of shape `(P,)`):
            1-based rank of the true item under the student.
        teacher_ranks (`torch.Tensor` of shape `(P,)`):
            1-based rank of the true item under the teacher.
        base (`int`, *optional*, defaults to 1):
            The rank of the best item inside the formula, 0 or 1. The paper does not say which; second against third
            place gives 1.5 with base 1 and 2.0 with base 0.

    Returns:
        `torch.Tensor` of shape `(P,)`: weights in [0, 2], float32.

    Raises:
        ConfigurationError: `base` is neither 0 nor 1.

    Source: LLMD4Rec (arXiv 2505.18120), sample-wise adaptive weights `w1` and `w2`.
    """
    if base not in (0, 1):
        raise ConfigurationError(f"rank_base must be 0 or 1, got {base!r}.")
    # Both branches of the paper are one expression: the difference over the better (smaller) of the two ranks.
    student, teacher = student_ranks.to(torch.float32), teacher_ranks.to(torch.float32)
    better = (torch.minimum(student, teacher) + (base - 1)).clamp_min_(1)
    return ((student - teacher) / better).add_(1).clamp_(0.0, 2.0)


def confidence_weights(student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
    """
    Smooth counterpart of [`rank_weights`]: `2 p_t / (p_t + p_s)` for the true item's probabilities.

    Like the rank weights, the two directions of a sample add up to 2 and equal models give 1, but the weight moves
    smoothly instead of jumping between 0 and 2 wherever ranks differ by a factor of two.

    Args:
        student_log_probs (`torch.Tensor` of shape `(P,)`): the true item's log-probability under the student, in nats.
        teacher_log_probs (`torch.Tensor` of shape `(P,)`): the true item's log-probability under the teacher, in nats.

    Returns:
        `torch.Tensor` of shape `(P,)`: weights in [0, 2].
    """
    return 2.0 * torch.sigmoid(teacher_log_probs - student_log_probs)


WEIGHTINGS: dict[str, Callable[[TargetOutcome, TargetOutcome], torch.Tensor]] = {
    "rank": lambda student, teacher: rank_weights(student.ranks, teacher.ranks),
    "confidence": lambda student, teacher: confidence_weights(student.log_probs, teacher.log_probs),
    "none": lambda student, teacher: torch.ones_like(student.log_probs),
}
# Those that look at no ranks, which then need not be counted.
WITHOUT_RANKS = ("confidence", "none")


def sample_weights(
    student: TargetOutcome, teacher: TargetOutcome, weighting: str = "rank", rank_base: int = 1
) -> torch.Tensor:
    """How much the student listens at each position, of shape `(P,)`, by the weighting of this name."""
    if weighting == "rank":  # the only one that has an argument
        return rank_weights(student.ranks, teacher.ranks, rank_base)
    return WEIGHTINGS[weighting](student, teacher)


def register_weighting(name: str, weighting: Callable[[TargetOutcome, TargetOutcome], torch.Tensor]) -> None:
    """
    Make a weighting of your own known by a name, which `distillation_loss`, the trainers' arguments and the command
    line then take as `weighting`.

    Args:
        name (`str`): not one that is taken.
        weighting (`Callable`): from the [`TargetOutcome`] of the student and that of the teacher to weights `(P,)`. No
            gradient flows through them.

    Raises:
        ConfigurationError: a name that is taken.

    Example:

    ```python
    >>> register_weighting("teacher_in_top_10", lambda student, teacher: (teacher.ranks <= 10).float())
    >>> MutualDistillArguments("llm", weighting="teacher_in_top_10")
    ```
    """
    if name in WEIGHTINGS and WEIGHTINGS[name] is not weighting:
        raise ConfigurationError(f"There is a weighting called {name!r} already: choose another name.")
    WEIGHTINGS[name] = weighting
