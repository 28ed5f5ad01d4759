r"""The inverse of autoregressive maps, and its derivatives.

The root x of f(x) = y is found without a graph. Then f is evaluated once more with a graph, and the
derivatives are those of

.. math:: x - J^{-1} (f(x) - y)

whose value is x. J is the Jacobian of f at the root and is held constant. Gradients reach
everything that f depends on, and memory does not depend on the number of passes. One such step has
the correct first derivative; n steps in a row have n correct derivatives.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import is_validation_enabled
from torch import Tensor
from torch.autograd import Function

from ._torch import can_branch_on, can_fuse, depends_on_more, honours_torch_function
from .autoregressive import AutoregressiveMap, FrozenInverse
from .bijection import inverse
from .nilpotent import events_within, largest, nilpotent_iteration, zero_lost
from .solvers import Solver, record


def invert(function: AutoregressiveMap, y: Tensor, solver: Solver) -> Tensor:
    """Returns the root x of f(x) = y, with the shape that y and the map broadcast to.

    Events that leave the range of the dtype are NaN. Errors and warnings are those of
    :func:`~pyro_sinflow.nilpotent.nilpotent_iteration`.
    """
    if not can_branch_on(y):
        return _recorded_passes(function, y, solver)
    finite = None
    if not is_validation_enabled():  # y was not checked: a NaN must not affect other events
        finite = events_within(y, function.event_dim, math.inf)
        y = y.where(finite, 0.0)
    frozen = function.frozen(y.detach())
    x, inside = _root(function, frozen, y.detach(), solver)
    if torch.is_grad_enabled():
        x = _attach(function, x, y, solver, frozen is not None)
    for valid in (finite, inside):
        x = x if valid is None else x.where(valid, torch.nan)
    return x


def _recorded_passes(function: AutoregressiveMap, y: Tensor, solver: Solver) -> Tensor:
    """Runs the number of passes that is always enough, in operations that torch can transform.

    During the capture of a CUDA graph, forward substitution replaces as many passes as there are
    stages, or more, unless something is differentiated.
    """
    limit, most = function.enough_passes(y.shape), largest(y.dtype)
    limit = min(limit, solver.max_iter or limit)
    if can_fuse(y) and not torch.is_grad_enabled() and solver.method != "banach":
        frozen = function.frozen(y)
        if frozen is not None and (frozen.kernel or limit >= len(frozen.stages.stages) - 1):
            x = frozen.sequential()
            record("triangular", 1, x.numel())
            return x.where(events_within(x, function.event_dim, most), torch.nan)
    x = torch.zeros_like(y)
    for _ in range(limit):
        new = inverse(function(x), y)
        x = new.nan_to_num(nan=0.0).clamp(-most, most)
    record("triangular", limit, y.numel())
    return new.where(events_within(new, function.event_dim, most), torch.nan)  # without an error


def _root(
    function: AutoregressiveMap, frozen: FrozenInverse | None, y: Tensor, solver: Solver
) -> tuple[Tensor, Tensor | None]:
    """Finds the root without a graph. Returns it with a mask of the events in range, or None."""

    def careful(x: Tensor) -> Tensor:
        tau = function(x)
        _, tolerance = Solver().tolerances(torch.finfo(x.dtype).eps)  # round-off
        converged = (tau(x) - y).abs() <= tolerance * (1 + x.abs() + y.abs())
        return x.where(converged, inverse(tau, y))

    banach = solver.method == "banach"
    step = frozen.step if frozen is not None else lambda x: inverse(function(x), y)
    if frozen is not None and not banach:
        y = frozen.y
        if frozen.is_sequential:
            with torch.no_grad():
                x = frozen.sequential()
            record("triangular", 1, x.numel())
            return zero_lost(x, function.event_dim, "triangular")
    return nilpotent_iteration(
        step,
        y if banach else torch.zeros_like(y),
        function.event_dim,
        solver,
        "triangular",
        function.enough_passes(y.shape),
        frozen is not None,
        careful if frozen is not None or function.is_reliable() else None,
    )


class _Jacobian:
    """The Jacobian of a map at its root."""

    def __init__(self, function: AutoregressiveMap, x: Tensor, trusted: bool) -> None:
        self.function = function
        self.trusted = trusted
        # The derivative with respect to the input of tau is the diagonal of the Jacobian, and that
        # with respect to the input of the conditioner the rest.
        self.own, self.others = x.detach().requires_grad_(), x.detach().requires_grad_()
        self.value = function(self.others)(self.own)
        self.is_constant = not depends_on_more(self.value, [self.own, self.others])
        self._diagonal: Tensor | None = None
        self._linear: tuple[Tensor, Tensor] | None = None

    def _product(self, v: Tensor, transposed: bool) -> Tensor:
        """Returns the product with the Jacobian without its diagonal, or with its transpose."""
        if transposed:
            (product,) = torch.autograd.grad(
                self.value, self.others, v, retain_graph=True, materialize_grads=True
            )
            return product
        if self._linear is None:  # the map v -> J^T v; its transpose is v -> J v
            with torch.enable_grad():
                z = torch.zeros_like(self.value).requires_grad_()
                (vjp,) = torch.autograd.grad(
                    self.value, self.others, z, create_graph=True, materialize_grads=True
                )
            self._linear = vjp, z
        vjp, z = self._linear
        if not vjp.requires_grad:
            return torch.zeros_like(v)
        (product,) = torch.autograd.grad(vjp, z, v, retain_graph=True, materialize_grads=True)
        return product

    def solve(self, b: Tensor, transposed: bool) -> Tensor:
        """Solves a linear system with the Jacobian, or its transpose."""
        if self._diagonal is None:
            (self._diagonal,) = torch.autograd.grad(
                self.value, self.own, torch.ones_like(self.value), retain_graph=True
            )
        diagonal, event_dim = self._diagonal, self.function.event_dim
        passes = self.function.enough_passes(b.shape) - 1  # the start counts as a pass
        start = b / diagonal
        if not can_branch_on(b):
            v = start
            for _ in range(passes):
                v = (b - self._product(v, transposed)) / diagonal
            return v
        # Tolerances are relative to 1, but gradients may be small. Each event is therefore scaled
        # by the largest element of its first guess. If that is zero, v is zero; if it is not
        # finite, neither is v.
        unit = start.abs().flatten(b.ndim - event_dim).amax(dim=-1)[(...,) + event_dim * (None,)]
        b = (b / unit).nan_to_num(0.0)
        # Gradients are solved to round-off, whatever the tolerance of the values.
        v, inside = nilpotent_iteration(
            lambda v: (b - self._product(v, transposed)) / diagonal,
            b / diagonal,
            event_dim,
            Solver(),
            "adjoint",
            max(passes, 1),
            self.trusted,
        )
        return unit * (v if inside is None else v.where(inside, torch.nan))


class _Solve(Function):
    """Solves a linear system with a constant Jacobian; differentiable in its right-hand side."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, jacobian: _Jacobian, transposed: bool) -> Tensor:
        ctx.jacobian, ctx.transposed = jacobian, transposed
        return jacobian.solve(b, transposed)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _Solve.apply(g, ctx.jacobian, not ctx.transposed), None, None


