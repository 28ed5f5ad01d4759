"""What the transforms share: checks of their input, and a cache that notices changes."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
import zuko.transforms  # gives every transform 'call_and_ladj'  # noqa: F401
from torch import Size, Tensor, nn
from torch.distributions import Transform, constraints
from torch.distributions.transforms import _InverseTransform

from ._checks import check_broadcast, check_choice, check_shape, check_tensor, lasting, version


def at_least_float32(x: Tensor) -> Tensor:
    """Lifts half precision to float32, in which solvers and log-determinants run at the least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sum_last(x: Tensor, dims: int) -> Tensor:
    """Sums over the last dimensions."""
    return x.flatten(x.ndim - dims).sum(dim=-1) if dims else x


class _State(NamedTuple):
    """A tensor at some time, which it keeps alive: another may not take its place."""

    tensor: Tensor
    version: int | None
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> _State:
        return cls(tensor, version(tensor), tensor.requires_grad)

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, _State) and self.tensor is other.tensor and self[1:] == other[1:]
        return same and self.version is not None  # without one, it may have changed unnoticed


class _Pair(NamedTuple):
    """What the cache keeps. It is read and replaced as a whole, for the sake of threads."""

    x: Tensor
    y: Tensor
    ladj: Tensor | None
    key: tuple[Any, ...]


def _attributes(transform: Transform) -> Iterator[Tensor | bool]:
    """Yields what the public attributes of a transform depend on."""
    return dependencies_of([v for name, v in vars(transform).items() if not name.startswith("_")])


def dependencies_of(part: Any) -> Iterator[Tensor | bool]:
    """Yields what a transform, or a collection of them, depends on: tensors and modules' modes."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, nn.Module):
        for module in part.modules():  # one walk, not one for each kind
            yield module.training
            owned = (*module._parameters.values(), *module._buffers.values())
            yield from (tensor for tensor in owned if tensor is not None)
    elif isinstance(part, Bijection):
        yield from part._dependencies()
    elif isinstance(part, _InverseTransform):
        yield from dependencies_of(part._inv)
    elif isinstance(part, Transform):
        yield from _attributes(part)
    elif isinstance(part, list | tuple):
        for item in part:
            yield from dependencies_of(item)


class Bijection(Transform):
    """A bijective transform of real tensors.

    With ``cache_size=1``, the latest pair (x, y) is kept with its log-determinant, as Pyro's flows
    keep it. The pair is dropped when a backward pass has used it, because its graph is gone then,
    when x, y or what the transform depends on has changed, and when gradients are wanted that it
    was computed without. Changes through ``.data`` go unnoticed, here as by autograd.
    """

    bijective = True
    sign: ClassVar[int] = +1  # of every slope, and so of the determinant
    _event_dim = 0
    batch_shape: Size  # of the parameters, which inputs broadcast with

    def __init__(self, cache_size: int = 0) -> None:
        check_choice("cache_size", cache_size, (0, 1))
        super().__init__(cache_size=cache_size)
        self.clear_cache()

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        """All real events."""
        return constraints.independent(constraints.real, self._event_dim)

    codomain = domain

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns both the transformed value and the log absolute determinant of the Jacobian."""
        self._check("x", x)
        return self._call_and_ladj(x)

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _call(self, x: Tensor) -> Tensor:
        return self._call_and_ladj(x)[0]

    def _check(self, name: str, x: Any) -> None:
        check_tensor(name, x)
        event_dim = self._event_dim
        if x.ndim < event_dim:
            raise ValueError(
                f"'{name}' should have at least {event_dim} dimensions, got {tuple(x.shape)}."
            )

    def __call__(self, x: Tensor) -> Tensor:
        if self._cache_size == 0:
            self._check("x", x)
            return self._call(x)
        pair = self._known(x=x)
        if pair is not None:
            return pair.y
        y, ladj = self.call_and_ladj(x)
        self._remember(x, y, ladj)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        pair = self._known(y=y)
        if pair is not None:
            return pair.x
        self._check("y", y)
        x = self._inverse(y)
        self._remember(x, y)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the log absolute determinant of the Jacobian at x; y is used as a cache key."""
        pair = self._known(x=x, y=y)
        if pair is not None and pair.ladj is not None:
            return pair.ladj
        self._check("y", y)
        _, ladj = self.call_and_ladj(x)
        check_broadcast(x=x.shape, y=y.shape)
        return ladj

    def forward_shape(self, shape: Size) -> Size:
        """Infers the shape of the output: the batch broadcasts with that of the parameters."""
        shape = check_shape("shape", shape)
        cut = len(shape) - self.domain.event_dim
        if cut < 0:
            raise ValueError(
                f"'shape' should have at least {self.event_dim} dimensions, got {tuple(shape)}."
            )
        return check_broadcast(shape=shape[:cut], parameters=self.batch_shape) + shape[cut:]

    def inverse_shape(self, shape: Size) -> Size:
        """Infers the shape of the input."""
        return self.forward_shape(shape)

    @property
    def inv(self) -> Transform:
        """The inverse transform, with ``t.inv.inv is t``."""
        # Made anew each time: were it kept, it and its inverse would hold each other, and with them
        # the graph of the cached pair, until the garbage collector comes by.
        return _InverseTransform(self)

    def with_cache(self, cache_size: int = 1) -> Transform:
        """Returns the same transform, parameters shared, with another cache."""
        check_choice("cache_size", cache_size, (0, 1))
        if self._cache_size == cache_size:
            return self
        new = copy.copy(self)
        new._cache_size = cache_size
        return new

    def clear_cache(self) -> None:
        """Forgets the cached pair."""
        self._cached: _Pair | None = None

    def _known(self, x: Tensor | None = None, y: Tensor | None = None) -> _Pair | None:
        """Returns the cached pair, if x, y or both are its own, and it would be the same anew.

        If it would not, it is dropped.
        """
        # First of all: whatever the compiler sees becomes a guard of the user's compiled function.
        if torch.compiler.is_compiling():
            return None
        pair = self._cached
        if (
            pair is None
            or (x is not None and x is not pair.x)
            or (y is not None and y is not pair.y)
        ):
            return None
        if pair.key == self._key(pair.x, pair.y):
            return pair
        self.clear_cache()
        return None

    def _remember(self, x: Tensor, y: Tensor, ladj: Tensor | None = None) -> None:
        if self._cache_size == 0 or not lasting(x, y):
            return
        self._cached = _Pair(x, y, ladj, self._key(x, y))
        this = weakref.ref(self)

        def forget(_: Tensor) -> None:
            transform = this()
            if transform is not None:
                transform.clear_cache()

        for tensor in (x, y, ladj):
            if tensor is not None and tensor.grad_fn is not None:
                tensor.register_hook(forget)

    def _dependencies(self) -> Iterable[Tensor | bool]:
        """What the transform depends on, unless it is a module: its attributes."""
        return _attributes(self)

    def _key(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        """Changes whenever a pair may no longer be what it would be if computed now."""
        parts = (x, y, *dependencies_of(self))
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            *(_State.of(part) if isinstance(part, Tensor) else part for part in parts),
        )

    def __getstate__(self) -> dict[str, Any]:
        # Neither copies nor pickles carry the cache: tensors with a graph can be neither.
        return {**self.__dict__, "_inv": None, "_cached": None}
