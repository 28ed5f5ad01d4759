"""Conditioners: lazy transforms, which own parameters and, given a context, build a transform."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Transform, constraints
from zuko.lazy import LazyTransform
from zuko.nn import MLP
from zuko.transforms import ComposedTransform, MonotonicAffineTransform
from zuko.utils import unpack

from ._bijection import Bijection, dependencies_of
from ._checks import broadcast, check_size, check_sizes
from .inversion import Solver
from .networks import MaskedNetwork, Shortcut, check_context
from .substitution import has_hooks, substitute
from .transforms import SinusoidalChain, TriangularTransform

_FASTER = 10  # how many times faster than its parameter the log-scale of LazyAffine learns


def initial_sinusoids(*shape: int, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws frequencies, phases and weights, each of shape ``(*shape, components)``.

    Half a period of the slope, pi / (2a), then goes from 0.4 to 3: from a detail to the whole range
    of standardised data.
    """
    frequency = torch.empty(*shape, components).uniform_(math.log(0.5), math.log(4.0)).exp()
    frequency = frequency.expm1().log()  # the inverse of softplus
    phase = torch.empty(*shape, components).uniform_(-math.pi / 2, math.pi / 2)

    return frequency, phase, torch.zeros(*shape, components)


class Affine(MonotonicAffineTransform):
    """zuko's affine transform, for parameters of a larger batch than x, as a context gives them."""

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the log-scale, in the shape that x and y broadcast to."""
        return self.log_scale.expand(broadcast(x.shape, y.shape))


def affine_chain(
    loc: Tensor,
    log_scale: Tensor,
    frequency: Tensor,
    phase: Tensor,
    weight: Tensor,
    residual: Tensor,
    max_scale: float,
    **kwargs: Any,
) -> Transform:
    """Composes an affine map and M sinusoids, from the outputs of a conditioner."""
    sinusoids = SinusoidalChain(
        frequency, phase, weight, residual, torch.zeros_like(residual), **kwargs
    )
    affine = Affine(loc, log_scale, slope=1 / max_scale)
    return ComposedTransform(affine, sinusoids)


def dependencies(module: nn.Module, c: Tensor | None, *others: Tensor) -> tuple[Tensor, ...]:
    """Returns the tensors that a module's transform depends on, given a context."""
    return (*module.parameters(), *(() if c is None else (c,)), *others)


class LazyTriangular(LazyTransform):
    r"""Creates a lazy triangular transformation.

    .. math:: y_i = \tau(x_i; h_i(x_{<i}, c))

    See Also:
        :class:`pyro_sinflow.TriangularTransform` and
        :class:`zuko.flows.autoregressive.MaskedAutoregressiveTransform`

    Args:
        network: A module that maps x, with shape :math:`(*, \text{features})`, and a context, or
            :py:`None`, to parameters with shape :math:`(*, \text{features}, \text{outputs})`; those
            of a feature must depend on the features before it alone.
        features: The shape of an event.
        univariate: The constructor of :math:`\tau`, which treats all features alike.
        shapes: The shapes of the arguments of ``univariate``, for one feature.
        solver: How the inverse is computed.

    Raises:
        TypeError: If ``features`` holds anything but integers.
        ValueError: If one of them is not positive.

    Example:
        >>> network = MaskedNetwork((3,), context=2, outputs=2)
        >>> f = zuko.transforms.MonotonicAffineTransform
        >>> t = LazyTriangular(network, (3,), f, shapes=[(), ()])
        >>> t(torch.randn(2))
        TriangularTransform(conditioner: LazyTriangular.meta, event_dim: 1)
    """

    def __init__(
        self,
        network: nn.Module,
        features: int | Sequence[int],
        univariate: Callable[..., Transform],
        shapes: Sequence[Sequence[int]],
        solver: Solver = Solver(),
    ) -> None:
        super().__init__()

        self.network = network
        self.features = check_sizes("features", features)
        self.univariate = univariate
        self.shapes = [Size(s) for s in shapes]
        self.solver = solver

    def meta(self, c: Tensor | None, x: Tensor) -> Transform:
        """Returns the element-wise transformation, given context and features."""
        return self.univariate(*unpack(self.network(x, c), self.shapes))

    def forward(self, c: Tensor | None = None) -> TriangularTransform:
        """Returns the transformation, given a context."""
        event_dim = len(self.features)
        network = None
        if type(self.network) is MaskedNetwork and not has_hooks(self.network):
            network = self.network.network
        return TriangularTransform(
            partial(self.meta, c),
            phi=partial(dependencies, self, c),
            event_dim=event_dim,
            substitute=partial(substitute, network, self.univariate, self.shapes, c, event_dim),
            preconditioner=network.preconditioner if isinstance(network, Shortcut) else None,
            solver=self.solver,
        )


