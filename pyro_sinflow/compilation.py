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

_options: dict[str, Any] | None = None  # of torch.compile, or None where kernels are not compiled


def compile_kernels(enabled: bool = True, **options: Any) -> None:
    """Turns on, or off, that compiled kernels evaluate and invert sinusoids.

    A chain of sinusoids is many small operations, which ``torch.compile`` fuses into a few, for all
    flows of the process. The autoregressive conditioner gains the most: its samples take half the
    time. Where ``torch.compile`` can have the whole loss, let it have that instead: each step takes
    less time still. Guides gain nothing, because they handle few numbers at a time.

    The first use takes ten seconds or so, as does the first for another dtype, a second batch size,
    or another number of sinusoids or components. Beyond some number of these, torch warns, and does
    without. Results agree to round-off. Gradients of gradients, ``torch.func`` and autocast take
    the usual way.

    Args:
        enabled: Whether kernels are compiled.
        options: Keyword arguments passed to :func:`torch.compile`. Its default backend needs a C++
            compiler, or Triton on a GPU.

    Raises:
        TypeError: If ``enabled`` is not a bool.
        RuntimeError: If this version of torch cannot compile the kernels.

    Example:
        >>> compile_kernels(backend="eager")
        >>> x = SinusoidalFlow(3, conditioner="autoregressive")().sample((5,))
        >>> compile_kernels(False)
    """
    global _options
    check_flag("enabled", enabled)
    if enabled and TorchVersion(torch.__version__) < _OLDEST:
        raise RuntimeError(
            f"Compiled kernels should have torch {_OLDEST} or later, got {torch.__version__}."
        )
    _options = options if enabled else None


def compiling_kernels() -> bool:
    """Whether kernels are compiled."""
    return _options is not None


def fused() -> bool:
    """Whether the compiler is looking, and autograd is not.

    Then sums take less time than small matrix products: they leave nothing in memory.
    """
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()


def kernel(function: C) -> C:
    """Compiles a function where that has been asked for.

    It takes tensors, and what holds tensors, and does not look at their values.
    """
    compiled: Any = None
    seen: dict[str, Any] | None = None  # the options that it was compiled with

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled, seen
        if _options is None or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return function(*args, **kwargs)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if not readable(*tensors) or autocasting(tensors[0]) or not tensors[0].numel():
            return function(*args, **kwargs)
        if seen != _options:
            compiled, seen = torch.compile(function, **_options), _options
        return compiled(*args, **kwargs)

    return cast(C, call)
