"""Chains of sinusoids, evaluated and inverted by the fastest implementation that is available.

Plain tensors use a fused implementation, with one node in the graph and its gradient in closed
form: kernels of Triton on a GPU, if Triton is installed; numpy for small arrays on a CPU, because
its calls have less overhead; torch otherwise. Plain operations of torch are used for
``torch.compile``, ``torch.func``, forward mode, batched gradients, ``torch.jit.trace``, ``make_fx``
and tensor subclasses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from math import prod
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from .._torch import can_branch_on, can_fuse, honours_torch_function, vjp, without_autocast
from ..arrays import NUMPY, PLAIN, TORCH, Array
from ..solvers import Solver, report
from . import eager

R = TypeVar("R")

ACTIVATIONS = ("ReLU", "ELU", "SiLU", "Tanh")  # that the kernel of forward substitution supports

_NUMPY = 2**16  # largest temporary for which numpy is faster, if parameters are shared
_BLOCK = 2**22  # elements of temporaries that fit in the processor's cache


class AffineChain(NamedTuple):
    """An affine map and a chain of sinusoids after it, which kernels can invert.

    Its parameters are the shift, the log-scale and those of the sinusoids. If there are no
    sinusoids, the log-scale can be missing.

    Args:
        log_max: The largest log-scale.
        sinusoids: The number of sinusoids, and that of their components.
        min_slope: The smallest slope of each sinusoid.
        solver: How the sinusoids are inverted.
    """

    log_max: float = 1.0
    sinusoids: tuple[int, int] = (0, 1)
    min_slope: float = 0.5
    solver: Solver = Solver()


class Schedule(NamedTuple):
    """When the units of a masked network are computed by the kernel of forward substitution.

    Args:
        activation: The name of the activation, one of :data:`ACTIVATIONS`.
        known: The number of inputs of each layer that are known before each feature, with shape
            (layers, D), as 32-bit integers.
        places: The number of inputs of each layer, and the places of its inputs among those of all
            layers, of its weights and of its biases, with shape (layers, 4), as 64-bit integers.
    """

    activation: str
    known: Tensor
    places: Tensor


@honours_torch_function
def evaluate(x: Tensor, parameters: Tensor, min_slope: float) -> tuple[Tensor, Tensor]:
    """Returns value and log-slope of a chain.

    The batch shape of the unconstrained parameters broadcasts with the shape of the numbers.
    """
    x, parameters = _broadcast(x, parameters)
    if not x.numel():
        empty = x + parameters.sum()
        return empty, empty
    if not can_fuse(x, parameters):
        return eager.differentiable(x, parameters, min_slope)
    if x.numel() * prod(parameters.shape[-2:]) > _BLOCK and not _triton(x, parameters):
        blocks = _blocks(x, parameters)
        if len(blocks) > 1:  # a single row may be larger
            results = [evaluate(*block, min_slope) for block in blocks]
            y, ladj = (torch.cat(parts).view(x.shape) for parts in zip(*results, strict=True))
            return y, ladj
    if torch.is_grad_enabled() and (x.requires_grad or parameters.requires_grad):
        return _Evaluate.apply(x, parameters, min_slope)
    return _forward(x, parameters, min_slope, False)[:2]


@honours_torch_function
def invert(y: Tensor, parameters: Tensor, min_slope: float, solver: Solver) -> Tensor:
    """Returns the numbers at which a chain has the values y, with arguments as :func:`evaluate`."""
    y, parameters = _broadcast(y, parameters)
    if not y.numel():
        return y + parameters.sum()
    if not can_fuse(y, parameters):
        return _invert_plain(y, parameters, min_slope, solver)
    if torch.is_grad_enabled() and (y.requires_grad or parameters.requires_grad):
        return _Invert.apply(y, parameters, min_slope, solver)
    return _root(y, parameters, min_slope, solver)


def _broadcast(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Expands numbers and parameters until the former end with the batch shape of the latter."""
    cut = parameters.ndim - 2
    batch, event = parameters.shape[:cut], parameters.shape[cut:]
    if x.shape[max(x.ndim - cut, 0) :] == batch:
        return x, parameters
    shape = torch.broadcast_shapes(x.shape, batch)
    while batch and batch[0] == 1:
        batch = batch[1:]
    if shape[len(shape) - len(batch) :] == batch:
        return x.expand(shape), parameters.reshape(*batch, *event)
    return x.expand(shape), parameters.expand(*shape, *event)


