r"""Autoregressive maps: evaluation, sequential inverse and preconditioner in one object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Transform
from zuko.utils import unpack

from ._torch import autocasting, can_fuse
from .bijection import Bijection
from .networks import MaskedNetwork
from .sequential import Evaluation, stages_of

# With fewer rows than these for each stage, and in all, passes through the whole are faster.
_LEAST, _ENOUGH = 3, 384


class AutoregressiveMap:
    r"""A map :math:`y_i = \tau(x_i; h_i(x_{<i}))`, in whatever order of the features.

    This one knows no more than how to evaluate its conditioner. Subclasses may know a faster
    inverse.

    Args:
        conditioner: Returns, given x, the element-wise increasing :math:`\tau` as a transform.
        event_dim: The number of dimensions of an event.
        passes: A bound of the number of passes of the inverse that is lower than the number of
            features, if one is known.
    """

    features: Size | None = None  # the shape of an event, if it is known

    def __init__(
        self,
        conditioner: Callable[[Tensor], Transform],
        event_dim: int = 1,
        passes: int | None = None,
    ) -> None:
        self.conditioner = conditioner
        self.event_dim = event_dim
        self.passes = passes

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, AutoregressiveMap)
            and self.conditioner == other.conditioner
            and (self.event_dim, self.passes) == (other.event_dim, other.passes)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"conditioner: {name_of(self.conditioner)}, event_dim: {self.event_dim}"

    def __call__(self, x: Tensor) -> Transform:
        r"""Returns :math:`\tau` with the parameters that x gives."""
        univariate: Any = self.conditioner(x)
        if isinstance(univariate, Transform):
            return univariate
        hint = ""
        if isinstance(self.conditioner, nn.Module):
            hint = " LazyTriangular makes a transform of a network that returns parameters."
        raise TypeError(
            f"'conditioner' should return a Transform, got {type(univariate).__name__}.{hint}"
        )

    def is_triangular(self) -> bool:
        """Whether the map is known to be triangular and deterministic, so that none need check."""
        return False

    def sequential(self, y: Tensor) -> Tensor | None:
        """Returns the root by forward substitution, or :py:`None` where passes are faster."""
        return None

    def preconditioner(self) -> Tensor | None:
        """Returns a matrix Q, with shape (D, D), strictly triangular in the order of the features.

        A pass of the inverse moves x by :math:`I + Q` times what it would change by itself. The
        nearer :math:`I + Q` is to the inverse of the Jacobian, the fewer passes it takes.
        """
        return None


class NetworkMap(AutoregressiveMap):
    r"""A map whose parameters come from a masked network, which it may evaluate in stages.

    Args:
        conditioner: Returns, given x, the element-wise increasing :math:`\tau` as a transform.
        module: The module that owns the parameters.
        network: Its network, which sees features and context side by side, or :py:`None` if it is
            not known.
        univariate: The constructor of :math:`\tau`.
        shapes: The shapes of its arguments, for one feature.
        c: The context, if there is one.
        features: The shape of an event.
        passes: A bound of the number of passes of the inverse.
    """

    features: Size

    def __init__(
        self,
        conditioner: Callable[[Tensor], Transform],
        module: nn.Module,
        network: nn.Module | None,
        univariate: Callable[..., Transform],
        shapes: Sequence[Sequence[int]],
        c: Tensor | None,
        features: Size,
        passes: int | None = None,
    ) -> None:
        self.conditioner = conditioner
        self.module = module
        self.network = network
        self.univariate = univariate
        self.shapes = shapes
        self.c = c
        self.features = features
        self.event_dim = len(features)
        self.passes = passes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NetworkMap) and self.module is other.module and self.c is other.c

    __hash__ = None

    def __repr__(self) -> str:
        context = "" if self.c is None else f", context: {tuple(self.c.shape)}"
        return f"univariate: {name_of(self.univariate)}, features: {tuple(self.features)}{context}"

    def is_triangular(self) -> bool:
        """Whether the network is known to be triangular and deterministic."""
        return (
            self.network is not None and stages_of(self.network, self.features.numel()) is not None
        )

    def preconditioner(self) -> Tensor | None:
        """Returns the preconditioner of the shortcut, as far as it is finite."""
        network = self.network
        if not isinstance(network, MaskedNetwork) or network.shortcut is None:
            return None
        return network.shortcut.preconditioner().detach().nan_to_num(0.0, 0.0, 0.0)

    def sequential(self, y: Tensor) -> Tensor | None:
        """Returns the root by forward substitution, or :py:`None` where passes are faster."""
        n, c = self.features.numel(), self.c
        if self.network is None or y.device.type != "cpu" or autocasting("cpu"):
            return None
        if not can_fuse(y) or (c is not None and not can_fuse(c)):
            return None
        batch = y.shape[: y.ndim - self.event_dim]
        if c is not None:
            batch = torch.broadcast_shapes(batch, c.shape[:-1])
        rows = batch.numel()
        if rows < 2 * _LEAST or y.shape[y.ndim - self.event_dim :] != self.features:
            return None  # the stages are at least two, and take time to find
        stages = stages_of(self.network, n)
        if stages is None or rows < min(_LEAST * len(stages.stages), _ENOUGH):
            return None
        if stages.linears[0].weight.dtype != y.dtype:
            return None
        if c is not None:
            c = c.to(y.dtype)
            if c.shape[:-1].numel() > 1:
                c = c.expand(*batch, -1)
            c = c.reshape(-1, c.shape[-1])
        evaluation = Evaluation(stages, c, rows)
        order = torch.cat(stages.stages)
        y = y.expand(*batch, *self.features).reshape(rows, n)
        root, roots, simple = y.new_empty(0, rows), [], not any(self.shapes)
        for target in y[:, order].split(list(map(len, stages.stages[1:])), dim=1):
            h = evaluation.advance(root).view(target.shape[1], -1, rows).permute(2, 0, 1)
            tau = self.univariate(*(h.unbind(-1) if simple else unpack(h, self.shapes)))
            root = (tau._inverse(target) if isinstance(tau, Bijection) else tau.inv(target)).t()
            roots.append(root)
        x = y.new_empty(n, rows).index_copy_(0, order, torch.cat(roots))
        return x.t().reshape(*batch, *self.features)


def name_of(function: Any) -> str:
    """Returns the name of a function or class, inside of partials."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__qualname__", type(function).__name__)


def split(h: Tensor, shapes: Sequence[Sequence[int]]) -> Sequence[Tensor]:
    """Splits the last dimension into tensors of the given shapes."""
    return unpack(h, shapes) if any(shapes) else h.unbind(-1)
