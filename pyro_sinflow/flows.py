"""The Sinusoidal Flow, for zuko."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Transform
from zuko.distributions import DiagNormal
from zuko.lazy import Flow, LazyComposedTransform, UnconditionalDistribution, UnconditionalTransform
from zuko.transforms import MonotonicAffineTransform

from . import _validate as check
from .bijection import at_least_float32
from .block import ConditionalLDU
from .element_wise import Asinh, SinusoidalChain
from .kernels import AffineChain
from .lazy import Compressed, Lazy, LazyAffine, LazyTriangular, initial_sinusoids
from .linear import Linear
from .masks import check_adjacency
from .networks import MaskedNetwork, check_context
from .solvers import Solver
from .transforms import BuiltAtUse, Composition


class _LazyComposition(LazyComposedTransform):
    """Composes lazy transforms to a transform that checks its input once.

    One of the transforms is a :class:`LazyAffine`.
    """

    def forward(self, c: Tensor | None = None) -> Composition:
        """Returns the composition, given a context."""
        affine = next(t for t in self.transforms if isinstance(t, LazyAffine))
        check_context(c, affine.context, affine.parameter.dtype)
        shape = Size() if c is None else c.shape[:-1]
        return BuiltAtUse(partial(self.build, c), affine.parameter.shape[:-1], shape)

    def build(self, c: Tensor | None) -> tuple[Transform, ...]:
        """Returns the transforms, given a context, which is compressed once for all of them."""
        compressed, built = None, []
        for t in self.transforms:
            if c is None or not isinstance(t, Lazy) or not t.compress:
                built.append(t(c))
                continue
            compressed = compressed or Compressed(t.seen(c))
            built.append(t(compressed))
        return tuple(built)


def _diagonal_normal(loc: Tensor, scale: Tensor, ndims: int) -> DiagNormal:
    """Returns the base distribution, whose log-density is never computed in half precision."""
    return DiagNormal(at_least_float32(loc), at_least_float32(scale), ndims)


class SinusoidalFlow(Flow):
    r"""Creates a Sinusoidal Flow.

    .. math:: f = A \circ T_n \circ W_n \circ \dots \circ T_1 \circ W_1 \circ C

    C compresses the tails of each feature. Each W is a linear map, and each T a triangular
    transformation or an LDU block. A is an element-wise affine map. Scoring evaluates each network
    once. Sampling evaluates it a few times.

    Warning:
        Standardize features and context (zero mean, unit variance) before training. The initial
        frequencies have periods that suit such data.

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
        conditioner: ``"autoregressive"`` for the paper's Eq. 11, where a masked network computes
            all parameters of an affine map and a chain of sinusoids; ``"independent"`` for LDU
            blocks, whose sinusoids do not depend on the features.
        linear: Whether a linear map precedes each transformation. It is initialized to the
            identity. If :py:`None`, there are linear maps if an event is a vector and there is no
            ``adjacency``.
        tails: Whether :math:`\text{asinh}(b x) / b`, with a learned b for each feature, is applied
            to the data first, and with b = 0.3 to the context. It keeps outliers of heavy-tailed
            data within reach of the networks. Without it, log-densities of the autoregressive
            conditioner in float32 are inaccurate beyond some 100 standard deviations.
        scale: Whether LDU blocks scale features in addition to shifting them. The block of the
            paper is ``scale=False``. The autoregressive conditioner always scales.
        max_scale: The largest factor, greater than 1, of each affine map that depends on other
            features. The smallest is its reciprocal. Larger bounds improve densities little, and
            a few samples may then lie far out in the tails.
        sinusoids: The number of sinusoids in a chain. If :py:`None`, 2 for the autoregressive
            conditioner and 4 for the independent one.
        components: The number of components K of each sinusoid.
        context_diagonal: Whether the parameters of the sinusoids of LDU blocks depend on the
            context.
        min_slope: The smallest slope of a sinusoid, in :math:`(0, 1)`.
        network: The constructor of the networks: :class:`pyro_sinflow.MaskedNetwork`, or a
            constructor that takes ``(features, context)`` and the keyword arguments ``outputs``,
            ``order`` (or ``adjacency``), ``hidden_features``, ``activation``, ``residual`` and
            ``dropout``. For the autoregressive conditioner, the network needs a method
            ``set_bias(bias)``, which sets the bias of its outputs, with shape
            :math:`(D, \text{outputs})`.
        hidden_features: The numbers of hidden features of each network.
        activation: The activation function constructor. If :py:`None`, :class:`torch.nn.ReLU`.
        residual: Whether the masked networks use residual blocks.
        dropout: The probability, in :math:`[0, 1)`, that a hidden unit is dropped in training.
            Call ``.eval()`` before sampling.
        solver: How the inverse is computed.
        adjacency: Which features and context features each feature depends on, instead of an order:
            the matrix that :class:`pyro_sinflow.MaskedNetwork` takes. It is an option of the
            autoregressive conditioner. All transformations share it, as in zuko's MAF: with one of
            them, a feature depends on its parents; with n, on ancestors up to n steps away.

    Raises:
        TypeError: If an argument has the wrong type, or an option does not apply to the
            conditioner.
        ValueError: If a size is not positive, a number is out of range, ``conditioner`` is unknown,
            ``activation`` is not element-wise, ``linear`` is :py:`True` for events that are not
            vectors, or ``adjacency`` is not what :class:`pyro_sinflow.MaskedNetwork` takes or is
            given with ``randperm`` or ``linear``.

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
        conditioner: str = "autoregressive",
        linear: bool | None = None,
        tails: bool = True,
        scale: bool = True,
        max_scale: float = 2.0,
        sinusoids: int | None = None,
        components: int = 4,
        context_diagonal: bool = False,
        min_slope: float = 1e-3,
        network: Callable[..., nn.Module] = MaskedNetwork,
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
        check.choice("conditioner", conditioner, ("autoregressive", "independent"))
        check.flag("scale", scale)
        check.flag("context_diagonal", context_diagonal)
        independent = conditioner == "independent"
        if not independent and (not scale or context_diagonal):
            name, given = ("context_diagonal", True) if scale else ("scale", False)
            raise TypeError(
                f"'{name}' should be {not given} for conditioner='autoregressive', got {given}. "
                "It is an option of conditioner='independent'."
            )
        seen = None
        if adjacency is not None:
            seen = _context_seen(adjacency, shape, context, independent, randperm)
        linear = _check_linear(linear, shape, adjacency is not None)
        check.flag("tails", tails)
        options: dict[str, Any] = {
            "max_scale": max_scale,
            "sinusoids": (4 if independent else 2) if sinusoids is None else sinusoids,
            "components": components,
            "min_slope": min_slope,
            "network": network,
            "hidden_features": hidden_features,
            "activation": activation,
            "residual": residual,
            "dropout": dropout,
            "solver": solver,
        }
        make: Callable[..., Lazy] = _autoregressive
        if independent:
            make = partial(ConditionalLDU, scale=scale, context_diagonal=context_diagonal)

        lazy: list[nn.Module] = []
        if tails:
            lazy.append(UnconditionalTransform(Asinh, torch.zeros(shape)))
        ascending = torch.arange(shape.numel())
        for i in range(transforms):
            order = torch.randperm(shape.numel()) if randperm else ascending
            if i % 2 and not randperm and not independent:
                order = order.flip(0)
            structure = {"order": order} if adjacency is None else {"adjacency": adjacency}
            if linear:
                lazy.append(UnconditionalTransform(Linear, torch.zeros(2 * [shape.numel()])))
            lazy.append(make(shape, context, **structure, **options))
        lazy.append(LazyAffine(torch.zeros(*shape, 2), context, hidden_features, activation, seen))
        for t in lazy:
            if isinstance(t, Lazy):
                t.compress = tails

        base = UnconditionalDistribution(
            _diagonal_normal,
            loc=torch.zeros(shape),
            scale=torch.ones(shape),
            ndims=len(shape),
            buffer=True,
        )
        super().__init__(_LazyComposition(*lazy), base)


