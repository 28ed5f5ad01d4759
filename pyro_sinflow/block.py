"""LDU blocks as a lazy transform, for zuko and, given a context, for Pyro."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pyro.distributions.conditional import ConditionalTransform
from torch import Size, Tensor, nn
from torch.distributions import Transform
from zuko.lazy import LazyInverse, LazyTransform
from zuko.transforms import AdditiveTransform, MonotonicAffineTransform

from . import _validate as check
from .lazy import Lazy, LazySinusoids, LazyTriangular
from .masks import check_order
from .networks import MaskedNetwork, check_context
from .solvers import Solver
from .transforms import BuiltAtUse, LDUTransform


class BuiltLDU(BuiltAtUse, LDUTransform):
    """An LDU block whose maps are built at each use."""


class ConditionalLDU(Lazy):
    r"""Creates a lazy LDU block, given a context.

    .. math:: f(x | c) = (L \circ D \circ U)(x | c)

    zuko calls ``block(c)``, and Pyro calls ``block.condition(c)``, which returns a transform with a
    cache. ``block.inv`` supports both as well.

    See Also:
        :class:`pyro_sinflow.LDU` and :class:`pyro_sinflow.LDUTransform`

    Args:
        features: The number of features, or their shape.
        context: The number of context features.
        context_diagonal: Whether D depends on the context, too.
        sinusoids, ..., solver: The options of :class:`pyro_sinflow.LDU`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size is not positive, ``order`` is not a permutation, a number is out of
            range, or ``activation`` is not element-wise.

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
        scale: bool = True,
        max_scale: float = 10.0,
        context_diagonal: bool = False,
        order: Sequence[int] | Tensor | None = None,
        min_slope: float = 1e-3,
        network: Callable[..., nn.Module] = MaskedNetwork,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] | None = None,
        residual: bool = False,
        dropout: float = 0.0,
        solver: Solver = Solver(),
    ) -> None:
        super().__init__()

        shape = check.sizes("features", features)
        check.size("context", context, minimum=0)
        check.flag("scale", scale)
        check.real("max_scale", max_scale, 1.0, math.inf)
        check.flag("context_diagonal", context_diagonal)
        check.real("min_slope", min_slope, 0.0, 1.0)
        check.function("network", network)
        rank = check_order(order, shape)
        options: dict[str, Any] = {
            "hidden_features": hidden_features,
            "activation": activation,
            "residual": residual,
            "dropout": dropout,
        }

        def triangular(rank: Tensor) -> LazyTriangular:
            masked = network(shape, context, outputs=1 + scale, order=rank, **options)
            if scale:
                univariate = partial(MonotonicAffineTransform, slope=1 / max_scale)
                return LazyTriangular(masked, shape, univariate, [(), ()], solver)
            return LazyTriangular(masked, shape, AdditiveTransform, [()], solver)

        self.features = shape
        self.context = context
        self.context_diagonal = context_diagonal
        self.upper = triangular(len(rank) - 1 - rank)
        self.diagonal = LazySinusoids(
            shape,
            context if context_diagonal else 0,
            sinusoids,
            components,
            min_slope,
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
            ValueError: If the context is missing, is given to a block without context features, is
                not finite, or has the wrong shape.
            TypeError: If the context has the wrong dtype.
        """
        check_context(self.seen(c), self.context, self.diagonal.parameter.dtype)
        return BuiltLDU(partial(self.parts, c), self.features)

    def parts(self, c: Tensor | None = None) -> tuple[Transform, Transform, Transform]:
        """Returns the maps U, D and L, given a context."""
        c = self.seen(c)
        diagonal = self.diagonal(c if self.context_diagonal else None)
        return self.upper(c), diagonal, self.lower(c)

    def condition(self, context: Tensor | None = None) -> Transform:
        """Returns the block given a context, with a cache, as Pyro's conditional transforms do.

        Args and errors are those of :meth:`forward`.
        """
        t: Any = self.forward(context).with_cache()
        t.batch_shape = Size() if context is None else context.shape[:-1]
        return t

    @property
    def inv(self) -> LazyTransform:
        """The lazy inverse, for zuko and for Pyro."""
        return ConditionalInverse(self)


class ConditionalInverse(LazyInverse):
    """The inverse of a conditional transform, for zuko and for Pyro."""

    def condition(self, context: Tensor | None = None) -> Transform:
        """Returns the inverse given a context, with a cache."""
        return self.transform.condition(context).inv


# Inheriting from zuko's and Pyro's classes at once fails on the method resolution order.
ConditionalTransform.register(ConditionalLDU)
ConditionalTransform.register(ConditionalInverse)
