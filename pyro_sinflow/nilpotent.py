r"""Fixed points of nilpotent iterations.

Each pass :math:`x \leftarrow \tau^{-1}(y; h(x))` of the inverse of a triangular map makes at least
one more feature exact. After as many passes as there are features, all are. It usually converges to
round-off in fewer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import isfinite, prod

import torch
from torch import Tensor

from ._torch import without_autocast
from .solvers import InversionError, InversionWarning, Solver, missed, record

_FEW = 5  # passes


def largest(dtype: torch.dtype) -> float:
    """Returns the bound of what an inverse may return.

    A feature that has not converged may overflow, and infinity times a masked weight of zero would
    turn the features that have converged to NaN.
    """
    return torch.finfo(dtype).max ** 0.5


def finite_events(x: Tensor, event_dim: int) -> Tensor:
    """Returns which events are finite, with as many dimensions as x."""
    return x.isfinite().all(dim=tuple(range(-event_dim, 0)), keepdim=True)


def cut_off(x: Tensor, event_dim: int) -> tuple[Tensor, Tensor | None]:
    """Keeps x in range, and returns which elements belong to an event that has not left it.

    Returns:
        The elements in range, and a mask, or :py:`None` if all events are in range.

    Raises:
        InversionError: If every event has left it.

    Warns:
        InversionWarning: If some have.
    """
    bound = largest(x.dtype)
    if not x.numel() or float(x.abs().max()) < bound:  # False for NaN
        return x, None
    inside = (x.abs() < bound).flatten(x.ndim - event_dim).all(dim=-1)
    lost = inside.numel() - int(inside.sum())
    message = (
        f"The inverse of a triangular map leaves the range of {x.dtype} in {lost} of "
        f"{inside.numel()} events: the map is not finite, or its slopes are too extreme there. "
        "Activations that are bounded, such as torch.nn.Tanh, or float64 may help."
    )
    if lost == inside.numel():
        raise InversionError(message)
    warnings.warn(message, InversionWarning, stacklevel=2)
    mask = inside[(...,) + event_dim * (None,)].expand_as(x)
    return x.nan_to_num(nan=bound).clamp(-bound, bound), mask


class _Preconditioner:
    """Moves the features of an event by what a change lets those after them change by.

    An event is preconditioned as long as its change is smaller than in both of the last two passes,
    so that a poor preconditioner, or round-off that it amplifies, does not prevent convergence.
    """

    def __init__(self, matrix: Tensor, event_dim: int, like: Tensor) -> None:
        self.matrix = matrix.to(like.dtype).mT
        self.event_dim = event_dim
        self.bound = largest(like.dtype)
        self.recent = 2 * (like.new_full((), torch.inf),)  # the largest changes of two passes

    def __call__(self, x: Tensor, new: Tensor) -> Tensor:
        """Returns where a pass from x to new leads."""
        event = tuple(range(-self.event_dim, 0))
        change = new - x
        worst = (change.abs() / (1 + new.abs())).amax(dim=event, keepdim=True)  # perhaps NaN
        less = worst < torch.maximum(*self.recent)
        # Zeros switch the preconditioner off for the rest of the iteration.
        self.recent = torch.where(less, worst, 0), torch.where(less, self.recent[0], 0)
        rows = change.nan_to_num(nan=0.0).clamp(-self.bound, self.bound)
        rows = rows.flatten(x.ndim - self.event_dim)
        with without_autocast(rows):
            ahead = (rows @ self.matrix).view_as(new)
        return torch.where(less, new + ahead, new)


def nilpotent_iteration(
    step: Callable[[Tensor], Tensor],
    x: Tensor,
    event_dim: int,
    solver: Solver,
    problem: str,
    passes: int | None = None,
    preconditioner: Tensor | None = None,
    trusted: bool = False,
) -> Tensor:
    """Iterates a nilpotent step until it converges, at most as many times as there are features.

    With a preconditioner that turns out to be of no use, the plain step may take as many passes
    again.

    Args:
        step: The step.
        x: The start.
        event_dim: The number of dimensions of an event.
        solver: Method, tolerance and number of iterations.
        problem: What the fixed point is, for records and messages.
        passes: A bound of the number of passes that is lower than the number of features.
        preconditioner: The matrix of :meth:`AutoregressiveMap.preconditioner`.
        trusted: Whether the step is known to be nilpotent.

    Raises:
        InversionError: If the step turns out not to be nilpotent, or every event leaves the range
            of the dtype.

    Warns:
        InversionWarning: If some events leave it, or the tolerance is missed because
            ``solver.max_iter`` is small.
    """
    features = prod(x.shape[x.ndim - event_dim :])
    bound = min(features, passes or features)
    if trusted and bound <= _FEW and preconditioner is None and solver.max_iter is None:
        # To find out whether fewer passes are enough takes longer than to take them.
        new = x
        with torch.no_grad():
            for _ in range(bound):
                new = step(new)
        if new.numel() and float(new.abs().max()) < largest(x.dtype):  # False for NaN
            record(problem, bound, new.numel())
            return new
    exact = bound if preconditioner is None else 2 * bound
    limit = min(solver.max_iter or (100 if solver.method == "banach" else exact), exact)
    aim, tolerance = solver.tolerances(torch.finfo(x.dtype).eps)
    ahead = None if preconditioner is None else _Preconditioner(preconditioner, event_dim, x)
    x, new, iterations, error = _iterate(step, x, limit, aim, ahead, bound)
    record(problem, iterations, x.numel())
    if error <= aim:
        return x
    is_exact = limit >= exact
    if features == 1 or (trusted and is_exact):
        return cut_off(new, event_dim)[0]
    # One more pass tells whether x is exact, as it should be.
    with torch.no_grad():
        new, inside = cut_off(step(x), event_dim)
    change = (new - x).abs() / (1 + new.abs())
    error = float((change if inside is None else change[inside]).max())
    if not error <= tolerance:
        message = missed(problem, error, tolerance, limit)
        if is_exact and not error <= torch.finfo(x.dtype).eps ** 0.5:
            raise InversionError(
                f"{message} {limit} passes are exact for every triangular map: this one is not "
                "triangular or not deterministic. Call '.eval()' if it has dropout."
            )
        warnings.warn(message, InversionWarning, stacklevel=2)
    return x if inside is None else torch.where(inside, x, new)


def _iterate(
    step: Callable[[Tensor], Tensor],
    x: Tensor,
    limit: int,
    aim: float,
    ahead: _Preconditioner | None,
    bound: int,
) -> tuple[Tensor, Tensor, int, float]:
    """Takes passes until nothing changes by more than the aim, preconditioned up to the bound.

    The first pass runs in the grad mode that is set, so that what caches its results, as
    parametrizations and autocast do, caches them with a graph; the others run without.

    Returns:
        The last x within the range of the dtype, as the last pass left it, the number of passes,
        and the largest relative change in the last one, infinite where it is not known.
    """
    graph, most = torch.is_grad_enabled(), largest(x.dtype)
    for iteration in range(1, limit + 1):
        with torch.set_grad_enabled(graph and iteration == 1):
            new = step(x).detach()
        if ahead is not None and iteration <= bound:
            new = ahead(x, new)
        error = torch.inf if new.numel() else 0.0
        if iteration > 1 and new.numel():  # the first pass is almost never the last
            error = float(((new - x).abs() / (1 + new.abs())).max())
        x = new.clamp(-most, most)
        if not isfinite(error):
            x = x.nan_to_num(nan=0.0)
        if error <= aim:
            break
    return x, new, iteration, error
