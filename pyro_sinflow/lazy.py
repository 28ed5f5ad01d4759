"""Lazy transforms: modules that own parameters and, given a context, build a transform."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from pyro.distributions import is_validation_enabled
from torch import Size, Tensor, nn
from torch.distributions import Transform
from zuko.lazy import LazyInverse, LazyTransform
from zuko.nn import MLP, MaskedMLP
from zuko.transforms import MonotonicAffineTransform

from . import _validate as check
from ._torch import can_branch_on
from .autoregressive import NetworkMap, name_of, splitter, treats_features_alike
from .bijection import at_least_float32
from .element_wise import FASTER, SinusoidalChain
from .masks import masked_mlp
from .networks import MaskedNetwork, check_context, check_triangular, weight_dtype
from .pixelcnn import PixelCNN
from .solvers import Solver
from .transforms import TriangularTransform

_CONTEXT = 0.3  # the b of the asinh of contexts
_MASKED = (MaskedNetwork, PixelCNN)  # whose masks make them triangular


class Compressed(NamedTuple):
    """A context that asinh has compressed."""

    value: Tensor | None


class Lazy(nn.Module):
    """A module that builds a transform, given a context: a :class:`zuko.lazy.LazyTransform`.

    It is registered as a virtual subclass. With zuko's class as a base class, its metaclass would
    prevent Pyro from converting the module to a ``PyroModule``.
    """

    compress = False  # whether asinh compresses large values of the context

    def seen(self, c: Tensor | Compressed | None) -> Tensor | None:
        """Returns the context that networks see."""
        if isinstance(c, Compressed):
            return c.value
        if c is None or not self.compress:
            return c
        check.finite_context(c)
        if not c.is_floating_point():
            c = c.to(weight_dtype(self))
        c = (_CONTEXT * at_least_float32(c)).asinh() / _CONTEXT
        check.finite_context(c, computed=True)
        return c

    @property
    def inv(self) -> LazyTransform:
        """The lazy inverse."""
        return LazyInverse(self)


LazyTransform.register(Lazy)


class LazyTriangular(Lazy):
    r"""Creates a lazy triangular transformation.

    .. math:: y_i = \tau(x_i; h_i(x_{<i}, c))

    See Also:
        :class:`pyro_sinflow.TriangularTransform` and
        :class:`zuko.flows.autoregressive.MaskedAutoregressiveTransform`

    Args:
        network: A module that maps x, with shape :math:`(*, \text{features})`, and a context, or
            :py:`None`, to parameters with shape :math:`(*, \text{features}, \text{outputs})`. The
            parameters of a feature must depend only on the features before it, in some order of the
            features.
        features: The shape of an event.
        univariate: The constructor of :math:`\tau`, a :class:`torch.distributions.Transform` that
            acts on each number by itself. It gets a tensor for each of ``shapes``. A class, or a
            ``functools.partial`` of one with numbers, must treat all features alike: the inverse of
            large batches applies it to some features at a time. A function always gets the
            parameters of all features.
        shapes: The shapes of the arguments of ``univariate``, for one feature.
        solver: How the inverse is computed.

    Raises:
        TypeError: If ``network`` is not a module, ``features`` or ``shapes`` holds anything other
            than integers, ``univariate`` is not callable or does not return a transform, or
            ``solver`` is not a :class:`Solver`.
        ValueError: If a size is not positive. When the transformation is called: if the network
            does not return as many outputs for each feature as ``shapes`` needs. When it is called
            for the first time with Pyro's validation on: if the parameters of a feature depend on
            the feature itself.

    Example:
        >>> network = MaskedNetwork((3,), context=2, outputs=2)
        >>> f = zuko.transforms.MonotonicAffineTransform
        >>> t = LazyTriangular(network, (3,), f, shapes=[(), ()])
        >>> t(torch.randn(2))
        TriangularTransform(univariate: MonotonicAffineTransform, features: (3,), context: (2,))
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

        self.network = check.instance("network", network, nn.Module)
        self.features = check.sizes("features", features)
        self.univariate = check.function("univariate", univariate)
        self.shapes = check.shapes("shapes", shapes)
        self.outputs = sum(s.numel() for s in self.shapes)
        self.split = splitter(self.shapes)
        self.solver = check.instance("solver", solver, Solver)
        self._is_checked = False
        self._has_stages = type(network) is MaskedNetwork and treats_features_alike(univariate)

    def extra_repr(self) -> str:
        """Shows the univariate transformation and the shapes of its arguments."""
        shapes = [tuple(s) for s in self.shapes]
        solver = "" if self.solver == Solver() else f", solver: {self.solver}"
        return f"(univariate): {name_of(self.univariate)}, shapes: {shapes}{solver}"

    def meta(self, c: Tensor | None, x: Tensor) -> Transform:
        """Returns the element-wise transformation, given context and features."""
        h = self.network(x, c)
        if h.shape[-len(self.features) - 1 :] != (*self.features, self.outputs):
            raise ValueError(
                f"'network' should return {self.outputs} outputs for each feature, for 'shapes' "
                f"{[*map(tuple, self.shapes)]}, got an output of shape {tuple(h.shape)}."
            )
        known = self._is_checked or type(self.network) in _MASKED
        if not known and h.numel() and is_validation_enabled() and can_branch_on(x):
            check_triangular(self.network, self.features, x, c)
            self._is_checked = True
        tau = self.univariate(*self.split(h))
        if not isinstance(tau, Transform):
            raise TypeError(f"'univariate' should return a Transform, got {type(tau).__name__}.")
        return tau

    def forward(self, c: Tensor | None = None) -> TriangularTransform:
        """Returns the transformation, given a context."""
        c = self.seen(c)
        network = self.network if self._has_stages else None
        masked = self.network if type(self.network) in _MASKED else None
        passes = None
        if isinstance(self.network, MaskedNetwork):
            passes = self.network.passes
            if c is not None or self.network.context > 0:
                check_context(c, self.network.context, self.network.dtype)
        meta, features = partial(self.meta, c), self.features
        function = NetworkMap(
            meta, network, self.univariate, self.shapes, c, features, passes, masked
        )
        return TriangularTransform(function, solver=self.solver)


