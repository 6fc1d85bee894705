# SPDX-License-Identifier: Apache-2.0
"""Training where a step's gradient reaches only some rows of the item matrix: its cost is theirs alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from transformers import TrainingArguments

from ..errors import ConfigurationError


OPTIMIZERS_BY_ROWS = ("adamw_torch", "adamw_torch_fused")
# Of torch's own.
GIVEN_OPTIMIZERS_BY_ROWS = (torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam)


class RowAdamW(torch.optim.AdamW):
    """
    [`~torch.optim.AdamW`] that takes a sparse gradient row by row: rows whose gradient is absent or zero are not read,
    and neither their weights nor their moments move. Everything else is updated as by AdamW, and the state is laid out
    like AdamW's.

    The steps that correct the moments' bias are counted per parameter, not per row, as in
    [`~torch.optim.SparseAdam`]. Rows are not decayed.

    Args:
        params (`Iterable`): parameters or groups of them.
        lr (`float`, *optional*, defaults to 1e-3): learning rate.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`): decay rates of the moments.
        eps (`float`, *optional*, defaults to 1e-8): added to the root of the second moment.
        weight_decay (`float`, *optional*, defaults to 0.0): of parameters with a dense gradient.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        by_rows = [(p, p.grad, group) for group in self.param_groups for p in group["params"] if _is_sparse(p.grad)]
        for parameter, gradient, group in by_rows:
            self._update_rows(parameter, gradient.coalesce(), group)
            parameter.grad = None  # out of AdamW's sight
        super().step()
        for parameter, gradient, _ in by_rows:
            parameter.grad = gradient
        return loss

    def _update_rows(self, parameter, gradient, group) -> None:
        rows, values, state = gradient.indices()[0], gradient.values(), self.state[parameter]
        # What is looked up but bears no label, such as rows that only fill up a process's batch, is not to count.
        counts = values.any(dim=1)
        rows, values = rows[counts], values[counts]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        (beta1, beta2), step = group["betas"], state["step"].item()
        mean = state["exp_avg"][rows].lerp_(values, 1 - beta1)
        square = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(values, values, value=1 - beta2)
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = mean, square
        root = square.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        parameter.index_add_(0, rows, mean.div_(root), alpha=-group["lr"] / (1 - beta1**step))


def with_row_values(parameters: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """
    Parameters for a function that knows dense gradients alone, such as clipping: in place of one with a sparse
    gradient comes a tensor whose gradient are the values of its rows, in the same memory.
    """
    for parameter in parameters:
        if not _is_sparse(parameter.grad):
            yield parameter
            continue
        # The rows of an item that occurs twice count by their sum.
        parameter.grad = parameter.grad.coalesce()
        stand_in = torch.empty_like(parameter.grad.values())
        stand_in.grad = parameter.grad.values()
        yield stand_in


def check_sparse_gradients(args: TrainingArguments, in_shards: bool, optimizer: type) -> None:
    """
    Refuse arguments under which training cannot update the item matrix by rows.

    Args:
        args ([`~transformers.TrainingArguments`]): the arguments.
        in_shards (`bool`): under FSDP or DeepSpeed.
        optimizer (`type`): the kind of a given optimizer, that of `None` if there is none.

    Raises:
        ConfigurationError: it cannot, because of its devices or its optimizer.
    """
    over_gloo = args.world_size == 1 or torch.distributed.get_backend() == "gloo"
    if in_shards or args.n_gpu > 1 or not over_gloo:
        raise ConfigurationError(
            "num_sampled_items gives the item matrix a sparse gradient, which works in one process and in several "
            "over gloo, but not over NCCL, in DataParallel, FSDP or DeepSpeed: train on one device, or leave it out."
        )
    if args.optim not in OPTIMIZERS_BY_ROWS:
        raise ConfigurationError(
            f"num_sampled_items updates the item matrix by rows, for which optim must be one of "
            f"{OPTIMIZERS_BY_ROWS}, got {args.optim.value!r}."
        )
    if optimizer.__module__.startswith("torch.optim") and optimizer not in GIVEN_OPTIMIZERS_BY_ROWS:
        raise ConfigurationError(
            f"num_sampled_items gives the item matrix a sparse gradient, which {optimizer.__name__} does not take: "
            "give llmd4rec_hf.training.sparse_rows.RowAdamW in its place, or no optimizer."
        )


def _is_sparse(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and gradient.is_sparse
