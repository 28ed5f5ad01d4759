r"""Transforms that own their parameters, for Pyro, and conditional ones, for Pyro and zuko."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransform
from pyro.distributions.torch_transform import TransformModule
from torch import Size, Tensor, nn
from torch.distributions import Transform
from zuko.lazy import LazyInverse, LazyTransform
from zuko.transforms import AdditiveTransform

from ._checks import (
    check_callable,
    check_flag,
    check_instance,
    check_real,
    check_size,
    check_sizes,
)
from .conditioners import (
    Affine,
    LazySinusoids,
    LazyTriangular,
    initial_sinusoids,
)
from .inversion import Solver
from .networks import MaskedNetwork, check_context, check_order
from .transforms import LDUTransform, SinusoidalTransform


class Sinusoidal(SinusoidalTransform, TransformModule):
    r"""Creates an element-wise sinusoidal transformation that owns its parameters.

    See Also:
        :class:`pyro_sinflow.SinusoidalTransform`

    Args:
        features: The number of features, or their shape.
        components: The number of components K.
        slope: The smallest slope, in :math:`(0, 1)`.
        solver: How the inverse is computed.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive.

    Example:
        >>> t = Sinusoidal(3)
        >>> base = pyro.distributions.Normal(torch.zeros(3), 1.0).to_event(1)
        >>> flow = pyro.distributions.TransformedDistribution(base, [t])
        >>> flow.log_prob(flow.sample((5,))).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int | Sequence[int],
        components: int = 4,
        *,
        slope: float = 1e-3,
        solver: Solver = Solver(),
    ) -> None:
        shape = check_sizes("features", features)
        frequency, phase, weight = initial_sinusoids(
            *shape, components=check_size("components", components)
        )
        parameters = (frequency, phase, weight, torch.zeros(shape), torch.zeros(shape))
        super().__init__(*map(nn.Parameter, parameters), slope=slope, solver=solver, cache_size=1)

    __eq__ = Transform.__eq__
    __hash__ = TransformModule.__hash__  # type: ignore[assignment]


class ConditionalLDU(LazyTransform):
    r"""Creates a lazy LDU block, given a context.

    .. math:: f(x | c) = (L \circ D \circ U)(x | c)

    L and U shift each feature by an amount that depends on the features before, or after, it and on
    the context. D is a chain of sinusoids.

    It speaks zuko's protocol, ``block(c)``, and Pyro's, ``block.condition(c)``, which caches. So
    does ``block.inv``.

    See Also:
        :class:`pyro_sinflow.LDUTransform`

    Args:
        features: The number of features, or their shape.
        context: The number of context features.
        sinusoids: The number of sinusoids in D ("D-scales" in the paper).
        components: The number of components K of each.
        scale: Whether L and U scale features, besides shifting them. The paper's do not.
        max_scale: The largest factor by which they do, greater than 1; one over it is the smallest.
        context_diagonal: Whether the context moves the parameters of D as well.
        order: The rank of each feature in L; U has the opposite order. If :py:`None`, features are
            in ascending order.
        slope: The smallest slope of a sinusoid, in :math:`(0, 1)`.
        network: The constructor of the networks of L and U, which takes what
            :class:`pyro_sinflow.MaskedNetwork` takes. :class:`pyro_sinflow.PixelCNN`
            suits images, and ``partial(MaskedNetwork, shortcut=1.0)`` densities that are fitted
            to data.
        hidden_features: The numbers of hidden features of each network.
        activation: The activation function constructor. If :py:`None`, :class:`torch.nn.ReLU`.
        residual: Whether the masked networks use residual blocks.
        dropout: The probability that a hidden unit is dropped in training. The inverse needs
            ``.eval()`` then, because it sees the network several times.
        solver: How the inverse is computed.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size is not positive, ``order`` no permutation, or a number out of range.

    Example:
        >>> block = ConditionalLDU(3, context=2)
        >>> t = block(torch.randn(2))
        >>> x = torch.randn(5, 3)
        >>> bool(torch.allclose(t.inv(t(x)), x, atol=1e-4))
        True
    """

    def __init__(
        self,
        features: int | Sequence[int],
        context: int = 0,
        *,
        sinusoids: int = 4,
        components: int = 4,
        scale: bool = False,
        max_scale: float = 10.0,
        context_diagonal: bool = False,
        order: Sequence[int] | Tensor | None = None,
        slope: float = 1e-3,
        network: Callable[..., nn.Module] = MaskedNetwork,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] | None = None,
        residual: bool = False,
        dropout: float = 0.0,
        solver: Solver = Solver(),
    ) -> None:
        super().__init__()

        shape = check_sizes("features", features)
        check_size("context", context, minimum=0)
        check_flag("scale", scale)
        check_real("max_scale", max_scale, 1.0, math.inf)
        check_flag("context_diagonal", context_diagonal)
        check_real("slope", slope, 0.0, 1.0)
        check_callable("network", network)
        check_instance("solver", solver, Solver)
        rank = check_order(order, shape)

        def triangular(rank: Tensor) -> LazyTriangular:
            shapes = [()] * (2 if scale else 1)
            masked = network(
                shape,
                context,
                outputs=len(shapes),
                order=rank,
                hidden_features=hidden_features,
                activation=activation,
                residual=residual,
                dropout=dropout,
            )
            univariate = partial(Affine, slope=1 / max_scale) if scale else AdditiveTransform
            return LazyTriangular(masked, shape, univariate, shapes, solver)

        self.features = shape
        self.context = context
        self.context_diagonal = context_diagonal
        self.upper = triangular(len(rank) - 1 - rank)
        self.diagonal = LazySinusoids(
            shape,
            context if context_diagonal else 0,
            sinusoids,
            components,
            slope,
            solver,
            hidden_features,
            activation,
        )
        self.lower = triangular(rank)

    def forward(self, c: Tensor | None = None) -> LDUTransform:
        r"""Returns the block, given a context.

        Args:
            c: The context, with shape :math:`(*, C)`, or :py:`None` if there is none.

        Raises:
            ValueError: If the context is missing, superfluous, not finite or of the wrong shape.
            TypeError: If the context has the wrong dtype.
        """
        check_context(c, self.context, self.diagonal.frequency.dtype)
        diagonal = self.diagonal(c if self.context_diagonal else None)
        # zuko asks for the shape of an event without the context's batch, which is in the base.
        return LDUTransform(self.upper(c), diagonal, self.lower(c), batch_shape=Size())

    def condition(self, context: Tensor | None = None) -> Transform:
        """Returns the block given a context, with a cache, as Pyro's conditional transforms do."""
        parts = self(context).parts
        batch_shape = Size() if context is None else context.shape[:-1]
        return LDUTransform(*parts, batch_shape=batch_shape, cache_size=1)

    @property
    def inv(self) -> ConditionalInverse:
        """The lazy inverse, which speaks both protocols as well."""
        return ConditionalInverse(self)