class LazyElementWise(Lazy):
    """A lazy element-wise transformation with free parameters, plus a function of the context.

    Args:
        parameters: The initial values of the free parameters.
        context: The number of context features.
        hidden_features: The numbers of hidden features of the network that sees the context.
        activation: The activation function constructor of that network.
        adjacency: Which of the context each feature depends on, with shape :math:`(D, C)`, or all.
    """

    def __init__(
        self,
        parameters: Tensor,
        context: int,
        hidden_features: Sequence[int],
        activation: Callable[[], nn.Module] | None,
        adjacency: Tensor | None = None,
    ) -> None:
        super().__init__()

        self.parameter = nn.Parameter(parameters)
        self.context = context
        self.hyper: MLP | MaskedMLP | None = None
        if context == 0 or (adjacency is not None and not adjacency.any()):
            return
        if adjacency is None or bool(adjacency.all()):
            self.hyper = MLP(context, parameters.numel(), hidden_features, activation)
        else:
            seen = adjacency.repeat_interleave(parameters.numel() // len(adjacency), dim=0)
            self.hyper = masked_mlp(seen, hidden_features, activation)
        nn.init.zeros_(self.hyper[-1].weight)
        nn.init.zeros_(self.hyper[-1].bias)

    def parameters_given(self, c: Tensor | None) -> Tensor:
        """Returns the current parameters, given a context."""
        c, parameter = self.seen(c), self.parameter
        if c is not None or self.context > 0:
            check_context(c, self.context, parameter.dtype)
        if c is not None and self.hyper is not None:
            move = self.hyper(c.to(parameter.dtype)).to(parameter.dtype)
            parameter = parameter + move.unflatten(-1, parameter.shape)
        return at_least_float32(parameter)


class LazyAffine(LazyElementWise):
    r"""Creates a lazy element-wise affine transformation. It starts as the identity.

    The free log-scale is a parameter times ten. Otherwise an optimizer that moves each parameter by
    about the learning rate, such as Adam, would need many steps to fit the scale of the noise.
    The parameters are shift and log-scale, with shape :math:`(*, 2)`.
    """

    def forward(self, c: Tensor | None = None) -> Transform:
        """Returns the transformation with the current parameters, given a context."""
        parameters = self.parameters_given(c)
        more = (FASTER - 1) * at_least_float32(self.parameter[..., 1])
        return MonotonicAffineTransform(parameters[..., 0], parameters[..., 1] + more)


class LazySinusoids(LazyElementWise):
    """Creates a lazy chain of element-wise sinusoids. It starts as the identity.

    The arguments are those of :class:`~pyro_sinflow.ConditionalLDU`. The hidden features and the
    activation are those of the network that sees the context.
    """

    def __init__(
        self,
        features: Size,
        context: int = 0,
        sinusoids: int = 4,
        components: int = 4,
        min_slope: float = 1e-3,
        solver: Solver = Solver(),
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] | None = None,
    ) -> None:
        shape = (*features, check.size("sinusoids", sinusoids))
        start = initial_sinusoids(*shape, components=check.size("components", components))
        start = torch.cat((start, torch.zeros(*shape, 1)), dim=-1)
        super().__init__(start, context, hidden_features, activation)

        self.min_slope = min_slope
        self.solver = solver

    def extra_repr(self) -> str:
        """Shows the sizes of the chain."""
        *_, sinusoids, size = self.parameter.shape
        solver = "" if self.solver == Solver() else f", solver: {self.solver}"
        return (
            f"sinusoids: {sinusoids}, components: {size // 3}, min_slope: {self.min_slope}{solver}"
        )

    def forward(self, c: Tensor | None = None) -> SinusoidalChain:
        """Returns the transformation with the current parameters, given a context."""
        return SinusoidalChain(self.parameters_given(c), self.min_slope, self.solver)


def initial_sinusoids(*shape: int, components: int) -> Tensor:
    """Draws the parameters of sinusoids without shifts, with shape ``(*shape, 3K + 1)``.

    Half a period of the slope, pi / (2a), is between 0.4 and 3, from small details to the whole
    range of standardized data. Weights and residual weights are zero.
    """
    frequency = torch.empty(*shape, components).uniform_(math.log(0.5), math.log(4.0)).exp()
    frequency = frequency.expm1().log()  # the inverse of softplus
    phase = torch.empty(*shape, components).uniform_(-math.pi / 2, math.pi / 2)
    return torch.cat((frequency, phase, torch.zeros(*shape, components + 1)), dim=-1)
