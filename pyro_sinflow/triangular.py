r"""The inverse of triangular maps.

A triangular map :math:`y_i = \tau(x_i; h_i(x_{<i}))` is inverted with a guarantee: the iteration
:math:`x \leftarrow \tau^{-1}(y; h(x))` settles at least one more feature in each pass, whatever the
map, so that it is exact after as many passes as there are features. It usually reaches round-off in
a handful.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Transform

from ._checks import check_instance, full_precision
from .inversion import InversionError, InversionWarning, Solver, missed, record


class TriangularMap(NamedTuple):
    r"""A map :math:`y_i = \tau(x_i; h_i(x_{<i}))`, in whatever order of the features.

    Args:
        conditioner: Returns, given x, the element-wise increasing :math:`\tau` as a transform.
        event_dim: The number of dimensions of an event.
        substitute: Returns the root by forward substitution, given y, or :py:`None` where
            the iteration is the better way.
        preconditioner: Returns a matrix Q, with shape (D, D), strictly triangular in the order of
            the features. A pass moves x by :math:`I + Q` times what it would change by itself,
            which keeps the guarantee. The nearer :math:`I + Q` is to the inverse of the Jacobian,
            the fewer passes.
        phi: Returns the tensors, apart from x, for which gradients are wanted.
    """

    conditioner: Callable[[Tensor], Transform]
    event_dim: int
    substitute: Callable[[Tensor], Tensor | None] | None = None
    preconditioner: Callable[[], Tensor] | None = None
    phi: Callable[[], Iterable[Tensor]] = tuple

    def at(self, x: Tensor) -> Transform:
        """Returns the element-wise transform for the conditioner's input x."""
        return check_instance("conditioner(x)", self.conditioner(x), Transform)

    def value(self, x: Tensor, fixed: Tensor | None = None) -> Tensor:
        """Returns y; with ``fixed`` in place of x as the conditioner's input, where given."""
        return self.at(x if fixed is None else fixed)(x)

    def step(self, y: Tensor, x: Tensor) -> Tensor:
        """Returns the root of the map whose conditioner is held at x."""
        return self.at(x).inv(y)

    def finite_preconditioner(self) -> Tensor | None:
        """Returns the preconditioner, as far as it is finite."""
        if self.preconditioner is None:
            return None
        return self.preconditioner().detach().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _largest(dtype: torch.dtype) -> float:
    """Returns the bound of what an inverse may return.

    A feature that is not settled yet may overflow on the way, and infinity times a masked weight of
    zero would spoil the features that are.
    """
    return torch.finfo(dtype).max ** 0.5


def finite_events(x: Tensor, event_dim: int) -> Tensor:
    """Returns which events are finite, with as many dimensions as x."""
    return x.isfinite().all(dim=tuple(range(-event_dim, 0)), keepdim=True)


def _cut_off(x: Tensor, event_dim: int) -> tuple[Tensor, Tensor]:
    """Keeps x in range, and returns which elements belong to an event that has not left it.

    Raises:
        InversionError: If every event has left it.

    Warns:
        InversionWarning: If some have.
    """
    largest = _largest(x.dtype)
    inside = (x.abs() < largest).flatten(x.ndim - event_dim).all(dim=-1)  # False for NaN
    lost = inside.numel() - int(inside.sum())
    if lost:
        message = (
            f"The inverse of a triangular map leaves the range of {x.dtype} in {lost} of "
            f"{inside.numel()} events: the map is not finite, or its slopes are too extreme there. "
            "Activations that are bounded, such as torch.nn.Tanh, or float64 may help."
        )
        if lost == inside.numel():
            raise InversionError(message)
        warnings.warn(message, InversionWarning, stacklevel=2)
        x = x.nan_to_num(nan=largest).clamp(-largest, largest)
    return x, inside[(...,) + event_dim * (None,)].expand_as(x)


def _look_ahead(change: Tensor, event_dim: int, matrix: Tensor) -> Tensor:
    """Returns what a change of the features lets those after them change by."""
    largest = _largest(change.dtype)
    rows = change.clamp(-largest, largest).flatten(change.ndim - event_dim)
    return full_precision(torch.matmul, rows, matrix.to(rows.dtype).mT).view_as(change)


