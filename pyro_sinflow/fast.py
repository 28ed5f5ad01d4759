"""The fast inverse for zuko's own autoregressive flows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Size, Tensor, nn
from torch.distributions import Transform
from zuko.flows import MaskedAutoregressiveTransform
from zuko.lazy import Flow, LazyComposedTransform, LazyInverse, LazyTransform
from zuko.transforms import AutoregressiveTransform

from . import _validate as check
from ._torch import shallow_copy
from .autoregressive import NetworkMap, treats_features_alike
from .lazy import Lazy
from .networks import weight_dtype
from .solvers import Solver
from .transforms import TriangularTransform


def _in_network_dtype(
    function: Callable[[Tensor], Transform], network: nn.Module, x: Tensor
) -> Transform:
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
        if c is not None:
            check.finite_context(c)
        lazy = self.transform
        t = check.instance("transform(c)", lazy(c), AutoregressiveTransform)
        # Whether the transformation evaluates the network in the way of zuko's class. torch.compile
        # cannot trace a comparison of methods, hence that of their parts.
        call: Any = t.meta
        standard = (
            isinstance(call, partial)
            and getattr(call.func, "__func__", None) is MaskedAutoregressiveTransform.meta
            and getattr(call.func, "__self__", None) is lazy
            and call.args[0] is c
        )
        function = NetworkMap(
            partial(_in_network_dtype, t.meta, lazy.hyper),
            lazy.hyper if standard and treats_features_alike(lazy.univariate) else None,
            lazy.univariate,
            lazy.shapes,
            c,
            Size([lazy.hyper.out_features // lazy.total]),
            t.passes,
            lazy.hyper if standard else None,
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
            new = shallow_copy(lazy)
            new.transforms = nn.ModuleList(map(convert, lazy.transforms))
            return new
        if isinstance(lazy, LazyInverse):
            return convert(lazy.transform).inv
        return lazy

    fast = shallow_copy(flow)
    fast.transform = convert(flow.transform)
    if not found:
        warnings.warn(
            f"{type(flow).__name__} has no MaskedAutoregressiveTransform, so its inverse stays the "
            "same.",
            stacklevel=2,
        )
    return fast