def _check_linear(linear: bool | None, features: Size, adjacency: bool) -> bool:
    """Returns whether there are linear maps, if they suit the other options."""
    if linear is None:
        return len(features) == 1 and not adjacency
    check.flag("linear", linear)
    if linear and len(features) != 1:
        raise ValueError(
            f"'linear' should be False for events that are not vectors, got {tuple(features)}."
        )
    if linear and adjacency:
        raise ValueError(
            "'linear' should be False where there is an 'adjacency': a linear map lets each "
            "feature depend on all others."
        )
    return linear


def _context_seen(
    adjacency: Any, features: Size, context: int, independent: bool, randperm: bool
) -> Tensor:
    """Requires an adjacency matrix, and options that it suits.

    Returns:
        Which context features each feature depends on, with shape (D, C).
    """
    if independent:
        raise TypeError(
            "'adjacency' is an option of the autoregressive conditioner only: in an LDU block, U "
            "has the opposite order of L, so that each feature depends on all connected ones."
        )
    if randperm:
        raise ValueError("'randperm' should be False where there is an 'adjacency'.")
    seen, _ = check_adjacency(adjacency, features, context)
    return seen[:, features.numel() :]


class AffineSinusoids(Composition):
    """An affine map and a chain of sinusoids, from the outputs of a conditioner."""

    def __init__(
        self,
        shift: Tensor,
        scale: Tensor,
        parameters: Tensor,
        max_scale: float,
        min_slope: float,
        solver: Solver,
    ) -> None:
        chain = SinusoidalChain(parameters, min_slope, solver)
        super().__init__(MonotonicAffineTransform(shift, scale, 1 / max_scale), chain)

    @staticmethod
    def affine_chain(
        shapes: Sequence[Sequence[int]], max_scale: float, min_slope: float, solver: Solver
    ) -> AffineChain | None:
        """Returns the options of the kernel that inverts maps of this class."""
        *affine, (m, size) = shapes
        if affine != [(), ()] or size % 3 != 1:  # sinusoids may have shifts
            return None
        return AffineChain(math.log(max_scale), (m, size // 3), min_slope, solver)


def _autoregressive(
    features: Size,
    context: int,
    *,
    max_scale: float,
    sinusoids: int,
    components: int,
    min_slope: float,
    network: Callable[..., nn.Module],
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
    shapes = [(), (), (sinusoids, 3 * components + 1)]
    outputs = 2 + sinusoids * (3 * components + 1)

    masked: Any = network(features, context, outputs=outputs, **options)
    if not hasattr(masked, "set_bias"):
        raise TypeError(
            "'network' should make a network with a method 'set_bias(bias)' for the autoregressive "
            f"conditioner, where the bias has shape ({features.numel()}, {outputs}), got "
            f"{type(masked).__name__}."
        )
    n = features.numel()
    start = initial_sinusoids(n, sinusoids, components=components).flatten(1)
    masked.set_bias(torch.cat((torch.zeros(n, 2), start), dim=1))
    univariate = partial(AffineSinusoids, max_scale=max_scale, min_slope=min_slope, solver=solver)

    return LazyTriangular(masked, features, univariate, shapes, solver)
