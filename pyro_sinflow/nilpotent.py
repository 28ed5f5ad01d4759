r"""Fixed points of nilpotent iterations.

Each pass :math:`x \leftarrow \tau^{-1}(y; h(x))` of the inverse of a triangular map makes at least
one more feature exact, so that D passes are enough for D features. The iteration usually converges
to round-off in fewer passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import isfinite, prod

import torch
from pyro.distributions import is_validation_enabled
from torch import Tensor

from .solvers import WHAT, InversionError, InversionWarning, Solver, missed, record

_UNTESTED = 5  # the largest number of passes that are done without tests in between


def largest(dtype: torch.dtype) -> float:
    """Returns the largest magnitude that an inverse may return.

    A feature that has not converged may overflow. Infinity times a masked weight of zero would then
    turn features that have converged into NaN.
    """
    return torch.finfo(dtype).max ** 0.5


def events_within(x: Tensor, event_dim: int, magnitude: float) -> Tensor:
    """Returns which events have magnitudes below a given one, with as many dimensions as x."""
    return (x.abs() < magnitude).all(dim=tuple(range(-event_dim, 0)), keepdim=True)  # False for NaN


def _in_range(x: Tensor) -> bool:
    """Whether all elements are below the largest magnitude that an inverse may return."""
    return float(x.abs().max()) < largest(x.dtype)  # False for NaN


def zero_lost(x: Tensor, event_dim: int, problem: str) -> tuple[Tensor, Tensor | None]:
    """Puts zeros in the place of events that leave the range of their dtype.

    Returns:
        x with zeros in such events, and a mask of the other events, with as many dimensions as x.
        If no event leaves the range, x and :py:`None`.

    Raises:
        InversionError: If every event leaves the range while Pyro's validation is on.

    Warns:
        InversionWarning: If some events leave the range, or all of them with validation off: MCMC
            switches it off, and rejects a state whose density is NaN.
    """
    if not x.numel() or _in_range(x):
        return x, None
    inside = events_within(x, event_dim, largest(x.dtype))
    lost = inside.numel() - int(inside.sum())
    message = (
        f"The {WHAT[problem]} leaves the range of {x.dtype} in {lost} of {inside.numel()} events: "
        "the map is not finite there, or its slopes are too extreme. Bounded activations, such as "
        "torch.nn.Tanh, or float64 may help."
    )
    if lost == inside.numel() and is_validation_enabled():
        raise InversionError(message)
    warnings.warn(f"{message} These events are set to NaN.", InversionWarning, stacklevel=2)
    return x.where(inside, 0.0), inside


def nilpotent_iteration(
    step: Callable[[Tensor], Tensor],
    x: Tensor,
    event_dim: int,
    solver: Solver,
    problem: str,
    passes: int,
    trusted: bool = False,
    careful: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Iterates a nilpotent step until it converges, at most ``passes`` times.

    Args:
        step: The step.
        x: The start.
        event_dim: The number of dimensions of an event.
        solver: Method, tolerance and number of iterations.
        problem: What the fixed point is, for records and messages.
        passes: A number of passes, at least one, that is enough.
        trusted: Whether the step is known to be nilpotent.
        careful: A step that keeps elements that have converged, for as many passes again. Without
            it, elements still change by rounding errors, which extreme slopes amplify.

    Returns:
        The fixed point and, as :func:`zero_lost` does, a mask of the events in range, or
        :py:`None`.

    Raises:
        InversionError: If the step is not nilpotent, or as :func:`zero_lost` does.

    Warns:
        InversionWarning: As :func:`zero_lost` does, or if the tolerance is missed because
            ``solver.max_iter`` is small.
    """
    if trusted and passes <= _UNTESTED and solver.max_iter is None:
        # Few passes take less time than a test of whether fewer are enough.
        new = x
        with torch.no_grad():
            for _ in range(passes):
                new = step(new)
        if new.numel() and _in_range(new):
            record(problem, passes, new.numel())
            return new, None
    limit = min(solver.max_iter or (100 if solver.method == "banach" else passes), passes)
    aim, tolerance = solver.tolerances(torch.finfo(x.dtype).eps)
    x, new, iterations, error = _iterate(step, x, limit, aim)
    is_exact = limit >= passes
    if careful is not None and is_exact and aim < error < torch.inf and _in_range(new):
        x, new, more, error = _iterate(careful, x, passes, aim)
        iterations += more
    record(problem, iterations, x.numel())
    if error <= aim:
        return x, None
    if prod(x.shape[x.ndim - event_dim :]) <= 1 or (trusted and is_exact):
        return zero_lost(new, event_dim, problem)
    # One more pass shows whether x is exact, as it should be.
    with torch.no_grad():
        new, inside = zero_lost(step(x), event_dim, problem)
    change = (new - x).abs() / (1 + new.abs())
    error = float((change if inside is None else change.where(inside, 0.0)).max())
    if not error <= tolerance:
        message = missed(problem, error, tolerance, limit)
        if is_exact and not error <= torch.finfo(x.dtype).eps ** 0.5:
            raise InversionError(
                f"{message} {passes} passes are enough for triangular maps, so this one is not "
                "triangular or not deterministic, or its slopes are extreme. Call '.eval()' if it "
                "has dropout or spectral normalization. A conditioner of your own must not see the "
                "feature itself, nor later ones."
            )
        warnings.warn(message, InversionWarning, stacklevel=2)
    return x if inside is None else x.where(inside, 0.0), inside


def _iterate(
    step: Callable[[Tensor], Tensor], x: Tensor, limit: int, aim: float
) -> tuple[Tensor, Tensor, int, float]:
    """Runs passes until no feature changes by more than ``aim``.

    The first pass runs in the current grad mode, so that parametrizations and autocast cache
    weights with a graph. The others run without gradients.

    Returns:
        The last x, clamped to the range of the dtype; the last x as computed; the number of passes;
        and the largest relative change in the last pass, or infinity if it is not known.
    """
    graph, most = torch.is_grad_enabled(), largest(x.dtype)
    for iteration in range(1, limit + 1):
        with torch.set_grad_enabled(graph and iteration == 1):
            new = step(x).detach()
        error = torch.inf if new.numel() else 0.0
        if iteration > 1 and new.numel():  # the first pass is almost never the last
            error = float(((new - x).abs() / (1 + new.abs())).max())
        x = new.clamp(-most, most)
        if not isfinite(error):
            x = x.nan_to_num(nan=0.0)
        if error <= aim:
            break
    return x, new, iteration, error
