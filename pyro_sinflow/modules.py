r"""Transforms that own their parameters, for Pyro."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Size, Tensor, nn
from torch.distributions import Transform

from . import _validate as check
from .element_wise import SinusoidalTransform
from .lazy import ConditionalLDU, initial_sinusoids
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
    __hash__ = TransformModule.__hash__  # type: ignore[assignment]


class LDU(LDUTransform, TransformModule):
    r"""Creates an LDU block that owns its parameters.

    .. math:: f(x) = (L \circ D \circ U)(x)

    L and U scale and shift each feature by amounts that depend on the features before, or after,
    it. D is a chain of sinusoids. The block of the paper is ``scale=False``: its L and U shift
    features only.

    The explicit direction is ``LDU(D)(x)``. As a guide, which samples first, use it as it is; as a
    prior or density, which scores first, use ``LDU(D).inv``.

    See Also:
        :class:`pyro_sinflow.LDUTransform`, and :class:`pyro_sinflow.ConditionalLDU` for blocks
        that depend on a context.

    Args:
        features: The number of features, or their shape.
        sinusoids: The number of sinusoids in D ("D-scales" in the paper).
        components: The number of components K of each.
        scale: Whether L and U scale features, besides shifting them.
        max_scale: The largest factor by which they do, greater than 1; one over it is the smallest.
        order: The rank of each feature in L; U has the opposite order. If :py:`None`, features are
            in ascending order.
        min_slope: The smallest slope of a sinusoid, in :math:`(0, 1)`.
        network: The constructor of the networks of L and U, which takes what
            :class:`pyro_sinflow.MaskedNetwork` takes. :class:`pyro_sinflow.PixelCNN` suits images.
        shortcut: How many times faster than other weights a linear map from features to shifts
            learns, which stands beside each network. If :py:`None`, there is none. 1 suits
            densities that are fitted to data.
        hidden_features: The numbers of hidden features of each network.
        activation: The activation function constructor. If :py:`None`, :class:`torch.nn.ReLU`.
        residual: Whether the masked networks use residual blocks.
        dropout: The probability that a hidden unit is dropped in training. The inverse needs
            ``.eval()`` then, because it evaluates the network several times.
        solver: How the inverse is computed.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size is not positive, ``order`` no permutation, a number out of range, or
            ``activation`` mixes units.

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
        shortcut: float | None = None,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] | None = None,
        residual: bool = False,
        dropout: float = 0.0,
        solver: Solver = Solver(),
    ) -> None:
        # LDUTransform's would keep its transforms, but they are built from parameters each time.
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
            shortcut=shortcut,
            hidden_features=hidden_features,
            activation=activation,
            residual=residual,
            dropout=dropout,
            solver=solver,
        )
        self.batch_shape = Size()
        self._event_shape = self.block.features
        self._event_dim = len(self.block.features)

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """The maps U, D and L, with the parameters that the module has now."""
        return self.block.parts()

    def _checked(self, name: str, x: Any) -> Tensor:
        _check_given(name, x, "ConditionalLDU")
        return super()._checked(name, x)

    __repr__ = nn.Module.__repr__
    __eq__ = Transform.__eq__
    __hash__ = TransformModule.__hash__  # type: ignore[assignment]


def _check_given(name: str, x: Any, lazy: str) -> None:
    """Requires an input, where one of zuko's flows would give a context, or None."""
    if x is None:
        raise TypeError(
            f"'{name}' should be a tensor, got NoneType. If this is a part of one of zuko's flows, "
            f"use {lazy} instead."
        )


# The names that Pyro gives such helpers: iterated(3, ldu, features), say.
ldu = LDU
sinusoidal = Sinusoidal
conditional_ldu = ConditionalLDU
