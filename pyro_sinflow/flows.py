"""Flows for zuko: the Sinusoidal Flow, and the fast inverse for zuko's own flows."""

from __future__ import annotations

import math
import warnings
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

from . import _validate as check
from .autoregressive import NetworkMap
from .element_wise import Affine, SinusoidalChain
from .lazy import ConditionalLDU, Lazy, LazyAffine, LazyTriangular, initial_sinusoids
from .masks import check_adjacency
from .networks import MaskedNetwork, weight_dtype
from .solvers import Solver
from .transforms import Composition, TriangularTransform


class _LazyComposition(LazyComposedTransform):
    """Composes lazy transforms to a transform that checks its input once."""

    def forward(self, c: Tensor | None = None) -> Composition:
        """Returns the composition, given a context."""
        transforms = [t(c) for t in self.transforms]
        context_shape = Size() if c is None else c.shape[:-1]
        return Composition(*transforms, context_shape=context_shape)


class SinusoidalFlow(Flow):
    r"""Creates a Sinusoidal Flow.

    The density of given features is computed in one pass; sampling takes a few passes through each
    network. The last transformation, next to the noise, is an element-wise affine map, because
    sinusoids do not change the scale of the tails.

    Warning:
        It is recommended to standardize features (zero mean, unit variance) before training. The
        initial frequencies are chosen for such data.

    References:
        | Sinusoidal Flow: A Fast Invertible Autoregressive Flow (Wei, 2021)
        | https://arxiv.org/abs/2110.13344

    Args:
        features: The number of features, or their shape.
        context: The number of context features.
        transforms: The number of transformations.
        randperm: Whether each transformation has a random order of the features. If :py:`False`,
            the order is ascending; for the autoregressive conditioner it alternates between
            ascending and descending.
        conditioner: ``"independent"`` for LDU blocks, whose sinusoids do not depend on the
            features; ``"autoregressive"`` for the paper's Eq. 11, where a masked network computes
            all parameters of an affine map and a chain of sinusoids.
        adjacency: Which features and context features each feature depends on, instead of an order:
            the matrix that :class:`pyro_sinflow.MaskedNetwork` takes. It is an option of the
            autoregressive conditioner. All transformations share it, as in zuko's MAF: with one of
            them, a feature depends on its parents; with several, also on the ancestors that as many
            steps reach.
        scale: Whether LDU blocks scale features in addition to shifting them. The block of the
            paper is ``scale=False``. The autoregressive conditioner always scales.
        max_scale: The largest factor, greater than 1, of each affine map that depends on other
            features. The smallest is its reciprocal. Larger bounds improve densities little, and
            a few samples may then lie far out in the tails.
        sinusoids: The number of sinusoids in a chain. If :py:`None`, 4 for the independent
            conditioner and 2 for the autoregressive one.
        components: The number of components K of each sinusoid.
        context_diagonal: Whether the sinusoids of LDU blocks depend on the context.
        min_slope: The smallest slope of a sinusoid, in :math:`(0, 1)`.
        network: The constructor of the networks, with the arguments of
            :class:`pyro_sinflow.MaskedNetwork`. For the autoregressive conditioner, the network
            needs a method ``set_bias``.
        shortcut: The learning-rate factor of a linear map from features to shifts that is added to
            each network. If :py:`None`, 1 for masked networks, and no such map for others. With
            many rows of data, 8 is often better.
        hidden_features: The numbers of hidden features of each network.
        activation: The activation function constructor. If :py:`None`, :class:`torch.nn.ReLU`.
        residual: Whether the masked networks use residual blocks.
        dropout: The probability, in :math:`[0, 1)`, that a hidden unit is dropped in training. Call
            ``.eval()`` before sampling.
        solver: How the inverse is computed.

    Raises:
        TypeError: If an argument has the wrong type, or an option does not apply to the
            conditioner.
        ValueError: If a size is not positive, a number is out of range, ``conditioner`` is unknown,
            ``activation`` is not element-wise, or ``adjacency`` is not what
            :class:`pyro_sinflow.MaskedNetwork` takes or is given with ``randperm``.

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
        *,
        conditioner: str = "independent",
        scale: bool = True,
        max_scale: float = 2.0,
        sinusoids: int | None = None,
        components: int = 4,
        context_diagonal: bool = False,
        min_slope: float = 1e-3,
        network: Callable[..., nn.Module] = MaskedNetwork,
        shortcut: float | None = None,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] | None = None,
        residual: bool = False,
        dropout: float = 0.0,
        solver: Solver = Solver(),
        adjacency: Sequence[Sequence[int]] | Tensor | None = None,
    ) -> None:
        shape = check.sizes("features", features)
        check.size("context", context, minimum=0)
        check.size("transforms", transforms)
        check.flag("randperm", randperm)
        check.choice("conditioner", conditioner, ("independent", "autoregressive"))
        check.flag("scale", scale)
        check.flag("context_diagonal", context_diagonal)
        independent = conditioner == "independent"
        seen = None
        if adjacency is not None:
            seen = _context_seen(adjacency, shape, context, independent, randperm)
        if not independent and (not scale or context_diagonal):
            name = "context_diagonal" if scale else "scale"
            raise TypeError(f"'{name}' is an option of the independent conditioner only.")
        if shortcut is None and network is MaskedNetwork:
            shortcut = 1.0
        options: dict[str, Any] = {
            "max_scale": max_scale,
            "sinusoids": (4 if independent else 2) if sinusoids is None else sinusoids,
            "components": components,
            "min_slope": min_slope,
            "network": network,
            "shortcut": shortcut,
            "hidden_features": hidden_features,
            "activation": activation,
            "residual": residual,
            "dropout": dropout,
            "solver": solver,
        }
        make: Callable[..., Lazy] = _autoregressive
        if independent:
            make = partial(ConditionalLDU, scale=scale, context_diagonal=context_diagonal)

        lazy: list[Lazy] = []
        ascending = torch.arange(shape.numel())
        for i in range(transforms):
            order = torch.randperm(shape.numel()) if randperm else ascending
            if i % 2 and not randperm and not independent:
                order = order.flip(0)
            structure = {"order": order} if adjacency is None else {"adjacency": adjacency}
            lazy.append(make(shape, context, **structure, **options))
        lazy.append(LazyAffine(shape, context, hidden_features, activation, seen))

        base = UnconditionalDistribution(
            DiagNormal,
            loc=torch.zeros(shape),
            scale=torch.ones(shape),
            ndims=len(shape),
            buffer=True,
        )
        super().__init__(_LazyComposition(*lazy), base)


def _context_seen(
    adjacency: Any, features: Size, context: int, independent: bool, randperm: bool
) -> Tensor:
    """Requires an adjacency matrix, and options that it suits.

    Returns:
        Which context features each feature depends on, with shape (D, C).
    """
    if independent:
        raise TypeError(
            "'adjacency' is an option of the autoregressive conditioner alone: in an LDU block, U "
            "has the opposite order of L, so that each feature depends on all connected ones."
        )
    if randperm:
        raise ValueError("'randperm' should be False where there is an 'adjacency'.")
    seen, _ = check_adjacency(adjacency, features, context)
    return seen[:, features.numel() :]


def affine_sinusoids(
    shift: Tensor,
    scale: Tensor,
    parameters: Tensor,
    max_scale: float,
    min_slope: float,
    solver: Solver,
) -> Composition:
    """Composes an affine map and a chain of sinusoids, from the outputs of a conditioner."""
    return Composition(
        Affine(shift, scale, max_scale), SinusoidalChain(parameters, min_slope, solver)
    )


def _autoregressive(
    features: Size,
    context: int,
    *,
    max_scale: float,
    sinusoids: int,
    components: int,
    min_slope: float,
    network: Callable[..., nn.Module],
    shortcut: float | None,
    solver: Solver,
    **options: Any,
) -> LazyTriangular:
    """Creates a lazy triangular transform of affine maps and sinusoids.

    The arguments are those of :class:`SinusoidalFlow` and the options of the network, its order or
    adjacency among them.
    """
    check.size("sinusoids", sinusoids)
    check.size("components", components)
    check.real("min_slope", min_slope, 0.0, 1.0)
    check.real("max_scale", max_scale, 1.0, math.inf)
    check.function("network", network)
    check.instance("solver", solver, Solver)
    shapes = [(), (), (sinusoids, 3 * components + 1)]
    outputs = 2 + sinusoids * (3 * components + 1)
    if shortcut is not None:
        options["shortcut"] = shortcut

    masked: Any = network(features, context, outputs, **options)
    if not hasattr(masked, "set_bias"):
        raise TypeError(
            "'network' should make a network with a method 'set_bias' for the autoregressive "
            f"conditioner, got {type(masked).__name__}."
        )
    n = features.numel()
    start = initial_sinusoids(n, sinusoids, components=components).flatten(1)
    masked.set_bias(torch.cat((torch.zeros(n, 2), start), dim=1))
    univariate = partial(affine_sinusoids, max_scale=max_scale, min_slope=min_slope, solver=solver)

    return LazyTriangular(masked, features, univariate, shapes, solver)


def _applies_alike(univariate: Any) -> bool:
    """Whether a constructor treats all features alike, so that it can be applied to a subset.

    It may not if tensors are bound to it, as they may have an entry for each feature.
    """
    while isinstance(univariate, partial):
        values = (*univariate.args, *univariate.keywords.values())
        if any(isinstance(v, Tensor) for v in values):
            return False
        univariate = univariate.func
    return isinstance(univariate, type) and issubclass(univariate, Transform)


def _lowered(function: Callable[[Tensor], Transform], network: nn.Module, x: Tensor) -> Transform:
    """Evaluates a conditioner in half precision, if its network has weights of that precision."""
    dtype = weight_dtype(network)
    return function(x.to(dtype) if dtype.itemsize < 4 else x)


class FastInverse(Lazy):
    r"""Wraps an autoregressive transformation of zuko, so that its inverse takes fewer passes.

    See Also:
        :class:`pyro_sinflow.TriangularTransform`

    Args:
        transform: A lazy autoregressive transformation. Its weights are shared.
        solver: How the inverse is computed.

    Raises:
        TypeError: If ``transform`` is not a
            :class:`zuko.flows.autoregressive.MaskedAutoregressiveTransform`, or ``solver`` is not a
            :class:`Solver`.

    Example:
        >>> t = FastInverse(zuko.flows.MaskedAutoregressiveTransform(8))
        >>> x = torch.randn(5, 8)
        >>> bool(torch.allclose(t().inv(t()(x)), x, atol=1e-4))
        True
    """

    def __init__(self, transform: MaskedAutoregressiveTransform, solver: Solver = Solver()) -> None:
        super().__init__()

        self.transform = check.instance("transform", transform, MaskedAutoregressiveTransform)
        self.solver = check.instance("solver", solver, Solver)

    def forward(self, c: Tensor | None = None) -> TriangularTransform:
        """Returns the transformation, given a context."""
        lazy = self.transform
        t = check.instance("transform(c)", lazy(c), AutoregressiveTransform)
        # Whether the transformation evaluates the network in the way of zuko's class.
        call: Any = t.meta
        standard = (
            isinstance(call, partial)
            and getattr(call.func, "__func__", None) is MaskedAutoregressiveTransform.meta
            and getattr(call.func, "__self__", None) is lazy
            and call.args[0] is c
        )
        function = NetworkMap(
            partial(_lowered, t.meta, lazy.hyper),
            lazy,
            lazy.hyper if standard and _applies_alike(lazy.univariate) else None,
            lazy.univariate,
            lazy.shapes,
            c,
            Size([lazy.hyper.out_features // lazy.total]),
            t.passes,
        )
        return TriangularTransform(function, solver=self.solver)


def fast_inverse(flow: Flow, solver: Solver = Solver()) -> Flow:
    """Returns a flow whose autoregressive transformations have a fast inverse.

    Args:
        flow: A flow of zuko, such as MAF, NSF or NAF, or one that is composed of their parts.
        solver: How the inverses are computed.

    Returns:
        A flow that shares all weights with the given flow and has the same density.

    Raises:
        TypeError: If ``flow`` is not a :class:`zuko.lazy.Flow`, or ``solver`` is not a
            :class:`Solver`.

    Warns:
        UserWarning: If the flow has no autoregressive transformation.

    Example:
        >>> nsf = zuko.flows.NSF(8)
        >>> fast = fast_inverse(nsf)
        >>> x = fast().sample((5,))
        >>> bool(torch.allclose(fast().log_prob(x), nsf().log_prob(x)))
        True
    """
    check.instance("flow", flow, Flow)
    check.instance("solver", solver, Solver)
    found = False

    def convert(lazy: LazyTransform) -> LazyTransform:
        nonlocal found
        if isinstance(lazy, MaskedAutoregressiveTransform):
            found = True
            return FastInverse(lazy, solver)
        if isinstance(lazy, LazyComposedTransform):
            return type(lazy)(*map(convert, lazy.transforms))
        if isinstance(lazy, LazyInverse):
            return convert(lazy.transform).inv
        return lazy

    fast = Flow(convert(flow.transform), flow.base)
    if not found:
        warnings.warn(
            f"{type(flow).__name__} has no MaskedAutoregressiveTransform, so its inverse stays the "
            "same.",
            stacklevel=2,
        )
    return fast