class ConditionalInverse(LazyInverse):
    """The inverse of a conditional transform, for zuko and for Pyro."""

    def condition(self, context: Tensor | None = None) -> Transform:
        """Returns the inverse given a context, with a cache."""
        return self.transform.condition(context).inv


# Inheriting from zuko's and Pyro's classes at once fails on the method resolution order.
ConditionalTransform.register(ConditionalLDU)
ConditionalTransform.register(ConditionalInverse)


class LDU(LDUTransform, TransformModule):
    r"""Creates an LDU block that owns its parameters.

    The explicit direction is ``LDU(D)(x)``. As a guide, which samples first, use it as it is; as a
    prior or density, which scores first, use ``LDU(D).inv``.

    See Also:
        :class:`pyro_sinflow.LDUTransform`

    Args:
        features: The number of features, or their shape.
        kwargs: Keyword arguments passed to :class:`ConditionalLDU`, without a context.

    Raises:
        TypeError: If an argument has the wrong type, or there is no such option.
        ValueError: If a size is not positive, ``order`` no permutation, or a number out of range.

    Example:
        >>> t = LDU(3)
        >>> isinstance(t, LDUTransform)
        True
        >>> base = pyro.distributions.Normal(torch.zeros(3), 1.0).to_event(1)
        >>> guide = pyro.distributions.TransformedDistribution(base, [t])
        >>> prior = pyro.distributions.TransformedDistribution(base, [t.inv])
        >>> prior.log_prob(guide.sample((5,))).shape
        torch.Size([5])
    """

    def __init__(self, features: int | Sequence[int], **kwargs: Any) -> None:
        if "context" in kwargs:
            raise TypeError("'context' is not an option of LDU: use ConditionalLDU.")
        # Not LDUTransform's: it would store parts, which here are made from the parameters anew.
        super(LDUTransform, self).__init__(cache_size=1)

        self.block = ConditionalLDU(features, **kwargs)
        self.batch_shape = Size()
        self._event_dim = len(self.block.features)

    @property
    def upper(self) -> Transform:  # type: ignore[override]
        """The map U."""
        return self.block.upper()

    @property
    def diagonal(self) -> Transform:  # type: ignore[override]
        """The map D."""
        return self.block.diagonal()

    @property
    def lower(self) -> Transform:  # type: ignore[override]
        """The map L."""
        return self.block.lower()

    __eq__ = Transform.__eq__
    __hash__ = TransformModule.__hash__  # type: ignore[assignment]


def sinusoidal(features: int | Sequence[int], **kwargs: Any) -> Sinusoidal:
    """Creates a :class:`Sinusoidal`, as Pyro's helper functions do.

    Args:
        features: The number of features, or their shape.
        kwargs: Keyword arguments passed to :class:`Sinusoidal`.
    """
    return Sinusoidal(features, **kwargs)


def ldu(features: int | Sequence[int], **kwargs: Any) -> LDU:
    """Creates an :class:`LDU`, as Pyro's helper functions do.

    Args:
        features: The number of features, or their shape.
        kwargs: Keyword arguments passed to :class:`LDU`.

    Example:
        >>> from pyro.distributions.transforms import iterated
        >>> flow = iterated(2, ldu, 3, scale=True)
        >>> flow(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """
    return LDU(features, **kwargs)


def conditional_ldu(features: int | Sequence[int], context: int, **kwargs: Any) -> ConditionalLDU:
    """Creates a :class:`ConditionalLDU`, as Pyro's helper functions do.

    Args:
        features: The number of features, or their shape.
        context: The number of context features.
        kwargs: Keyword arguments passed to :class:`ConditionalLDU`.
    """
    return ConditionalLDU(features, context, **kwargs)
