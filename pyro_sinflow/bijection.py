"""The base class of the transforms: it checks inputs and holds a cache of one pair."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Size, Tensor
from torch.distributions import Transform, constraints
from zuko.transforms import ComposedTransform, DependentTransform  # adds 'call_and_ladj' to all

from . import _validate as check
from ._torch import InverseTransform, State, is_concrete, modes, optimizer_steps, versions


def at_least_float32(x: Tensor) -> Tensor:
    """Converts half precision to float32, the lowest precision of solvers and determinants."""
    return x.float() if x.dtype.itemsize < 4 else x


def call_and_ladj(t: Transform, x: Tensor, event_dim: int) -> tuple[Tensor, Tensor]:
    """Returns the value and the log-determinant of events with ``event_dim`` dimensions.

    For the transforms of this package, the input is not checked.
    """
    if isinstance(t, Bijection):
        y, ladj = t._call_and_ladj(x)
        dims = event_dim - t._event_dim
    else:
        y, ladj = t.call_and_ladj(x)  # type: ignore[attr-defined]
        dims = event_dim - t.domain.event_dim
    if dims > 0:
        ladj = (ladj if dims == 1 else ladj.flatten(-dims)).sum(dim=-1)
    return y, ladj


def inverse(t: Transform, y: Tensor) -> Tensor:
    """Returns the inverse. For the transforms of this package, the input is not checked."""
    if isinstance(t, Bijection):
        return t._inverse(y)
    # 't.inv' would be stored in t, which forms a reference cycle that keeps the tensors of t.
    if isinstance(t, ComposedTransform):
        for part in reversed(t.transforms):
            y = inverse(part, y)
        return y
    if isinstance(t, DependentTransform):
        return inverse(t.base, y)
    return t._inv_call(y) if type(t).inv is Transform.inv else t.inv(y)


class _Pair(NamedTuple):
    """The cached pair. It is read and replaced as a whole, because threads may share it."""

    x: Tensor
    y: Tensor
    ladj: Tensor | None
    returned: tuple[Tensor, ...]  # those of x and y that the transform has returned
    state: tuple[Any, ...]


class Bijection(Transform):
    """A bijective transform of real tensors.

    With ``cache_size=1``, the transform keeps the latest pair (x, y) and its log-determinant, as
    Pyro's flows do, so that a guide scores its own samples without further computation. The pair is
    used only for a tensor that this transform has returned, in the same modes (gradients,
    inference, autocast, training), before the next step of any optimizer, and only as long as
    neither the pair nor the parameters have changed. The cache does not notice changes through
    ``.data`` or by replays of a CUDA graph, nor those of global variables, of numpy arrays and of
    objects with ``__slots__``.
    """

    bijective = True
    sign: ClassVar[int] = +1  # all slopes are positive, and so is the determinant
    batch_shape = Size()
    _event_dim = 0
    _event_shape: Size | None = None  # None if it is not known
    _cached: _Pair | None = None
    _state: State | None = None

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        """All real events."""
        real = constraints.real
        return constraints.independent(real, self._event_dim) if self._event_dim else real

    codomain = domain

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns both the transformed value and the log absolute determinant of the Jacobian.

        Args:
            x: The values, with shape :math:`(*, \text{event})`.

        Returns:
            The transformed values, with the shape that x and the parameters broadcast to, and the
            log-determinants, which have that shape without the event dimensions.

        Raises:
            TypeError: If x is not a floating-point tensor, or has another dtype than parameters.
            ValueError: If x has the wrong shape, or NaN or infinite values while Pyro's validation
                is on.
        """
        return self._call_and_ladj(self._checked("x", x))

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _call(self, x: Tensor) -> Tensor:
        return self._call_and_ladj(x)[0]

    def _checked(self, name: str, x: Any) -> Tensor:
        """Checks an input, and converts half precision to float32.

        The private methods assume that their input has been checked.
        """
        check.tensor(name, x)
        if self._event_shape is not None:
            check.event(name, x, self._event_shape)
        elif x.ndim < self._event_dim:
            raise ValueError(
                f"'{name}' should have at least {self._event_dim} dimensions, got {tuple(x.shape)}."
            )
        return at_least_float32(x)

    def __call__(self, x: Tensor) -> Tensor:
        """Computes the transform, and stores the pair if there is a cache."""
        pair = self._known(x)
        if pair is not None and pair.x is x:
            self._cached = pair._replace(returned=(x, pair.y))
            return pair.y
        given = self._checked("x", x)
        if self._cache_size == 0:
            return self._call(given)
        y, ladj = self._call_and_ladj(given)
        self._remember(x, y, ladj, y)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        pair = self._known(y)
        if pair is not None and pair.y is y:
            self._cached = pair._replace(returned=(pair.x, y))
            return pair.x
        x = self._inverse(self._checked("y", y))
        self._remember(x, y, None, x)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the log absolute determinant of the Jacobian at x.

        If y is the cached output for x, the cached value is returned.
        """
        pair = self._known(x, y)
        if pair is not None and pair.x is x and pair.y is y and pair.ladj is not None:
            return pair.ladj
        given = self._checked("x", x)
        self._checked("y", y)
        check.broadcast(x=x.shape, y=y.shape)
        return self._call_and_ladj(given)[1]

    def forward_shape(self, shape: Size) -> Size:
        """Infers the shape of the output.

        As with zuko's transforms, it does not depend on the batch shape of the parameters, unless
        the transform has a ``batch_shape``.

        Raises:
            TypeError: If ``shape`` is not a sequence of integers.
            ValueError: If it has too few dimensions, or does not broadcast with ``batch_shape``.
        """
        shape = check.shape("shape", shape)
        cut = len(shape) - self._event_dim
        if cut < 0:
            raise ValueError(
                f"'shape' should have at least {self._event_dim} dimensions, got {tuple(shape)}."
            )
        return check.broadcast(shape=shape[:cut], parameters=self.batch_shape) + shape[cut:]

    def inverse_shape(self, shape: Size) -> Size:
        """Infers the shape of the input."""
        return self.forward_shape(shape)

    @property
    def inv(self) -> Transform:
        """The inverse transform, with ``t.inv.inv is t``."""
        # A new object each time. If it were stored, the two would form a reference cycle, and the
        # graph of the cached pair would stay in memory until the next garbage collection.
        return InverseTransform(self)

    def with_cache(self, cache_size: int = 1) -> Transform:
        """Returns a transform with the same parameters and another cache size (0 or 1)."""
        check.choice("cache_size", cache_size, (0, 1))
        if self._cache_size == cache_size:
            return self
        new = copy.copy(self)
        new._cache_size = cache_size
        return new

    def clear_cache(self) -> None:
        """Removes the cached pair."""
        self._cached = None

    def _known(self, *tensors: Tensor) -> _Pair | None:
        """Returns the cached pair, if the transform returned one of the tensors and it is valid."""
        # Before self._cached is read: torch.compile adds a guard for each attribute it reads.
        if self._cache_size == 0 or torch.compiler.is_compiling():
            return None
        pair = self._cached
        if pair is None or not any(t is r for t in tensors for r in pair.returned):
            return None
        return pair if pair.state == self._state_with(pair.x, pair.y) else None

    def _remember(self, x: Tensor, y: Tensor, ladj: Tensor | None, returned: Tensor) -> None:
        if self._cache_size == 1 and is_concrete(x, y):
            state = self._state_with(x, y)
            if None in state:  # a module may have been replaced
                self._state = None
                state = self._state_with(x, y)
            self._cached = None if None in state else _Pair(x, y, ladj, (returned,), state)

    def _state_with(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        """Returns a value that differs whenever a cached pair (x, y) may be out of date."""
        skip = ("_cached", "_state", "_inv")
        root = {k: v for k, v in vars(self).items() if k not in skip}
        state = self._state
        if state is None:
            state = self._state = State(root)
        elif not state.is_unchanged(root):
            return (None,)
        return optimizer_steps(), *modes(x), *versions(x, y), state.versions()

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles have no cached pair: tensors with a graph can be neither copied nor
        # pickled.
        return {**self.__dict__, "_inv": None, "_cached": None, "_state": None}
