"""Flows for zuko: the Sinusoidal Flow, and the fast inverse for zuko's own flows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Transform
from zuko.distributions import DiagNormal
from zuko.flows import MaskedAutoregressiveTransform
from zuko.lazy import (
    Flow,
    LazyComposedTransform,
    LazyInverse,
    LazyTransform,
    UnconditionalDistribution,
)
from zuko.transforms import AutoregressiveTransform

from ._checks import (
    check_callable,
    check_choice,
    check_flag,
    check_instance,
    check_real,
    check_size,
    check_sizes,
)
from .conditioners import (
    LazyAffine,
    LazyTriangular,
    affine_chain,
    dependencies,
    initial_sinusoids,
)
from .inversion import Solver
from .modules import ConditionalLDU
from .networks import MaskedNetwork
from .substitution import substitute
from .transforms import TriangularTransform

_network = partial(MaskedNetwork, shortcut=1.0)


class SinusoidalFlow(Flow):
    r"""Creates a Sinusoidal Flow.

    Scoring is explicit, sampling takes a few passes through each network. An element-wise affine
    map stands at the noise end, because sinusoids leave the scale of the tails as it is.

    Warning:
        It is recommended to standardize features (zero mean, unit variance) before training: the
        frequencies start with periods that suit such data.

    References:
        | Sinusoidal Flow: A Fast Invertible Autoregressive Flow (Wei, 2021)
        | https://arxiv.org/abs/2110.13344

    Args:
        features: The number of features, or their shape.
        context: The number of context features.
        transforms: The number of transformations.
        randperm: Whether each transformation has a random order of the features. If :py:`False`,
            the order is ascending; for the autoregressive conditioner, descending every other time.
        conditioner: ``"independent"`` for the LDU blocks of the paper, whose sinusoids do not
            depend on the features; ``"autoregressive"`` for its Eq. 11 in full, where all
            parameters of an affine map and of a chain of sinusoids come from a masked network.
        sinusoids: The number of sinusoids in a chain. If :py:`None`, 4 for the independent
            conditioner and 2 for the autoregressive one.
        network: The constructor of the networks: a masked MLP, with a linear shortcut from features
            to shifts, or what else takes the options of :class:`pyro_sinflow.MaskedNetwork` and,
            for the autoregressive conditioner, has its method ``set_bias``. Where rows are many,
            ``partial(MaskedNetwork, shortcut=8.0)`` gains more, by a shortcut that learns faster.
        max_scale: The largest factor, greater than 1, by which each of the affine maps whose scale
            depends on other features stretches a feature; one over it is the smallest. Larger ones
            gain little density, and send the odd sample far out into the tails.
        kwargs: Keyword arguments passed to :class:`ConditionalLDU`, of which the autoregressive
            conditioner takes ``components``, ``slope``, ``hidden_features``, ``activation``,
            ``residual``, ``dropout`` and ``solver``.

    Raises:
        TypeError: If an argument has the wrong type, or an option does not suit the conditioner.
        ValueError: If a size is not positive, or a number out of range.

    Example:
        >>> flow = SinusoidalFlow(3, context=4, transforms=2)
        >>> c = torch.randn(4)
        >>> x = flow(c).sample((5,))
        >>> flow(c).log_prob(x).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int | Sequence[int],
        context: int = 0,
        transforms: int = 3,
        randperm: bool = False,
        conditioner: str = "independent",
        sinusoids: int | None = None,
        network: Callable[..., nn.Module] = _network,
        max_scale: float = 2.0,
        **kwargs: Any,
    ) -> None:
        shape = check_sizes("features", features)
        check_size("context", context, minimum=0)
        check_size("transforms", transforms)
        check_flag("randperm", randperm)
        check_choice("conditioner", conditioner, ("independent", "autoregressive"))
        if "order" in kwargs:
            raise TypeError("'order' is not an option of SinusoidalFlow: use 'randperm'.")
        ascending = torch.arange(shape.numel())

        independent = conditioner == "independent"
        for name in ("scale", "context_diagonal"):
            if name in kwargs and not independent:
                raise TypeError(f"'{name}' is an option of the independent conditioner alone.")
        make: Callable[..., LazyTransform] = ConditionalLDU if independent else _autoregressive
        if sinusoids is None:
            sinusoids = 4 if independent else 2

        lazy: list[LazyTransform] = []
        for i in range(transforms):
            order = torch.randperm(shape.numel()) if randperm else ascending
            if i % 2 and not randperm and not independent:
                order = order.flip(0)
            lazy.append(
                make(
                    shape,
                    context,
                    sinusoids=sinusoids,
                    order=order,
                    network=network,
                    max_scale=max_scale,
                    **kwargs,
                )
            )
        options = {k: kwargs[k] for k in ("hidden_features", "activation") if k in kwargs}
        lazy.append(LazyAffine(shape, context, **options))

        base = UnconditionalDistribution(
            DiagNormal,
            loc=torch.zeros(shape),
            scale=torch.ones(shape),
            ndims=len(shape),
            buffer=True,
        )
        super().__init__(lazy, base)


