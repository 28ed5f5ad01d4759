r"""Autoregressive maps: evaluation and sequential inverse in one object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import log, prod
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Transform
from zuko.transforms import AdditiveTransform, MonotonicAffineTransform
from zuko.utils import unpack

from . import _validate as check
from ._torch import autocasting, can_fuse, plain_modules
from .bijection import inverse
from .kernels import AffineChain, substitution_kernel
from .sequential import StagedEvaluation, Stages, WholeEvaluation, frozen_weights, stages_of

# Minimum rows, per stage and in all, for which forward substitution is faster than full passes.
_ROWS_PER_STAGE, _ENOUGH_ROWS = 3, 384
_GPU = "cuda"  # the device of the kernel; tests replace it


class AutoregressiveMap:
    r"""A map :math:`y_i = \tau(x_i; h_i(x_{<i}))`, for any order of the features.

    This class evaluates a conditioner. A subclass can add a faster inverse (:meth:`frozen`).

    Args:
        conditioner: A function that takes x, with shape :math:`(*, \text{features})`, and returns
            the element-wise monotone :math:`\tau` as a transform.
        event_dim: The number of dimensions of an event.
        passes: An upper bound on the number of passes of the inverse. If :py:`None`, the number of
            features.

    Raises:
        TypeError: If ``conditioner`` is not callable, or ``event_dim`` or ``passes`` is not an
            integer.
        ValueError: If ``event_dim`` or ``passes`` is not positive.

    Example:
        >>> weight = torch.randn(3, 3).tril(-1)
        >>> f = AutoregressiveMap(lambda x: zuko.transforms.AdditiveTransform(x @ weight.T))
        >>> t = TriangularTransform(f)
        >>> t(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """

    features: Size | None = None  # the shape of an event, if it is known
    context_shape = Size()  # the batch shape of the context

    def __init__(
        self,
        conditioner: Callable[[Tensor], Transform],
        event_dim: int = 1,
        passes: int | None = None,
    ) -> None:
        self.conditioner = check.function("conditioner", conditioner)
        self.event_dim = check.size("event_dim", event_dim)
        self.passes = None if passes is None else check.size("passes", passes)

    def __repr__(self) -> str:
        return f"conditioner: {name_of(self.conditioner)}, event_dim: {self.event_dim}"

    def __call__(self, x: Tensor) -> Transform:
        r"""Returns the transform :math:`\tau` for the features x.

        Args:
            x: The features, with shape :math:`(*, \text{features})`.

        Raises:
            TypeError: If the conditioner does not return a transform.
        """
        univariate: Any = self.conditioner(x)
        if isinstance(univariate, Transform):
            return univariate
        hint = ""
        if isinstance(self.conditioner, nn.Module):
            hint = " LazyTriangular makes a transform of a network that returns parameters."
        raise TypeError(
            f"'conditioner' should return a Transform, got {type(univariate).__name__}.{hint}"
        )

    def enough_passes(self, shape: Size) -> int:
        """Returns a number of passes, at least one, that is enough for values of a shape."""
        features = prod(shape[len(shape) - self.event_dim :])
        return max(min(features, self.passes or features), 1)

    def is_reliable(self) -> bool:
        """Whether the map is known to be triangular and deterministic."""
        return False

    def frozen(self, y: Tensor) -> FrozenInverse | None:
        r"""Returns the inverse at y with the current weights, without a graph.

        Returns :py:`None` unless the map is known to be triangular and deterministic.

        Args:
            y: The values to invert, with shape :math:`(*, \text{features})`.
        """
        return None


@dataclass(eq=False, repr=False)
class NetworkMap(AutoregressiveMap):
    r"""A map whose parameters come from a masked network, which can be evaluated in stages.

    Args:
        network: The network of the conditioner, whose input is the features followed by the
            context, or :py:`None` if it is not known, or ``univariate`` cannot be applied to some
            of the features.
        univariate: The constructor of :math:`\tau`.
        shapes: The shapes of its arguments, for one feature.
        conditioner, c, features, passes: The conditioner, the context, the shape of an event, and
            an upper bound on the number of passes of the inverse.
        masked: The network of the conditioner, if its masks make the map triangular.
    """

    conditioner: Callable[[Tensor], Transform]
    network: nn.Module | None
    univariate: Callable[..., Transform]
    shapes: Sequence[Sequence[int]]
    c: Tensor | None
    features: Size
    passes: int | None = None
    masked: nn.Module | None = None

    def __post_init__(self) -> None:
        self.event_dim = len(self.features)
        if self.c is not None:
            self.context_shape = self.c.shape[:-1]

    def __repr__(self) -> str:
        context = "" if self.c is None else f", context: {tuple(self.c.shape)}"
        return f"univariate: {name_of(self.univariate)}, features: {tuple(self.features)}{context}"

    def is_reliable(self) -> bool:
        """Whether the map is known to be triangular and deterministic."""
        return self.masked is not None and plain_modules(self.masked) is not None

    def frozen(self, y: Tensor) -> FrozenInverse | None:
        """Returns the inverse at y with the current weights, if the network has stages."""
        c = self.c
        batch = y.shape[: -self.event_dim]
        if c is not None:
            batch = check.broadcast(y=batch, context=c.shape[:-1])
        if self.network is None or autocasting(y.device.type):
            return None
        if not can_fuse(y) or (c is not None and not can_fuse(c)):
            return None
        stages = stages_of(self.network, self.features.numel())
        if stages is None or stages.linears[0].weight.dtype != y.dtype:
            return None
        # With a wrong size, evaluating the network raises the error.
        n, outputs = self.features.numel(), sum(prod(shape) for shape in self.shapes)
        if stages.linears[-1].out_features != n * outputs:
            return None
        if stages.linears[0].in_features != n + (0 if c is None else c.shape[-1]):
            return None
        if c is not None:
            y = y.expand(*batch, *self.features)
            c = c.to(y.dtype)
            if c.shape[:-1].numel() > 1:
                c = c.expand(*batch, -1)
            c = c.reshape(-1, c.shape[-1])
        return FrozenInverse(stages, self.univariate, self.shapes, y, c) if y.numel() else None


class FrozenInverse:
    """The inverse of a :class:`NetworkMap` at y, with the current weights and without a graph.

    The context is None, or has shape (N, C) or (1, C), where N is the number of events of y.
    """

    def __init__(
        self,
        stages: Stages,
        univariate: Callable[..., Transform],
        shapes: Sequence[Sequence[int]],
        y: Tensor,
        c: Tensor | None,
    ) -> None:
        self.stages = stages
        self.univariate = univariate
        self.split = splitter(shapes)
        self.y, self.c = y, c
        self.rows = y.numel() // stages.features
        self.targets = y.reshape(self.rows, -1)
        self._whole: WholeEvaluation | None = None
        self.kernel = self._find_kernel(shapes) if y.device.type == _GPU else None

    def _find_kernel(self, shapes: Sequence[Sequence[int]]) -> Callable[..., Tensor] | None:
        """Returns the kernel that inverts this map, or None if there is none."""
        form, schedule = kernel_form(self.univariate, shapes), self.stages.schedule
        if form is None or schedule is None or schedule.known.device != self.y.device:
            return None
        module = substitution_kernel(self.y)
        return None if module is None else partial(module.substitute, schedule=schedule, form=form)

    @property
    def is_sequential(self) -> bool:
        """Whether forward substitution is expected to be faster than passes through the network."""
        if self.kernel is not None:
            return True
        least = _ROWS_PER_STAGE * len(self.stages.stages)
        return self.y.device.type == "cpu" and self.rows >= max(
            2 * _ROWS_PER_STAGE, min(least, _ENOUGH_ROWS)
        )

    def step(self, x: Tensor) -> Tensor:
        r"""Does one pass :math:`x \leftarrow \tau^{-1}(y; h(x))`."""
        if self._whole is None:
            self._whole = WholeEvaluation(self.stages, self.c)
        h = self._whole(x.reshape(self.rows, -1)).view(*self.targets.shape, -1)
        return inverse(self.univariate(*self.split(h)), self.targets).reshape(self.y.shape)

    def sequential(self) -> Tensor:
        """Returns the root by forward substitution."""
        order = torch.cat(self.stages.stages)
        if self.kernel is not None:
            layers = frozen_weights(self.stages, self.c, ordered=True)
            x = self.kernel(self.targets[:, order].t(), layers)
        else:
            evaluation = StagedEvaluation(self.stages, self.c, self.rows)
            x = self.targets.new_empty(0, self.rows)
            parts = []
            for targets in self.targets[:, order].split(
                [len(s) for s in self.stages.stages[1:]], dim=1
            ):
                h = evaluation.advance(x).view(targets.shape[1], -1, self.rows).permute(2, 0, 1)
                tau = self.univariate(*self.split(h))
                x = inverse(tau, targets).t()
                parts.append(x)
            x = torch.cat(parts)
        return torch.empty_like(x).index_copy_(0, order, x).t().reshape(self.y.shape)


def treats_features_alike(univariate: Any) -> bool:
    """Whether a constructor can be applied to some of the features.

    Functions may not treat all features alike, and bound tensors may have an entry for each.
    """
    while isinstance(univariate, partial):
        values = (*univariate.args, *univariate.keywords.values())
        if any(isinstance(v, Tensor) for v in values):
            return False
        univariate = univariate.func
    return isinstance(univariate, type) and issubclass(univariate, Transform)


def kernel_form(
    univariate: Callable[..., Transform], shapes: Sequence[Sequence[int]]
) -> AffineChain | None:
    """Returns the affine map and the sinusoids that a constructor makes, or None for other maps.

    A class of this package that makes them has a static method ``affine_chain``, which takes the
    shapes and the options of the class.
    """
    options: dict[str, Any] = {}
    if isinstance(univariate, partial):
        if univariate.args:
            return None
        options = univariate.keywords
        univariate = univariate.func
    shapes = [*map(tuple, shapes)]
    if univariate is AdditiveTransform and not options and shapes == [()]:
        return AffineChain()
    if univariate is MonotonicAffineTransform and options.keys() <= {"slope"}:
        return AffineChain(abs(log(options.get("slope", 1e-3)))) if shapes == [(), ()] else None
    if "affine_chain" not in vars(univariate):  # that of a base class does not count
        return None
    make: Any = univariate
    try:
        return make.affine_chain(shapes, **options)
    except TypeError:  # an option that the kernel does not know
        return None


def name_of(function: Any) -> str:
    """Returns the name of a function or class, with the numbers that are bound to a partial."""
    if not isinstance(function, partial):
        return getattr(function, "__qualname__", type(function).__name__)
    bound = {k: v for k, v in function.keywords.items() if isinstance(v, int | float)}
    options = ", ".join(f"{k}={v}" for k, v in bound.items())
    return f"{name_of(function.func)}({options})" if options else name_of(function.func)


def splitter(shapes: Sequence[Sequence[int]]) -> Callable[[Tensor], Sequence[Tensor]]:
    """Returns a function that splits the last dimension into tensors of the given shapes."""
    if any(shapes):
        return partial(unpack, shapes=shapes)
    return partial(torch.unbind, dim=-1) if len(shapes) > 1 else _only


def _only(h: Tensor) -> Sequence[Tensor]:
    """Does the same as torch.unbind for a dimension of size 1; its gradient needs no copy."""
    return (h.squeeze(-1),)
