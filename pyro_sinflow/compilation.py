"""Kernels that ``torch.compile`` fuses, for those who ask for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from ._checks import autocasting, check_flag, readable

C = TypeVar("C", bound=Callable[..., Any])

_OLDEST = "2.11"  # that has been seen to compile them

_backend: str | Callable[..., Any] | None = None  # None where kernels are not compiled


def compile_kernels(enabled: bool = True, backend: str | Callable[..., Any] = "inductor") -> None:
    """Turns on, or off, for the whole process, that compiled kernels evaluate and invert sinusoids.

    A chain of sinusoids is many small operations, which ``torch.compile`` fuses into a few. The
    autoregressive conditioner gains the most: its samples take half the time. Where
    ``torch.compile`` can have the whole loss, let it have that instead: each step takes less time
    still. Guides gain little, because they handle few numbers at a time.

    The first use takes ten seconds or so, as does the first for another dtype, a second batch size,
    another number of sinusoids or components, and with gradients or without. Beyond
    ``torch._dynamo.config.recompile_limit`` of these, torch logs a warning and does without.
    Results agree to round-off. Gradients of gradients, ``torch.func``, autocast, and the inverses
    of other solvers than the default take the usual way.

    Args:
        enabled: Whether kernels are compiled.
        backend: The backend of :func:`torch.compile`. The default one needs a C++ compiler, or
            Triton on a GPU.

    Raises:
        TypeError: If ``enabled`` is not a bool.
        RuntimeError: If this version of torch cannot compile the kernels, or there is no such
            backend.

    Example:
        >>> compile_kernels(backend="eager")
        >>> x = SinusoidalFlow(3, conditioner="autoregressive")().sample((5,))
        >>> compile_kernels(False)
    """
    global _backend
    check_flag("enabled", enabled)
    if enabled:
        if TorchVersion(torch.__version__) < _OLDEST:
            raise RuntimeError(
                f"Compiled kernels should have torch {_OLDEST} or later, got {torch.__version__}."
            )
        torch.compile(compile_kernels, backend=backend)  # or the first sample would find it unknown
    _backend = backend if enabled else None


def compiling_kernels() -> bool:
    """Whether kernels are compiled."""
    # First of all: whatever the compiler sees becomes a guard of the user's function, which would
    # then be compiled anew when the switch is turned.
    return not torch.compiler.is_compiling() and _backend is not None


def sums_are_fast() -> bool:
    """Whether sums take less time than small matrix products.

    They do where they are compiled and autograd does not record them, so that they leave nothing in
    memory.
    """
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()


def kernel(function: C) -> C:
    """Compiles a function where that has been asked for.

    It may not read the values of tensors. The tensors among the positional arguments decide whether
    a call is compiled; those inside of others, such as a ``Chain``, have to be like them in device,
    autocast and what ``readable`` says.
    """
    compiled: Any = None
    seen: Any = None  # the backend that it was compiled by

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled, seen
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return function(*args, **kwargs)
        backend = _backend
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if (
            backend is None
            or not readable(*tensors)
            or autocasting(tensors[0])
            or not tensors[0].numel()
        ):
            return function(*args, **kwargs)
        if seen is not backend:
            compiled, seen = torch.compile(function, backend=backend), backend
        return compiled(*args, **kwargs)

    return cast(C, call)