def _autoregressive(
    features: Size,
    context: int,
    *,
    sinusoids: int,
    order: Tensor,
    network: Callable[..., nn.Module],
    max_scale: float,
    components: int = 4,
    slope: float = 1e-3,
    hidden_features: Sequence[int] = (64, 64),
    activation: Callable[[], nn.Module] | None = None,
    residual: bool = False,
    dropout: float = 0.0,
    solver: Solver = Solver(),
) -> LazyTriangular:
    """Creates a lazy triangular transform of affine maps and sinusoids, conditioned in full.

    Args:
        features: The shape of an event.
        context: The number of context features.
        sinusoids: The number of sinusoids.
        order: The rank of each feature.
        network: The constructor of the network, which has to have a method ``set_bias``.
        max_scale: The largest factor of the affine maps, greater than 1.
        components: The number of components K of each sinusoid.
        slope: The smallest slope of a sinusoid, in :math:`(0, 1)`.
        hidden_features: The numbers of hidden features.
        activation: The activation function constructor.
        residual: Whether the network uses residual blocks.
        dropout: The probability that a hidden unit is dropped in training.
        solver: How the inverse is computed.
    """
    check_size("sinusoids", sinusoids)
    check_size("components", components)
    check_real("slope", slope, 0.0, 1.0)
    check_real("max_scale", max_scale, 1.0, math.inf)
    check_callable("network", network)
    check_instance("solver", solver, Solver)
    shapes = [(), (), *[(sinusoids, components)] * 3, (sinusoids,)]
    outputs = sum(Size(s).numel() for s in shapes)

    masked: Any = network(
        features,
        context,
        outputs,
        order=order,
        hidden_features=hidden_features,
        activation=activation,
        residual=residual,
        dropout=dropout,
    )
    if not hasattr(masked, "set_bias"):
        raise TypeError(
            "'network' should make a network with a method 'set_bias' for the autoregressive "
            f"conditioner, got {type(masked).__name__}."
        )
    n = features.numel()
    masked.set_bias(
        torch.cat(
            (
                torch.zeros(n, 2),
                *(p.flatten(1) for p in initial_sinusoids(n, sinusoids, components=components)),
                torch.zeros(n, sinusoids),
            ),
            dim=1,
        )
    )
    univariate = partial(affine_chain, max_scale=max_scale, slope=slope, solver=solver)

    return LazyTriangular(masked, features, univariate, shapes, solver)


def _unwrap(univariate: Any) -> tuple[Any, list[Tensor]]:
    """Returns the constructor inside of partials, and the tensors that are bound to it."""
    bound: list[Tensor] = []
    while isinstance(univariate, partial):
        values = (*univariate.args, *univariate.keywords.values())
        bound.extend(v for v in values if isinstance(v, Tensor))
        univariate = univariate.func
    return univariate, bound


def _lowered(function: Callable[[Tensor], Transform], dtype: torch.dtype, x: Tensor) -> Transform:
    """Evaluates a conditioner whose weights are of half precision."""
    return function(x.to(dtype))


class FastInverse(LazyTransform):
    r"""Wraps one of zuko's autoregressive transformations, to invert it in fewer passes.

    See Also:
        :class:`pyro_sinflow.TriangularTransform`

    Args:
        transform: A lazy autoregressive transformation, whose weights are shared.
        solver: How the inverse is computed.

    Raises:
        TypeError: If the transformation is not autoregressive.

    Example:
        >>> t = FastInverse(zuko.flows.MaskedAutoregressiveTransform(8))
        >>> x = torch.randn(5, 8)
        >>> bool(torch.allclose(t().inv(t()(x)), x, atol=1e-4))
        True
    """

    def __init__(self, transform: MaskedAutoregressiveTransform, solver: Solver = Solver()) -> None:
        super().__init__()

        self.transform = check_instance("transform", transform, MaskedAutoregressiveTransform)
        self.solver = check_instance("solver", solver, Solver)

    def forward(self, c: Tensor | None = None) -> TriangularTransform:
        """Returns the transformation, given a context."""
        lazy = self.transform
        t = check_instance("transform(c)", lazy(c), AutoregressiveTransform)
        # Transforms run in at least float32, zuko's networks in the dtype of their weights.
        dtype = next(lazy.parameters()).dtype
        meta = partial(_lowered, t.meta, dtype) if dtype.itemsize < 4 else t.meta
        univariate, bound = _unwrap(lazy.univariate)
        alike = isinstance(univariate, type) and issubclass(univariate, Transform) and not bound
        standard = all(
            getattr(type(lazy), name) is getattr(MaskedAutoregressiveTransform, name)
            for name in ("forward", "meta")
        )
        network = lazy.hyper if standard and alike else None
        return TriangularTransform(
            meta,
            phi=partial(dependencies, self, c, *bound),
            passes=t.passes,
            substitute=partial(substitute, network, lazy.univariate, lazy.shapes, c, 1),
            solver=self.solver,
        )


def fast_inverse(flow: Flow, solver: Solver = Solver()) -> Flow:
    """Gives the autoregressive transformations of a flow the fast inverse.

    Args:
        flow: One of zuko's flows, or of the same make: MAF, NSF, NAF, ...
        solver: How the inverses are computed.

    Returns:
        A flow that shares all weights with the given one, and has the same density.

    Raises:
        TypeError: If ``flow`` is not a flow.

    Example:
        >>> nsf = zuko.flows.NSF(8)
        >>> fast = fast_inverse(nsf)
        >>> x = fast().sample((5,))
        >>> bool(torch.allclose(fast().log_prob(x), nsf().log_prob(x)))
        True
    """
    check_instance("flow", flow, Flow)
    check_instance("solver", solver, Solver)

    def convert(lazy: LazyTransform) -> LazyTransform:
        if isinstance(lazy, MaskedAutoregressiveTransform):
            return FastInverse(lazy, solver)
        if isinstance(lazy, LazyComposedTransform):
            return LazyComposedTransform(*map(convert, lazy.transforms))
        if isinstance(lazy, LazyInverse):
            return convert(lazy.transform).inv
        return lazy

    return Flow(convert(flow.transform), flow.base)
