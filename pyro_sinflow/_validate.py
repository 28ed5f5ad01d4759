"""Checks of user input. Each error names the argument, what was given and what was expected."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, TypeVar
from weakref import ReferenceType, ref

import torch
from pyro.distributions import is_validation_enabled
from torch import Size, Tensor

from ._torch import autocasting, can_branch_on, versions

T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])

_finite: dict[int, tuple[ReferenceType[Tensor], int]] = {}  # finite contexts by identity


def tensor(name: str, x: Any) -> None:
    """Requires a floating-point tensor without NaN or infinity.

    Like Pyro's distributions, it does not look at values if Pyro's validation is off. MCMC switches
    it off, because a divergent trajectory may reach NaN and is then rejected. (torch's own switch
    cannot be used, because torch.compile turns it off and leaves it off.)
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"'{name}' should be a tensor, got {type(x).__name__}.")
    if not x.is_floating_point():
        raise TypeError(f"'{name}' should be a floating-point tensor, got {x.dtype}.")
    # If the sum is finite, so are all terms. Otherwise it may have overflowed, so count.
    if is_validation_enabled() and can_branch_on(x) and not math.isfinite(x.detach().sum()):
        nan, inf = int(x.isnan().sum()), int(x.isinf().sum())
        if nan or inf:
            raise ValueError(
                f"'{name}' should be finite, got {nan} NaN and {inf} infinite values "
                f"in a tensor of shape {tuple(x.shape)}."
            )


def finite_context(c: Any, computed: bool = False) -> None:
    """Requires a finite tensor of real numbers, and reads its values only once.

    Networks convert integers and booleans, such as one-hot codes, to their dtype. All parts of a
    flow check the same context, and on a GPU the host waits each time that values are read. Like
    autograd, it does not notice changes of values through ``.data``.

    Args:
        c: The context.
        computed: Whether it was computed from a finite context, so that its values need no check.
    """
    if isinstance(c, Tensor) and not c.is_floating_point() and not c.is_complex():
        return
    if not isinstance(c, Tensor) or not is_validation_enabled() or not can_branch_on(c):
        tensor("context", c)
        return
    key, (version,) = id(c), versions(c)
    known, known_version = _finite.get(key, (None, None))
    if known is not None and known() is c and known_version == version:
        return
    if not computed:
        tensor("context", c)
    if version is not None:
        _finite[key] = ref(c, lambda _: _finite.pop(key, None)), version


def dtype(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Requires the dtype of the parameters. Half precision counts as float32.

    It does nothing under autocast, which mixes dtypes.
    """
    given, expected = (torch.promote_types(d, torch.float32) for d in (x.dtype, dtype))
    if given != expected and not autocasting(x.device.type):
        raise TypeError(
            f"'{name}' should have the parameters' dtype {dtype}, got {x.dtype}; "
            f"convert one of them with '.to(...)'."
        )


def event(name: str, x: Tensor, event_shape: Size) -> None:
    """Requires that the shape ends with ``event_shape``."""
    if x.shape[max(x.ndim - len(event_shape), 0) :] != event_shape:
        expected = ", ".join(["*", *map(str, event_shape)])
        raise ValueError(f"'{name}' should have shape ({expected}), got {tuple(x.shape)}.")


def common_shape(*shapes: Size) -> Size:
    """Returns the shape that shapes broadcast to, without overhead if they are equal."""
    first, *rest = shapes
    return first if all(shape == first for shape in rest) else torch.broadcast_shapes(*shapes)


def broadcast(**shapes: Size) -> Size:
    """Requires shapes that broadcast together, and returns the common one."""
    try:
        return common_shape(*shapes.values())
    except RuntimeError:
        given = ", ".join(f"'{name}' {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"Shapes should broadcast together, got {given}.") from None


def size(name: str, n: Any, minimum: int = 1) -> int:
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


def sizes(name: str, sizes: Any) -> Size:
    """Requires a non-empty sequence of positive integers; an int stands for a sequence of one."""
    if not isinstance(sizes, Iterable) or isinstance(sizes, str | Tensor):
        return Size([size(name, sizes)])
    if len(sizes := tuple(sizes)) == 0:
        raise ValueError(f"'{name}' should hold at least one integer, got {sizes}.")
    return Size(size(name, n) for n in sizes)


def shape(name: str, shape: Any, minimum: int = 0) -> Size:
    """Requires a sequence of integers of at least ``minimum``, which may be empty."""
    if not isinstance(shape, Iterable) or isinstance(shape, str | Tensor):
        raise TypeError(f"'{name}' should be a sequence of integers, got {shape!r}.")
    return Size(size(name, n, minimum) for n in shape)


def shapes(name: str, shapes: Any) -> list[Size]:
    """Requires a sequence of shapes."""
    if not isinstance(shapes, Iterable):
        raise TypeError(f"'{name}' should be a sequence of shapes, got {shapes!r}.")
    return [shape(name, s) for s in shapes]


def real(name: str, value: Any, low: float, high: float, closed: bool = False) -> float:
    """Requires a number in ``(low, high)``, or in ``[low, high)`` if ``closed``."""
    if isinstance(value, bool | Tensor) or not isinstance(value, Real):
        raise TypeError(f"'{name}' should be a number, got {value!r}.")
    number = float(value)
    if not (low < number < high or (closed and number == low)):
        least = f"at least {low} and less than" if closed else f"strictly between {low} and"
        raise ValueError(f"'{name}' should be {least} {high}, got {value}.")
    return number


def choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Requires one of the choices."""
    if value not in choices:
        raise ValueError(f"'{name}' should be one of {choices}, got {value!r}.")


def instance(name: str, value: Any, cls: type[T]) -> T:
    """Requires an instance of a class, and returns it."""
    if not isinstance(value, cls):
        raise TypeError(f"'{name}' should be a {cls.__name__}, got {type(value).__name__}.")
    return value


def function(name: str, value: C) -> C:
    """Requires a callable, and returns it."""
    if not callable(value):
        raise TypeError(f"'{name}' should be callable, got {value!r}.")
    return value


def flag(name: str, value: Any) -> None:
    """Requires a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"'{name}' should be True or False, got {value!r}.")