class LazyElementWise(LazyTransform):
    """A lazy element-wise transformation with free parameters that a context may move."""

    def __init__(
        self,
        parameters: dict[str, Tensor],
        context: int,
        hidden_features: Sequence[int],
        activation: Callable[[], nn.Module] | None,
    ) -> None:
        super().__init__()

        self.names = tuple(parameters)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))
        self.context = context
        self.hyper: MLP | None = None
        if context > 0:
            total = sum(value.numel() for value in parameters.values())
            self.hyper = MLP(context, total, hidden_features, activation)
            nn.init.zeros_(self.hyper[-1].weight)
            nn.init.zeros_(self.hyper[-1].bias)

    def values(self, c: Tensor | None) -> list[Tensor]:
        """Returns the parameters, moved by the context."""
        values = [getattr(self, name) for name in self.names]
        if self.hyper is None or c is None:
            return values
        dtype = values[0].dtype
        moves = unpack(self.hyper(c.to(dtype)).to(dtype), [v.shape for v in values])
        return [v + m for v, m in zip(values, moves, strict=True)]

    def build(self, c: Tensor | None) -> Transform:
        """Returns the transformation with the parameters that the module has now."""
        raise NotImplementedError

    def forward(self, c: Tensor | None = None) -> ElementWise:
        """Returns the transformation, given a context."""
        check_context(c, self.context, getattr(self, self.names[0]).dtype)
        return ElementWise(self, c)


class ElementWise(Bijection):
    """The transform of a :class:`LazyElementWise`, which builds it anew for each use.

    It thus follows the module's parameters, as those transforms do that call a network.
    """

    domain = constraints.real
    codomain = constraints.real

    def __init__(self, lazy: LazyElementWise, c: Tensor | None) -> None:
        super().__init__()

        self.lazy = lazy
        self.c = c

    def now(self) -> Transform:
        """Returns the transform with the parameters that the module has now."""
        return self.lazy.build(self.c)

    def _check(self, name: str, x: Any) -> None:
        """Leaves it to what is built."""

    def _call(self, x: Tensor) -> Tensor:
        return self.now()(x)

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.now().call_and_ladj(x)  # type: ignore[attr-defined]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.now().inv(y)

    def _dependencies(self) -> Iterable[Tensor | bool]:
        return dependencies_of((self.lazy, self.c))

    def forward_shape(self, shape: Size) -> Size:
        """Infers the shape of the output."""
        return self.now().forward_shape(shape)

    def __repr__(self) -> str:
        return repr(self.now())

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ElementWise)
            and self.lazy is other.lazy
            and (self.c is other.c or self.now() == other.now())
        )

    __hash__ = None  # type: ignore[assignment]


class LazyAffine(LazyElementWise):
    r"""Creates a lazy element-wise affine transformation, the identity at first.

    Its free log-scale counts ten times. An optimiser that moves each parameter by about the
    learning rate, as Adam does, would else take most of its steps to fit the scale of the noise.

    Args:
        features: The shape of an event.
        context: The number of context features.
        hidden_features: The numbers of hidden features of the network that sees the context.
        activation: The activation function constructor of that network.
    """

    def __init__(
        self,
        features: Size,
        context: int = 0,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] | None = None,
    ) -> None:
        parameters = {"loc": torch.zeros(features), "log_scale": torch.zeros(features)}
        super().__init__(parameters, context, hidden_features, activation)

    def build(self, c: Tensor | None) -> Transform:
        """Returns the transformation with the parameters that the module has now."""
        loc, log_scale = self.values(c)
        return Affine(loc, log_scale + (_FASTER - 1) * self.log_scale)


class LazySinusoids(LazyElementWise):
    r"""Creates a lazy chain of element-wise sinusoids, the identity at first.

    Args:
        features: The shape of an event.
        context: The number of context features.
        sinusoids: The number of sinusoids in the chain.
        components: The number of components K of each.
        slope: The smallest slope of each.
        solver: How the inverse is computed.
        hidden_features: The numbers of hidden features of the network that sees the context.
        activation: The activation function constructor of that network.
    """

    def __init__(
        self,
        features: Size,
        context: int = 0,
        sinusoids: int = 4,
        components: int = 4,
        slope: float = 1e-3,
        solver: Solver = Solver(),
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] | None = None,
    ) -> None:
        shape = (*features, check_size("sinusoids", sinusoids))
        frequency, phase, weight = initial_sinusoids(
            *shape, components=check_size("components", components)
        )
        parameters = {
            "frequency": frequency,
            "phase": phase,
            "weight": weight,
            "residual": torch.zeros(shape),
            "shift": torch.zeros(shape),
        }
        super().__init__(parameters, context, hidden_features, activation)

        self.slope = slope
        self.solver = solver

    def build(self, c: Tensor | None) -> Transform:
        """Returns the transformation with the parameters that the module has now."""
        return SinusoidalChain(*self.values(c), slope=self.slope, solver=self.solver)
