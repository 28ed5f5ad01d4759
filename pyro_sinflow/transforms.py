r"""Triangular transforms, LDU blocks and compositions.

They hold tensors and callables. The modules in :mod:`pyro_sinflow.lazy`,
:mod:`pyro_sinflow.modules` and :mod:`pyro_sinflow.flows` own the parameters. The explicit direction
is ``t(x)``, the iterative direction is ``t.inv(y)``.
"""

from __future__ import annotations

from collections.abc import Callable
from textwrap import indent
from typing import Any

from torch import Size, Tensor
from torch.distributions import Transform

from . import _validate as check
from .autoregressive import AutoregressiveMap
from .bijection import Bijection, call_and_ladj, inverse
from .implicit import invert
from .solvers import Solver


class TriangularTransform(Bijection):
    r"""Creates a transformation whose Jacobian is triangular.

    .. math:: y_i = \tau(x_i; h_i(x_{<i}))

    It is like :class:`zuko.transforms.AutoregressiveTransform`, for any order of the features, but
    the inverse stops early: :math:`x \leftarrow \tau^{-1}(y; h(x))` is repeated until x no longer
    changes. As many passes as there are features are always enough; usually far fewer are needed.

    References:
        | Sinusoidal Flow: A Fast Invertible Autoregressive Flow (Wei, 2021), Eq. 5 and Table 2
        | https://arxiv.org/abs/2110.13344

    Args:
        conditioner: A function that takes x, with shape :math:`(*, \text{features})`, and returns
            the element-wise monotone transformation :math:`\tau`: one of
            :mod:`zuko.transforms`, a :class:`SinusoidalTransform`, or a composition. Its parameters
            for a feature must depend only on the features before it, and it must be deterministic.
            Gradients of the inverse reach all tensors that it depends on. An
            :class:`~pyro_sinflow.AutoregressiveMap` can add a faster inverse; it has its own
            ``passes`` and ``event_dim``.
        passes: An upper bound on the number of passes (2 for a coupling). If :py:`None`, the number
            of features.
        event_dim: The number of dimensions of x that make up an event: 1 for vectors, 3 for
            images :math:`(C, H, W)`.
        batch_shape: The batch shape of the tensors that the conditioner depends on.
            ``forward_shape`` broadcasts it with the shape of inputs.
        solver: How the inverse is computed.
        cache_size: Whether the latest pair (x, y) is kept (1) or not (0).

    Raises:
        TypeError: If ``conditioner`` is not callable, a size is not an integer, ``solver`` is not a
            :class:`Solver`, or ``passes`` or another ``event_dim`` is given for a map that has its
            own. When the transform is called: if ``conditioner`` does not return a transform.
        ValueError: If a size is not positive, or ``cache_size`` is neither 0 nor 1.
        InversionError: When the inverse is called: if the map is not triangular or not
            deterministic, or if all events leave the range of the dtype while Pyro's validation
            is on.

    Example:
        >>> weight = torch.randn(3, 3).tril(-1)
        >>> shift = lambda x: zuko.transforms.AdditiveTransform(x @ weight.T)
        >>> t = TriangularTransform(shift)
        >>> x = torch.randn(3)
        >>> bool(torch.allclose(t.inv(t(x)), x, atol=1e-5))
        True
    """

    def __init__(
        self,
        conditioner: Callable[[Tensor], Transform],
        *,
        passes: int | None = None,
        event_dim: int = 1,
        batch_shape: Size = Size(),
        solver: Solver = Solver(),
        cache_size: int = 0,
    ) -> None:
        if cache_size != 0:
            check.choice("cache_size", cache_size, (0, 1))
        super().__init__(cache_size=cache_size)

        if not isinstance(conditioner, AutoregressiveMap):
            conditioner = AutoregressiveMap(conditioner, event_dim, passes)
        elif passes is not None or event_dim not in (1, conditioner.event_dim):
            raise TypeError(
                "'passes' and 'event_dim' should be left out for an AutoregressiveMap, which has "
                f"its own, got {passes} and {event_dim}."
            )
        if type(solver) is not Solver:
            check.instance("solver", solver, Solver)
        if batch_shape != ():
            self.batch_shape = check.shape("batch_shape", batch_shape)
        self.map = conditioner
        self._event_dim, self._event_shape = self.map.event_dim, self.map.features
        self.solver = solver

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.map!r})"

    def _call(self, x: Tensor) -> Tensor:
        return self.map(x)(x)

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, cut = self.map.context_shape, x.ndim - self._event_dim
        if batch and batch != x.shape[:cut]:  # zuko's transforms do not broadcast log-determinants
            x = x.expand(check.broadcast(x=x.shape[:cut], context=batch) + x.shape[cut:])
        return call_and_ladj(self.map(x), x, self._event_dim)

    def _inverse(self, y: Tensor) -> Tensor:
        return invert(self.map, y, self.solver)