class _Count(Function):
    """The identity, which can be differentiated a limited number of times.

    The root is an input, so that derivatives by it are counted, too.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, x: Tensor, times: int) -> Tensor:
        ctx.times = times
        ctx.save_for_backward(x)
        return v.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.times == 0:
            raise RuntimeError(
                "The inverse of a triangular map is differentiated more often than "
                "'Solver(derivatives=...)' allows: increase it, or use the explicit direction."
            )
        (x,) = ctx.saved_tensors
        left = ctx.times - 1
        # The derivative by x is zero, but it is counted too, because g may be a constant.
        zero = _Count.apply(torch.zeros_like(x), x, left) if torch.is_grad_enabled() else None
        return _Count.apply(g, x, left), zero, None


class _Step(Function):
    """Computes x - J^{-1} (f(x) - y), whose value is x.

    First derivatives go to y and to ``constant``, which is f at the constant root. With
    ``create_graph=True``, they go to y, to the x of the previous step, and to ``value``, which is f
    at that x, and can be differentiated again. The first step has no previous x, and counts further
    derivatives instead.
    """

    @staticmethod
    def forward(
        ctx: Any,
        root: Tensor,
        jacobian: _Jacobian,
        times: int,
        constant: Tensor,
        y: Tensor,
        x: Tensor | None,
        value: Tensor | None,
    ) -> Tensor:
        x_new = root.clone()
        ctx.jacobian, ctx.times, ctx.first = jacobian, times, x is None
        ctx.save_for_backward(x_new)
        ctx.set_materialize_grads(False)
        return x_new

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return 7 * (None,)
        if not torch.is_grad_enabled():
            v = ctx.jacobian.solve(g, transposed=True)
            return None, None, None, -v, v, None, None
        v = _Solve.apply(g, ctx.jacobian, True)
        if ctx.first:
            v = _Count.apply(v, *ctx.saved_tensors, ctx.times - 1)
            return None, None, None, -v, v, None, None
        return None, None, None, None, v, g, -v


@honours_torch_function
def _attach(
    function: AutoregressiveMap, root: Tensor, y: Tensor, solver: Solver, trusted: bool
) -> Tensor:
    """Attaches the derivatives to the root, if any input requires gradients."""
    jacobian = _Jacobian(function, root, trusted)
    if jacobian.is_constant and not y.requires_grad:
        return root
    y = y.expand(root.shape)
    x = _Step.apply(root, jacobian, solver.derivatives, jacobian.value, y, None, None)
    for _ in range(solver.derivatives - 1):
        value = function(x)(x)
        x = _Step.apply(root, jacobian, solver.derivatives, jacobian.value, y, x, value)
    return x