def _blocks(x: Tensor, parameters: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Splits numbers, and their parameters if they have their own, into blocks of rows."""
    *batch, m, size = parameters.shape
    own = x.ndim == len(batch)
    shape = batch[-1:] if own else batch
    rows = x.reshape(-1, *shape)
    length = max(1, _BLOCK * len(rows) // (x.numel() * m * size))
    if own:
        parts = parameters.reshape(-1, *shape, m, size).split(length)
        return [*zip(rows.split(length), parts, strict=True)]
    return [(part, parameters) for part in rows.split(length)]


@cache
def load(name: str, device: torch.device) -> ModuleType | None:
    """Returns a file of Triton kernels if a first launch on the device succeeds."""
    try:
        kernels = import_module(f".{name}", __name__)
    except ImportError:
        return None
    try:
        kernels.probe(device)
    except Exception as error:  # such as no C compiler, or a GPU that is too old
        warnings.warn(f"The Triton kernels failed and are not used: {error}", stacklevel=2)
        return None
    return kernels


def _triton(x: Tensor, parameters: Tensor) -> ModuleType | None:
    """Returns the kernels of a chain if they support these tensors."""
    if not x.is_cuda or parameters.device != x.device or parameters.dtype != x.dtype:
        return None
    return load("triton", x.device) if x.dtype in (torch.float32, torch.float64) else None


def substitution_kernel(y: Tensor) -> ModuleType | None:
    """Returns the kernel of forward substitution if it supports this tensor."""
    if not y.is_cuda or y.dtype not in (torch.float32, torch.float64):
        return None
    return load("substitution", y.device)


def _run(function: Callable[..., R], *tensors: Tensor) -> R:
    """Calls a function of arrays without a graph, with numpy or torch, whichever is faster.

    Args:
        function: The function, which takes the library as ``xp``.
        tensors: The numbers, the parameters, and others.
    """
    x, parameters, *_ = tensors
    own = x.ndim == parameters.ndim - 2
    size = x.numel() * parameters.shape[-1]
    if x.device.type == "cpu" and size <= (_NUMPY >> 3 if own else _NUMPY):
        with np.errstate(all="ignore"):
            # Tensor.numpy() would fix the size of the storage, which FSDP changes.
            return function(*[np.from_dlpack(t.detach().resolve_neg()) for t in tensors], xp=NUMPY)
    with without_autocast(x):
        return function(*[t.detach() for t in tensors], xp=TORCH)


def _tensor(array: Array) -> Tensor:
    return array if isinstance(array, Tensor) else torch.from_numpy(array)


def _forward(
    x: Tensor, parameters: Tensor, min_slope: float, save: bool = True
) -> tuple[Tensor, Tensor, Sequence[Array]]:
    """Returns value and log-slope without a graph, and what to save for the gradient."""
    if gpu := _triton(x, parameters):
        return gpu.forward(x, parameters, min_slope=min_slope, save=save)
    y, ladj, saved = _run(partial(eager.forward, min_slope=min_slope), x, parameters)
    return _tensor(y), _tensor(ladj), saved


def _backward(saved: Sequence[Array], min_slope: float, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the cotangents of numbers and parameters, given those of value and log-slope.

    The tensors are numbers, parameters, and both cotangents.
    """
    if gpu := _triton(*tensors[:2]):
        return gpu.backward(*tensors, saved=saved, min_slope=min_slope)
    gx, grad = _run(partial(eager.backward, saved=saved, min_slope=min_slope), *tensors)
    return _tensor(gx), _tensor(grad)


def _root(y: Tensor, parameters: Tensor, min_slope: float, solver: Solver) -> Tensor:
    """Returns the root without a graph, and reports it unless a CUDA graph is captured."""
    if gpu := _triton(y, parameters):
        x, roots = gpu.invert(y, parameters, min_slope=min_slope, solver=solver)
    else:
        x, roots = _run(partial(eager.invert, min_slope=min_slope, solver=solver), y, parameters)
    if can_branch_on(y):
        report(roots, y.numel(), solver, torch.finfo(y.dtype).eps)
    return _tensor(x)


class _Evaluate(Function):
    """Value and log-slope of a chain."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameters: Tensor, min_slope: float) -> tuple[Tensor, Tensor]:
        y, ladj, saved = _forward(x, parameters, min_slope)
        # Tensors are saved by save_for_backward, so that hooks such as those of checkpoints see
        # them.
        are_tensors = isinstance(saved[0], Tensor)
        ctx.save_for_backward(x, parameters, *(saved if are_tensors else ()))
        ctx.min_slope, ctx.arrays = min_slope, None if are_tensors else saved
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
            function = partial(eager.differentiable, min_slope=ctx.min_slope)
            return *vjp(function, (x, parameters), (gy, gl)), None
        return *_backward(ctx.arrays or saved, ctx.min_slope, x, parameters, gy, gl), None


class _Invert(Function):
    """The root x of f(x) = y, with derivatives by the implicit function theorem."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, parameters: Tensor, min_slope: float, solver: Solver
    ) -> Tensor:
        x = _root(y, parameters, min_slope, solver)
        ctx.save_for_backward(x, parameters)
        ctx.min_slope = min_slope
        ctx.set_materialize_grads(False)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None, None
        min_slope, (x, parameters) = ctx.min_slope, ctx.saved_tensors
        if torch.is_grad_enabled() or not can_fuse(g):
            # The saved root is an output of this node, so higher orders differentiate through it.
            gy = g * (-evaluate(x, parameters, min_slope)[1]).exp()

            def value(parameters: Tensor) -> tuple[Tensor]:
                return (evaluate(x, parameters, min_slope)[0],)

            return gy, *vjp(value, (parameters,), (-gy,)), None, None
        _, ladj, saved = _forward(x, parameters, min_slope)
        gy = g * (-ladj).exp()
        _, grad = _backward(saved, min_slope, x, parameters, -gy, torch.zeros_like(gy))
        return gy, grad, None, None


def _invert_plain(y: Tensor, parameters: Tensor, min_slope: float, solver: Solver) -> Tensor:
    """Finds the root without a graph, then takes Newton steps with one for the derivatives."""
    x, roots = eager.invert(
        y.detach(), parameters.detach(), min_slope=min_slope, solver=solver, xp=PLAIN
    )
    if can_branch_on(y, parameters):
        report(roots, y.numel(), solver, torch.finfo(y.dtype).eps)
    for _ in range(3):  # each step squares the error, so that n steps have 2^n - 1 derivatives
        value, ladj = eager.differentiable(x, parameters, min_slope)
        x = x - (value - y) * (-ladj).exp()
    return x