def settle(
    step: Callable[[Tensor], Tensor],
    x: Tensor,
    event_dim: int,
    solver: Solver,
    problem: str,
    passes: int | None = None,
    preconditioner: Tensor | None = None,
    may_read: bool = True,
) -> Tensor:
    """Iterates a nilpotent step until it settles, at most as many times as there are features.

    An event is preconditioned for as long as there is less to change than in either of the last two
    passes. Where a poor preconditioner, or round-off that it amplifies, puts an end to that, the
    plain step may take as many passes again. Where it may not read values, all passes are taken.
    """
    features = x.shape[x.ndim - event_dim :].numel()
    bound = min(features, passes or features)
    aim, tolerance = solver.tolerances(x.dtype)
    largest, least = _largest(x.dtype), x.new_full((), aim)
    limit = solver.max_iter or (100 if solver.method == "banach" else 2 * bound)
    if (limit >= bound and not may_read) or not x.numel():
        preconditioner = None  # all passes are taken anyway, and exact without
    limit = min(limit, bound if preconditioner is None else 2 * bound)

    event = tuple(range(-event_dim, 0))
    recent = 2 * (x.new_full((), torch.inf),)  # the largest changes of the last two passes
    new, done, iteration = x, False, 0
    while iteration < limit and not done:
        iteration += 1
        new = step(x)
        if preconditioner is not None and iteration <= bound:
            change = new - x
            worst = (change.abs() / (1 + new.abs())).amax(dim=event, keepdim=True)  # perhaps NaN
            less = worst < torch.maximum(*recent)
            # Zeros keep an event that did not improve without the preconditioner from now on.
            recent = torch.where(less, worst, 0), torch.where(less, recent[0], 0)
            ahead = _look_ahead(change.nan_to_num(nan=0.0), event_dim, preconditioner)
            new = torch.where(less, new + ahead, new)
        if may_read:  # the change is NaN where the step is not finite
            change = (new - x).abs()
            done = bool((change <= torch.add(least, new.abs(), alpha=aim)).all())
        x = new.nan_to_num(nan=0.0).clamp(-largest, largest)
    record(problem, iteration, x.numel())
    if not may_read:  # what cannot be reported is passed on
        return new.where(finite_events(new, event_dim), torch.nan)
    if done or not x.numel():
        return x
    if features == 1:  # one pass is exact
        return _cut_off(new, event_dim)[0]
    # The bound makes x exact, if the map is what it should be: one more pass tells.
    new, inside = _cut_off(step(x), event_dim)
    change = (new - x).abs() / (1 + new.abs())
    worst = change[inside].max()
    if not worst <= tolerance:
        message = missed(problem, worst, tolerance, limit)
        exact = bound if preconditioner is None else 2 * bound
        if limit >= exact and not worst <= torch.finfo(x.dtype).eps ** 0.5:
            raise InversionError(
                f"{message} {limit} passes are exact for every triangular map: this one is not "
                "triangular or not deterministic. Call '.eval()' if it has dropout."
            )
        warnings.warn(message, InversionWarning, stacklevel=2)
    return torch.where(inside, x, new)


def solved(x: Tensor) -> Tensor:
    """Records a root that forward substitution has found, and keeps it in range.

    Args:
        x: The root, with shape (N, D).

    Raises:
        InversionError: If every event leaves the range of the dtype.

    Warns:
        InversionWarning: If some do.
    """
    record("triangular", 1, x.numel())
    return _cut_off(x, 1)[0]


def find_root(
    function: TriangularMap,
    y: Tensor,
    solver: Solver,
    passes: int | None = None,
    may_read: bool = True,
) -> Tensor:
    """Inverts a triangular map, by forward substitution where that is faster than the iteration."""
    if function.substitute is not None and solver.method == "newton" and may_read:
        x = function.substitute(y)
        if x is not None:
            return x
    start = y if solver.method == "banach" else torch.zeros_like(y)
    return settle(
        lambda x: function.step(y, x),
        start,
        function.event_dim,
        solver,
        "triangular",
        passes,
        None if solver.method == "banach" else function.finite_preconditioner(),
        may_read,
    )
