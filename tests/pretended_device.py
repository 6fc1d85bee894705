# SPDX-License-Identifier: Apache-2.0
"""
A device that is not there: tensors that say they are on a GPU and hold their numbers on the CPU.

What a GPU would refuse, they refuse: tensors of two devices in one operation, its indices for a tensor on the CPU,
random numbers of the CPU's generator, numpy. So code that mixes devices fails where there is no GPU too. Kernels,
memory, streams and speed are the CPU's: of those nothing is learned here. But `waits` holds every operation so far for
which a GPU would have been waited for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from transformers import TrainingArguments


DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
# What goes from one device to another by itself.
_COPIES = {aten.copy_.default, aten._to_copy.default}
# Of which the indices may be a CPU's.
_INDEXING = {
    *(aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default),
    *(aten._index_put_impl_.default, aten._unsafe_index_put.default),
}
# What reads memory by its address.
_OF_MEMORY = {
    *(torch.Tensor.tolist, torch.Tensor.data_ptr, torch.Tensor.storage, torch.Tensor.untyped_storage),
    torch.Tensor.__reduce_ex__,
}
# What waits until a GPU has done all that it was given, since it has to know the result.
_WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, torch.Tensor.tolist}
waits: list[str] = []


class DeviceTensor(torch.Tensor):
    """A tensor that says it is on `DEVICE`. Its numbers are in `content`, a plain tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, content: torch.Tensor):
        facts = {name: getattr(content, name) for name in ("dtype", "layout", "device")}
        strides, offset = content.stride(), content.storage_offset()
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, content.shape, strides=strides, storage_offset=offset, **facts
        )
        tensor.content = content
        return tensor

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self):
        return f"DeviceTensor({self.content})"

    # By these torch takes it for a subclass that only wraps.
    def __tensor_flatten__(self):
        return ["content"], None

    @staticmethod
    def __tensor_unflatten__(parts, *_):
        return DeviceTensor(parts["content"])

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        _refuse_a_mixture(operation, args, kwargs)
        if operation in _WAITING or (operation in _INDEXING and _has_a_mask(args[1])):
            waits.append(str(operation))
        contents = operation(*tree_map(_content, args), **tree_map(_content, kwargs))
        return return_and_correct_aliasing(operation, args, kwargs, tree_map(_on_device, contents))


def _content(value):
    return value.content if isinstance(value, DeviceTensor) else value


def _has_a_mask(indices) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


def _on_device(value):
    is_plain = isinstance(value, torch.Tensor) and not isinstance(value, DeviceTensor)
    return DeviceTensor(value) if is_plain else value


def _refuse_a_mixture(operation, args, kwargs) -> None:
    if operation in _COPIES:
        return
    if operation in _INDEXING:
        if not isinstance(args[0], DeviceTensor):
            raise RuntimeError(f"{operation}: indices are on {DEVICE}, the tensor is on the CPU")
        args = (args[0], *args[2:])
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, torch.Generator):
            raise RuntimeError(f"{operation}: expected a generator of {DEVICE}, found one of the CPU")
        # A single number may come from anywhere.
        if isinstance(value, torch.Tensor) and not isinstance(value, DeviceTensor) and value.dim() > 0:
            raise RuntimeError(f"{operation}: expected all tensors on {DEVICE}, one of {tuple(value.shape)} is not")


class _Calls(TorchFunctionMode):
    """Lets calls that name the device make and move tensors, which a torch without CUDA refuses."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.to:
            return _moved(*args, **kwargs)
        if function in (torch.Tensor.cpu, torch.Tensor.cuda):
            return _moved(args[0], "cpu" if function is torch.Tensor.cpu else DEVICE)
        if function in (torch.Tensor.numpy, torch.Tensor.__array__) and isinstance(args[0], DeviceTensor):
            raise TypeError(f"can't convert a tensor on {DEVICE} to numpy: copy it to the CPU first")
        if function in _OF_MEMORY:
            if function in _WAITING and isinstance(args[0], DeviceTensor):
                waits.append("tolist")
            return function(*map(_content, args), **kwargs)
        if function is F.scaled_dot_product_attention:
            with self:
                return _attention(*args, **kwargs)
        if "device" in kwargs and _is_device(kwargs["device"]):
            return _Move.apply(function(*args, **{**kwargs, "device": "cpu"}), DEVICE)
        return function(*args, **kwargs)


def _is_device(device) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _moved(tensor: torch.Tensor, *args, copy: bool = False, **kwargs) -> torch.Tensor:
    """`tensor.to(...)`."""
    if args and isinstance(args[0], torch.Tensor):  # as which other one
        args = args[0].device, args[0].dtype, *args[1:]
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    with torch._C.DisableTorchFunction():
        tensor = tensor.to(tensor.dtype if dtype is None else dtype, copy=copy)
    here = isinstance(tensor, DeviceTensor)
    return tensor if device is None or _is_device(device) == here else _Move.apply(tensor, device)


class _Move(torch.autograd.Function):
    """A copy on the other device."""

    @staticmethod
    def forward(ctx, tensor, device):
        ctx.came_from = tensor.device
        content = _content(tensor).detach().clone()
        if not _is_device(device):
            waits.append("copy to the CPU")
        return DeviceTensor(content) if _is_device(device) else content

    @staticmethod
    def backward(ctx, gradient):
        content = _content(gradient)
        return DeviceTensor(content) if _is_device(ctx.came_from) else content, None


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """In place of torch's own, which makes its mask on the CPU, where it believes the tensors to be."""
    if enable_gqa:
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = scores + attn_mask if attn_mask.is_floating_point() else scores.masked_fill(~attn_mask, -torch.inf)
    return F.dropout(scores.softmax(dim=-1), dropout_p) @ value


class _Autocast(torch.autocast):
    """The CPU's, whoever asks for it: that is where operations are carried out."""

    def __init__(self, device_type: str, *args, **kwargs):
        super().__init__("cpu", *args, **kwargs)


@contextlib.contextmanager
def pretended_device() -> Iterator[torch.device]:
    """Inside, `.to(device)` works for the device that is given out, and trainers believe they were given it."""
    of_arguments = property(lambda args: (args._setup_devices, DEVICE)[1])  # which its processes need to have set up
    asks = {name: getattr(torch, name) for name in ("is_autocast_enabled", "get_autocast_dtype")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(TrainingArguments, "device", of_arguments))
        stack.enter_context(mock.patch("transformers.training_args.is_torch_bf16_gpu_available", lambda: True))
        stack.enter_context(mock.patch.object(Accelerator, "device", property(lambda accelerator: DEVICE)))
        stack.enter_context(mock.patch.object(torch, "autocast", _Autocast))
        stack.enter_context(mock.patch.object(torch.backends.cudnn, "is_acceptable", lambda tensor: False))
        for name, ask in asks.items():
            stack.enter_context(mock.patch.object(torch, name, lambda device_type, ask=ask: ask("cpu")))
        stack.enter_context(_Calls())
        yield DEVICE