class Composition(Bijection):
    """Composes transforms, and checks the input once.

    Args:
        transforms: The transforms, in the order in which they are applied.
        cache_size: Whether the latest pair (x, y) is kept (1) or not (0).
    """

    _names: tuple[str, ...] = ()  # of the transforms in the representation, instead of numbers

    def __init__(self, *transforms: Transform, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)

        self._transforms = transforms
        for t in transforms:
            self._event_dim = max(self._event_dim, t.domain.event_dim)
            if isinstance(t, Bijection):
                self._event_shape = self._event_shape or t._event_shape

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """The transforms, in the order in which they are applied."""
        return self._transforms

    def __repr__(self) -> str:
        transforms = self.transforms
        names = self._names or range(len(transforms))
        lines = "\n".join(f"({name}): {t}" for name, t in zip(names, transforms, strict=True))
        return f"{type(self).__name__}(\n{indent(lines, '  ')}\n)"

    def _inverse(self, y: Tensor) -> Tensor:
        for t in reversed(self.transforms):
            y = inverse(t, y)
        return y

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total: Any = None
        for t in self.transforms:
            x, ladj = call_and_ladj(t, x, self._event_dim)
            total = ladj if total is None else total + ladj
        return x, total


class BuiltAtUse(Composition):
    """A composition whose transforms are built at each use.

    Transforms that were built earlier would be out of date after a change of parameters or of the
    context, and those that hold tensors with a graph could be differentiated only once.

    Args:
        build: A function that returns the transforms, in the order in which they are applied.
        features: The shape of an event.
        context_shape: The batch shape of their context, which broadcasts with that of the input.
    """

    def __init__(
        self,
        build: Callable[[], tuple[Transform, ...]],
        features: Size,
        context_shape: Size = Size(),
    ) -> None:
        super(Composition, self).__init__()  # which would store transforms

        self.build = build
        self.context_shape = context_shape
        self._event_dim, self._event_shape = len(features), features

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """The transforms, with the current context and parameters."""
        return self.build()

    def _checked(self, name: str, x: Any) -> Tensor:
        lifted = super()._checked(name, x)
        if self.context_shape:
            batch = x.shape[: x.ndim - self._event_dim]
            check.broadcast(**{name: batch, "context": self.context_shape})
        return lifted


class LDUTransform(Composition):
    r"""Creates an LDU block: an upper triangular, then a diagonal, then a lower triangular map.

    .. math:: f(x) = (L \circ D \circ U)(x)

    Its Jacobian is dense, and the determinant is the product of the three diagonals. If U and L
    only shift, their diagonals are ones, and the determinant is the product of the slopes of D.

    References:
        | Sinusoidal Flow: A Fast Invertible Autoregressive Flow (Wei, 2021), Eq. 17 and Table 2
        | https://arxiv.org/abs/2110.13344

    Args:
        upper: The map U, in which features depend on those after them.
        diagonal: The element-wise map D: a :class:`SinusoidalTransform`, or a composition of
            several.
        lower: The map L, in which features depend on those before them.
        batch_shape: The batch shape of the parts. ``forward_shape`` broadcasts it with the shape of
            inputs.
        cache_size: Whether the latest pair (x, y) is kept (1) or not (0).

    Raises:
        TypeError: If an argument is not a transform, or ``batch_shape`` is not a sequence of
            integers.
        ValueError: If a transform is not bijective, or ``cache_size`` is neither 0 nor 1.

    Example:
        >>> block = LDU(3)
        >>> t = LDUTransform(block.upper, block.diagonal, block.lower)
        >>> t.event_dim
        1
        >>> x = torch.randn(5, 3)
        >>> y, ladj = t.call_and_ladj(x)
        >>> ladj.shape
        torch.Size([5])
    """

    _names = ("upper", "diagonal", "lower")

    def __init__(
        self,
        upper: Transform,
        diagonal: Transform,
        lower: Transform,
        *,
        batch_shape: Size = Size(),
        cache_size: int = 0,
    ) -> None:
        if cache_size != 0:
            check.choice("cache_size", cache_size, (0, 1))
        for name, part in (("upper", upper), ("diagonal", diagonal), ("lower", lower)):
            if not isinstance(part, Bijection):
                check.instance(name, part, Transform)
                if not part.bijective:
                    raise ValueError(f"'{name}' should be bijective, got {part}.")
        super().__init__(upper, diagonal, lower, cache_size=cache_size)

        if batch_shape != ():
            self.batch_shape = check.shape("batch_shape", batch_shape)

    @property
    def upper(self) -> Transform:
        """The map U."""
        return self.transforms[0]

    @property
    def diagonal(self) -> Transform:
        """The map D."""
        return self.transforms[1]

    @property
    def lower(self) -> Transform:
        """The map L."""
        return self.transforms[2]
