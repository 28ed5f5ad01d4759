r"""Transforms that own their parameters, for Pyro."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import Transform

from . import _validate as check
from .block import ConditionalLDU
from .element_wise import SinusoidalTransform
from .lazy import initial_sinusoids
from .networks import MaskedNetwork
from .solvers import Solver
from .transforms import Composition, LDUTransform


class Sinusoidal(SinusoidalTransform, TransformModule):
    r"""Creates an element-wise sinusoidal transformation that owns its parameters.

    See Also:
        :class:`pyro_sinflow.SinusoidalTransform`

    Args:
        features: The number of features, or their shape.
        components: The number of components K.
        min_slope: The smallest slope, in :math:`(0, 1)`.
        solver: How the inverse is computed.

    Raises:
        TypeError: If a size is not an integer, ``min_slope`` is not a number, or ``solver`` is not
            a :class:`Solver`.
        ValueError: If a size is not positive, or ``min_slope`` is out of range.

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
        min_slope: float = 1e-3,
        solver: Solver = Solver(),
    ) -> None:
        shape = check.sizes("features", features)
        k = check.size("components", components)
        start = initial_sinusoids(*shape, components=k)
        parameters = (*start[..., :-1].split(k, dim=-1), start[..., -1], torch.zeros(shape))
        super().__init__(
            *(nn.Parameter(p.clone()) for p in parameters),
            min_slope=min_slope,
            solver=solver,
            cache_size=1,
        )

    def _checked(self, name: str, x: Any) -> Tensor:
        _check_given(name, x, "zuko.lazy.UnconditionalTransform(SinusoidalTransform, ...)")
        return super()._checked(name, x)

    __eq__ = Transform.__eq__
    __hash__ = TransformModule.__hash__


class LDU(LDUTransform, TransformModule):
    r"""Creates an LDU block that owns its parameters.

    .. math:: f(x) = (L \circ D \circ U)(x)

    L scales and shifts each feature by amounts that depend on the features before it, and U by
    amounts that depend on the features after it. D is a chain of sinusoids. The block of the paper
    is ``scale=False``: its L and U only shift.

    The explicit direction is ``LDU(D)(x)``. A guide draws samples first: use the block itself. A
    prior or a density scores first: use ``LDU(D).inv``.

    See Also:
        :class:`pyro_sinflow.LDUTransform`, and :class:`pyro_sinflow.ConditionalLDU` for blocks
        that depend on a context.

    Args:
        features: The number of features, or their shape.
        sinusoids: The number of sinusoids in D ("D-scales" in the paper).
        components: The number of components K of each.
        scale: Whether L and U scale features in addition to shifting them.
        max_scale: The largest factor of L and U, greater than 1. The smallest is its reciprocal.
        order: The rank of each feature in L; U has the opposite order. If :py:`None`, features are
            in ascending order.
        min_slope: The smallest slope of a sinusoid, in :math:`(0, 1)`.
        network: The constructor of the networks of L and U, with the arguments of
            :class:`pyro_sinflow.MaskedNetwork`. Use :class:`pyro_sinflow.PixelCNN` for images.
        hidden_features: The numbers of hidden features of each network.
        activation: The activation function constructor. If :py:`None`, :class:`torch.nn.ReLU`.
        residual: Whether the masked networks use residual blocks.
        dropout: The probability, in :math:`[0, 1)`, that a hidden unit is dropped in training. Call
            ``.eval()`` before you use the inverse, which evaluates the network several times.
        solver: How the inverse is computed.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size is not positive, ``order`` is not a permutation, a number is out of
            range, or ``activation`` is not element-wise.

    Example:
        >>> t = LDU(3)
        >>> base = pyro.distributions.Normal(torch.zeros(3), 1.0).to_event(1)
        >>> guide = pyro.distributions.TransformedDistribution(base, [t])
        >>> prior = pyro.distributions.TransformedDistribution(base, [t.inv])
        >>> prior.log_prob(guide.sample((5,))).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int | Sequence[int],
        *,
        sinusoids: int = 4,
        components: int = 4,
        scale: bool = True,
        max_scale: float = 10.0,
        order: Sequence[int] | Tensor | None = None,
        min_slope: float = 1e-3,
        network: Callable[..., nn.Module] = MaskedNetwork,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] | None = None,
        residual: bool = False,
        dropout: float = 0.0,
        solver: Solver = Solver(),
    ) -> None:
        # LDUTransform.__init__ would store transforms; here they are built anew from parameters.
        super(Composition, self).__init__(cache_size=1)

        self.block = ConditionalLDU(
            features,
            sinusoids=sinusoids,
            components=components,
            scale=scale,
            max_scale=max_scale,
            order=order,
            min_slope=min_slope,
            network=network,
            hidden_features=hidden_features,
            activation=activation,
            residual=residual,
            dropout=dropout,
            solver=solver,
        )
        self._event_shape = self.block.features
        self._event_dim = len(self.block.features)

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """The maps U, D and L, with the current parameters."""
        return self.block.parts()

    def _checked(self, name: str, x: Any) -> Tensor:
        _check_given(name, x, "ConditionalLDU")
        return super()._checked(name, x)

    __repr__ = nn.Module.__repr__
    __eq__ = Transform.__eq__
    __hash__ = TransformModule.__hash__


def _check_given(name: str, x: Any, lazy: str) -> None:
    """Raises a helpful error if x is None, as it is when a flow of zuko calls the transform."""
    if x is None:
        raise TypeError(
            f"'{name}' should be a tensor, got NoneType. If this is part of a flow of zuko, "
            f"use {lazy} instead."
        )


# Helpers named as those of Pyro, for example iterated(3, ldu, features).
ldu = LDU
sinusoidal = Sinusoidal
conditional_ldu = ConditionalLDU
