r"""Solvers, what they record, and the two iterations that invert maps.

- :func:`solve_increasing` inverts increasing functions of single numbers that come with bounds of
  their root: Halley's method, then Newton's for the few that it leaves, with bisection where a step
  leaves the bracket or fails to halve the residual. It converges for every such function.
- :func:`nilpotent_iteration` finds the fixed point of maps that depend strictly on the features
  before: it is exact after as many iterations as there are features.

The paper's Algorithm 1, a plain fixed-point iteration for both, is the method ``"banach"``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import isnan, prod
from typing import NamedTuple

import torch

from . import _validate as check
from .arrays import Array
from .sinusoid import Sinusoid

# Picking the elements that have not converged takes longer than moving as many as these once more.
_SMALL = 4096


class InversionError(RuntimeError):
    """An inverse failed: its input, or the map, breaks what the solver relies on."""


class InversionWarning(UserWarning):
    """An inverse stopped before it reached its tolerance."""


@dataclass(frozen=True)
class Solver:
    r"""How an inverse is computed.

    Args:
        method: ``"default"`` inverts sinusoids by Halley's and bracketed Newton steps, and
            triangular maps by forward substitution or nilpotent iteration. ``"banach"`` is the
            paper's Algorithm 1, a fixed-point iteration for both. It converges linearly, at the
            rate :math:`|\alpha|`: use it for comparison.
        tolerance: The iteration stops once :math:`|f(x) - y| \leq` ``tolerance``
            :math:`\cdot (1 + |x| + |y|)` holds everywhere, for each sinusoid of a chain by itself;
            for triangular maps, once a pass changes no feature by more than ``tolerance``
            :math:`\cdot (1 + |x|)`. If :py:`None`, the iteration aims at 4 times the machine
            epsilon of the dtype, and warns beyond 32 times.
        max_iter: The largest number of iterations. If :py:`None`, 200 for sinusoids and one pass
            per feature for triangular maps (twice as many where a preconditioner turns out to be of
            no use); 100 for ``"banach"``. Where Python cannot branch on values (``torch.compile``,
            ``torch.func``, forward mode), a sinusoid takes ``max_iter`` iterations, or 40, and a
            triangular map one pass per feature, or ``max_iter`` if that is less.
        derivatives: How many times the inverse of a triangular map can be differentiated by
            reverse mode. Each order takes one more evaluation of the map.

    Raises:
        ValueError: If the method is unknown, or a number not positive.
        TypeError: If ``tolerance`` is not a number, or another number not an integer.

    Example:
        >>> Solver("banach", max_iter=50)
        Solver(method='banach', tolerance=None, max_iter=50, derivatives=2)
    """

    method: str = "default"
    tolerance: float | None = None
    max_iter: int | None = None
    derivatives: int = 2

    def __post_init__(self) -> None:
        check.choice("method", self.method, ("default", "banach"))
        if self.tolerance is not None:
            check.real("tolerance", self.tolerance, 0.0, 1.0)
        if self.max_iter is not None:
            check.size("max_iter", self.max_iter)
        check.size("derivatives", self.derivatives)

    def tolerances(self, eps: float) -> tuple[float, float]:
        """Returns the tolerance that stops the iteration, and that beyond which it warns."""
        if self.tolerance is not None:
            return self.tolerance, self.tolerance
        return 4 * eps, 32 * eps


class Inversion(NamedTuple):
    """One run of a solver.

    Args:
        problem: ``"sinusoid"``, ``"triangular"`` or ``"adjoint"``.
        iterations: For a chain of sinusoids, the most that any element of any of them took. For a
            triangular map, the passes through its network; 1 where features were substituted one
            after the other.
        elements: The number of equations: the size of the solution, batch included, for each
            sinusoid of a chain.
    """

    problem: str
    iterations: int
    elements: int


# The lists of all contexts, one inside the other.
_records: ContextVar[tuple[list[Inversion], ...]] = ContextVar("records", default=())


@contextmanager
def record_inversions() -> Iterator[list[Inversion]]:
    """Records every inverse that is computed within the context, with its iterations.

    Yields:
        A list to which each solver run appends an :class:`Inversion`. The passes of a triangular
        map's gradient are listed as ``"adjoint"``.

    Example:
        >>> t = SinusoidalTransform(*torch.zeros(3, 4), torch.ones(()), torch.zeros(()))
        >>> with record_inversions() as inversions:
        ...     x = t.inv(torch.linspace(-3, 3, 7))
        >>> inversions
        [Inversion(problem='sinusoid', iterations=..., elements=7)]
    """
    records: list[Inversion] = []
    token = _records.set((*_records.get(), records))
    try:
        yield records
    finally:
        _records.reset(token)


def record(problem: str, iterations: int, elements: int) -> None:
    """Adds a run of a solver to all records that are open."""
    if not torch.compiler.is_compiling():
        for records in _records.get():
            records.append(Inversion(problem, iterations, elements))


def missed(problem: str, worst: float, tolerance: float, iterations: int) -> str:
    """Says that a solver missed its tolerance."""
    what = {
        "sinusoid": "inverse of a sinusoidal map",
        "triangular": "inverse of a triangular map",
        "adjoint": "gradient of the inverse of a triangular map",
    }
    return (
        f"The {what[problem]} stopped after {iterations} iterations with a relative "
        f"error of {worst:.2g}, while its tolerance is {tolerance:.2g}."
    )


class Root(NamedTuple):
    """What a solver found."""

    x: Array
    iterations: int
    error: float | Array  # the largest relative error that was seen; an array if it is not known


def solve_increasing(
    function: Sinusoid,
    y: Array,
    solver: Solver,
    fast: Callable[[Array], tuple[Array, ...]] | None = None,
    may_branch: bool = True,
) -> Root:
    r"""Solves :math:`f(x) = y` for each number.

    Up to four of Halley's steps find nearly all roots. What remains is solved apart, by Newton's
    method with bisection as a safeguard: each iteration halves the residual or the bracket, or does
    better.

    Args:
        function: The function :math:`f`, with bounds of its derivatives and of its root.
        y: The values to invert, with shape (B, 1, N).
        solver: Method, tolerance and number of iterations.
        fast: The same function, evaluated faster for all elements at once.
        may_branch: Whether the number of iterations may depend on values.
    """
    x = function.start(y)
    eps = float(function.xp.finfo(y.dtype).eps)
    aim, _ = solver.tolerances(eps)
    evaluate = fast or function.evaluate
    if solver.method == "banach":
        return _banach(evaluate, y, x, aim, solver.max_iter or 100, may_branch)
    limit = solver.max_iter or (200 if may_branch else 40)
    # Below round-off, only the residual itself tells by how much the tolerance is missed.
    if not may_branch or aim < eps:
        return _safeguarded(function, y, x, aim, limit, may_branch)
    return _halley(function, evaluate, y, x, aim, limit)


def _relative(error: Array, x: Array, y: Array) -> Array:
    """Returns the largest relative error."""
    relative = abs(error) / (1 + abs(x) + abs(y))
    return relative.max() if prod(x.shape) else relative.sum()


def _banach(
    evaluate: Callable[[Array], tuple[Array, ...]],
    y: Array,
    x: Array,
    aim: float,
    limit: int,
    may_branch: bool,
) -> Root:
    """Algorithm 1 of the paper."""
    for iteration in range(limit + 1):
        error = evaluate(x)[0] - y
        worst = _relative(error, x, y)
        if iteration == limit or (may_branch and bool(worst <= aim)):
            break
        x = x - error
    return Root(x, iteration, worst)


def _halley(
    function: Sinusoid,
    evaluate: Callable[[Array], tuple[Array, ...]],
    y: Array,
    x: Array,
    aim: float,
    limit: int,
) -> Root:
    r"""Halley's steps for all elements, then safeguarded ones for those that need them.

    After the step :math:`\delta`, the residual is at most :math:`|\delta|^3 (3 M_2^2 / 8 f'(x) +
    M_3 / 6)`, where :math:`M_2` and :math:`M_3` bound second and third derivative. This tells of
    most elements that they have converged, without evaluating the function again.
    """
    xp = function.xp
    second, third = function.bounds()
    square, cubic, enough = 0.375 * second * second, third / 6, (1 + abs(y)) * (aim / 2)
    size = prod(y.shape)
    few = 0 if size <= _SMALL or getattr(y, "is_cuda", False) else size // 8
    iteration, count = 0, size
    while iteration < min(limit, 4) and count > few:
        # One step is almost never enough.
        for _ in range(1 if iteration else min(limit, 2)):
            value, slope, curvature = evaluate(x)
            newton = (y - value) / slope
            half = newton * curvature / slope * 0.5
            turn = xp.clip(half, -0.5, 0.5)
            step = newton / (1 + turn)
            x = x + step
            iteration += 1
        residual = abs(step * step * step) * (square / slope + cubic)
        # Where the step was cut, the bound does not hold.
        converged = (residual <= enough) & (half == turn)
        count = size - int(converged.sum())
    if count == 0:
        return Root(x, iteration, 0.0)

    row, _, column = xp.nonzero(~converged)
    rest = _safeguarded(
        function.take(row, column),
        y[row, :, column].T[None],
        x[row, :, column].T[None],
        aim,
        limit - iteration,
    )
    x[row, 0, column] = rest.x[0, 0]
    return Root(x, iteration + rest.iterations, rest.error)


def _safeguarded(
    function: Sinusoid, y: Array, x: Array, aim: float, limit: int, may_branch: bool = True
) -> Root:
    """Newton's method, with bisection where it leaves the bracket or gains less than a bit."""
    xp = function.xp
    eps = float(xp.finfo(y.dtype).eps)
    lower, upper = function.bracket(y)
    x = xp.minimum(xp.maximum(x, lower), upper)
    value, slope, _ = function.evaluate(x)
    error = value - y
    previous = xp.full_like(error, float("inf"))
    for iteration in range(limit + 1):
        done = abs(error) <= aim * (1 + abs(x) + abs(y))
        done = done | (upper - lower <= 2 * eps * abs(x))  # no number left between them
        if iteration == limit or (may_branch and bool(done.all())):
            break
        lower = xp.where(error < 0, x, lower)
        upper = xp.where(error > 0, x, upper)
        step = x - error / slope
        bisect = (step < lower) | (step > upper) | (abs(error) > previous / 2)
        step = xp.where(bisect, lower + (upper - lower) / 2, step)
        x = xp.where(done, x, step)
        previous = abs(error)
        value, slope, _ = function.evaluate(x)
        error = value - y
    return Root(x, iteration, _relative(error, x, y))


def report(roots: Sequence[Root], elements: int, solver: Solver, eps: float) -> None:
    """Records the roots of the sinusoids of a chain, which had so many elements each.

    Warns:
        InversionWarning: If the tolerance is missed.
    """
    iterations, worst = 0, 0.0
    for root in roots:
        iterations = max(iterations, root.iterations)
        error = float(root.error)
        if error > worst or isnan(error):
            worst = error
    record("sinusoid", iterations, len(roots) * elements)
    _, tolerance = solver.tolerances(eps)
    if not worst <= tolerance:
        message = missed("sinusoid", worst, tolerance, iterations)
        warnings.warn(message, InversionWarning, stacklevel=2)
