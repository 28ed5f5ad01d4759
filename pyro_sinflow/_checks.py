"""Checks of user input: each names the argument, what was given and what was expected."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from pyro.distributions import is_validation_enabled
from torch import Size, Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])


def lasting(*tensors: Tensor) -> bool:
    """Whether the tensors have values, and outlive the call.

    They do not inside ``torch.compile`` or a ``torch.func`` transform, nor if fake or meta.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or any(isinstance(t, FakeTensor) or t.is_meta for t in tensors)
    )


def readable(*tensors: Tensor) -> bool:
    """Whether Python may branch on the tensors' values.

    It may only if they last, and neither while ``torch.jit.trace`` records, nor on dual tensors of
    forward differentiation, whose tangents settle later than their values. Where it may not, checks
    of values are skipped and iterations run a fixed number of times.
    """
    return (
        lasting(*tensors)
        and not torch.jit.is_tracing()
        and not (
            has_duals() and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
        )
    )


def has_duals() -> bool:
    """Whether forward differentiation is under way, so that tensors may have tangents."""
    return forward_ad._current_level >= 0


def forward_levels() -> int:
    """How many transforms of ``torch.func`` that differentiate forward are under way."""
    if not torch._C._are_functorch_transforms_active():
        return 0
    forward = torch._C._functorch.TransformType.Jvp
    return sum(i.key() == forward for i in torch._C._functorch.get_interpreter_stack() or ())


def version(tensor: Tensor) -> int | None:
    """Returns what changes when a tensor does; tensors of inference mode do not tell."""
    return None if tensor.is_inference() else tensor._version


def check_tensor(name: str, x: Any) -> None:
    """Requires a floating-point tensor without NaN or infinity.

    As Pyro's distributions do, it lets values pass where validation is off. MCMC relies on that: a
    trajectory that diverges may reach NaN, and is rejected. (torch's own switch will not do: its
    compiler turns it off for good.)
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"'{name}' should be a tensor, got {type(x).__name__}.")
    if not x.is_floating_point():
        raise TypeError(f"'{name}' should be a floating-point tensor, got {x.dtype}.")
    # One reduction on the good path: a finite sum has finite terms. The sum of large numbers may be
    # infinite as well.
    if is_validation_enabled() and readable(x) and not math.isfinite(x.detach().sum()):
        nan, inf = int(x.isnan().sum()), int(x.isinf().sum())
        if nan or inf:
            raise ValueError(
                f"'{name}' should be finite, got {nan} NaN and {inf} infinite values "
                f"in a tensor of shape {tuple(x.shape)}."
            )


def autocasting(x: Tensor) -> bool:
    """Whether autocast is enabled on the device of x; some, such as "meta", know no autocast."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def full_precision(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Applies a function that autocast would run in half precision, such as a matrix product."""
    if autocasting(tensors[0]):
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(*tensors)
    return function(*tensors)


def check_dtype(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Requires the dtype of the parameters, once half precision is lifted to float32.

    Autocast mixes dtypes on purpose, and is let through.
    """
    given, expected = (torch.promote_types(d, torch.float32) for d in (x.dtype, dtype))
    if given != expected and not autocasting(x):
        raise TypeError(
            f"'{name}' should have the parameters' dtype {dtype}, got {x.dtype}; "
            f"convert one of them with '.to(...)'."
        )


def check_event(name: str, x: Tensor, event_shape: Size) -> None:
    """Requires that the shape ends with ``event_shape``."""
    if x.shape[max(x.ndim - len(event_shape), 0) :] != event_shape:
        expected = ", ".join(["*", *map(str, event_shape)])
        raise ValueError(f"'{name}' should have shape ({expected}), got {tuple(x.shape)}.")


def broadcast(*shapes: Size) -> Size:
    """Returns the shape that shapes broadcast to, at no cost where they are equal."""
    first, *rest = shapes
    return first if all(shape == first for shape in rest) else torch.broadcast_shapes(*shapes)


def check_broadcast(**shapes: Size) -> Size:
    """Requires shapes that broadcast together, and returns the common one."""
    try:
        return broadcast(*shapes.values())
    except RuntimeError:
        given = ", ".join(f"'{name}' {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"Shapes should broadcast together, got {given}.") from None


def check_size(name: str, n: Any, minimum: int = 1) -> int:
    """Requires an integer of at least ``minimum``, and returns it as an int."""
    try:
        if isinstance(n, bool):
            raise TypeError
        value = operator.index(n)
    except TypeError:
        raise TypeError(f"'{name}' should be an integer, got {n!r}.") from None
    if value < minimum:
        raise ValueError(f"'{name}' should be at least {minimum}, got {value}.")
    return value


def check_sizes(name: str, sizes: Any) -> Size:
    """Requires a non-empty sequence of positive integers; an int stands for a sequence of one."""
    if not isinstance(sizes, Iterable) or isinstance(sizes, str | Tensor):
        return Size([check_size(name, sizes)])
    if len(sizes := tuple(sizes)) == 0:
        raise ValueError(f"'{name}' should hold at least one integer, got {sizes}.")
    return Size(check_size(name, n) for n in sizes)


def check_shape(name: str, shape: Any) -> Size:
    """Requires a sequence of integers of at least 0, which may be empty."""
    if not isinstance(shape, Iterable) or isinstance(shape, str | Tensor):
        raise TypeError(f"'{name}' should be a sequence of integers, got {shape!r}.")
    return Size(check_size(name, n, minimum=0) for n in shape)


def check_real(name: str, value: Any, low: float, high: float, closed: bool = False) -> float:
    """Requires a number in the open interval ``(low, high)``, or with ``closed`` in [low, high)."""
    if isinstance(value, bool | Tensor) or not isinstance(value, int | float):
        raise TypeError(f"'{name}' should be a number, got {value!r}.")
    if not (low < value < high or (closed and value == low)):
        least = f"at least {low} and less than" if closed else f"strictly between {low} and"
        raise ValueError(f"'{name}' should be {least} {high}, got {value}.")
    return float(value)


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Requires one of the choices."""
    if value not in choices:
        raise ValueError(f"'{name}' should be one of {choices}, got {value!r}.")


def check_instance(name: str, value: Any, cls: type[T]) -> T:
    """Requires an instance of a class, and returns it."""
    if not isinstance(value, cls):
        raise TypeError(f"'{name}' should be a {cls.__name__}, got {type(value).__name__}.")
    return value


def check_callable(name: str, value: C) -> C:
    """Requires something that can be called, and returns it."""
    if not callable(value):
        raise TypeError(f"'{name}' should be callable, got {value!r}.")
    return value


def check_flag(name: str, value: Any) -> None:
    """Requires a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"'{name}' should be True or False, got {value!r}.")
