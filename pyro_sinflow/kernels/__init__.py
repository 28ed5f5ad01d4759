"""Element-wise maps, evaluated by the fastest means that the tensors allow.

Plain tensors take a fused implementation, with one node in the graph and its gradient in closed
form: few numbers on a CPU by numpy, whose calls take less time, all else by torch. Whatever looks
at more than values and reverse differentiation (``torch.compile``, ``torch.func``, forward mode,
batched gradients, ``torch.jit.trace``, tensor subclasses) takes plain operations of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from .._torch import can_fuse, honours_torch_function, vjp, without_autocast
from ..arrays import NUMPY, TORCH, Array

R = TypeVar("R")

_FEW = 2**16  # elements of temporaries, up to which numpy is faster where parameters are shared
_BLOCK = 2**22  # elements, up to which temporaries stay in the processor's cache


class Kernel(Protocol):
    """An element-wise map of numbers, given parameters."""

    event_dim: int  # the number of dimensions of the parameters of one number

    def plain(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Returns value and log-slope, in operations that torch can transform."""

    def forward(
        self, x: Array, parameters: Array, xp: SimpleNamespace
    ) -> tuple[Array, Array, Sequence[Array]]:
        """Returns value, log-slope and what the backward pass needs, of arrays without a graph."""

    def backward(
        self,
        saved: Sequence[Array],
        x: Array,
        parameters: Array,
        gy: Array,
        gl: Array,
        xp: SimpleNamespace,
    ) -> tuple[Array, Array]:
        """Returns the cotangents of numbers and parameters, given those of value and log-slope."""


def broadcast(kernel: Kernel, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Expands numbers and parameters until the former end with the batch shape of the latter."""
    cut = parameters.ndim - kernel.event_dim
    batch, event = parameters.shape[:cut], parameters.shape[cut:]
    if x.shape[max(x.ndim - cut, 0) :] == batch:
        return x, parameters
    while batch and batch[0] == 1:
        batch = batch[1:]
    shape = torch.broadcast_shapes(x.shape, batch)
    if shape[len(shape) - len(batch) :] == batch:
        return x.expand(shape), parameters.reshape(*batch, *event)
    return x.expand(shape), parameters.expand(*shape, *event)


def run(function: Callable[..., R], kernel: Kernel, *tensors: Tensor) -> R:
    """Calls a function of arrays without a graph, and of the library for them.

    Args:
        function: The function.
        kernel: The map.
        tensors: The numbers, the parameters, and others.
    """
    x, parameters, *_ = tensors
    own = x.ndim == parameters.ndim - kernel.event_dim
    size = x.numel() * parameters.shape[-1]
    if x.device.type == "cpu" and size <= (_FEW >> 3 if own else _FEW):
        with np.errstate(all="ignore"):
            return function(*[t.detach().numpy() for t in tensors], xp=NUMPY)
    with without_autocast(x):
        return function(*[t.detach() for t in tensors], xp=TORCH)


def tensor(array: Array) -> Tensor:
    """Returns an array as a tensor."""
    return array if isinstance(array, Tensor) else torch.from_numpy(array)


class _Evaluate(Function):
    """Value and log-slope of a map."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj, saved = forward(kernel, x, parameters)
        # Tensors are saved where hooks, such as those of checkpoints, find them.
        many = isinstance(saved[0], Tensor)
        ctx.save_for_backward(x, parameters, *(saved if many else ()))
        ctx.kernel, ctx.arrays = kernel, None if many else saved
        ctx.set_materialize_grads(False)
        return y, ladj

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, gl: Tensor | None) -> tuple[Tensor | None, ...]:
        if gy is None and gl is None:
            return None, None, None
        x, parameters, *saved = ctx.saved_tensors
        gy = torch.zeros_like(x) if gy is None else gy
        gl = torch.zeros_like(x) if gl is None else gl
        if torch.is_grad_enabled() or not can_fuse(gy, gl):
            return None, *vjp(ctx.kernel.plain, (x, parameters), (gy, gl))
        return None, *backward(ctx.kernel, ctx.arrays or saved, x, parameters, gy, gl)


def forward(
    kernel: Kernel, x: Tensor, parameters: Tensor
) -> tuple[Tensor, Tensor, Sequence[Array]]:
    """Returns value and log-slope without a graph, and what :func:`backward` needs."""
    y, ladj, saved = run(kernel.forward, kernel, x, parameters)
    return tensor(y), tensor(ladj), saved


def backward(kernel: Kernel, saved: Sequence[Array], *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the cotangents of numbers and parameters, given those of value and log-slope.

    The tensors are numbers, parameters, and both cotangents.
    """
    gx, grad = run(partial(kernel.backward, saved), kernel, *tensors)
    return tensor(gx), tensor(grad)


def _blocks(kernel: Kernel, x: Tensor, parameters: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Splits numbers, and their parameters if they have their own, into blocks of rows."""
    cut = parameters.ndim - kernel.event_dim
    batch, event = parameters.shape[:cut], parameters.shape[cut:]
    own = x.ndim == cut
    shape = batch[-1:] if own else batch
    rows = x.reshape(-1, *shape)
    length = max(1, _BLOCK * len(rows) // (x.numel() * prod(event)))
    if own:
        parts = parameters.reshape(-1, *shape, *event).split(length)
        return [*zip(rows.split(length), parts, strict=True)]
    return [(part, parameters) for part in rows.split(length)]


@honours_torch_function
def evaluate(kernel: Kernel, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Returns value and log-slope of a map.

    Args:
        kernel: The map.
        x: The numbers, with shape (*).
        parameters: The parameters, whose batch shape broadcasts with that of the numbers.
    """
    x, parameters = broadcast(kernel, x, parameters)
    if not x.numel():
        empty = x + parameters.sum()
        return empty, empty
    if not can_fuse(x, parameters):
        return kernel.plain(x, parameters)
    if x.numel() * prod(parameters.shape[-kernel.event_dim :]) > _BLOCK:
        blocks = [evaluate(kernel, *block) for block in _blocks(kernel, x, parameters)]
        if len(blocks) > 1:
            y, ladj = (torch.cat(parts).view(x.shape) for parts in zip(*blocks, strict=True))
            return y, ladj
    if torch.is_grad_enabled() and (x.requires_grad or parameters.requires_grad):
        return _Evaluate.apply(kernel, x, parameters)
    return forward(kernel, x, parameters)[:2]
