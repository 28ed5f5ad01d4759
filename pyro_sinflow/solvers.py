r"""Options, records and errors of solvers, and root finding for increasing functions.

:func:`solve_increasing` inverts increasing functions of one variable with a known bracket of the
root. It uses Halley's method, then Newton's method for the few elements that have not converged,
with bisection where a step leaves the bracket or does not halve the residual. It converges for
every such function. Triangular maps are inverted in :mod:`pyro_sinflow.nilpotent`.

The method ``"banach"`` is the paper's Algorithm 1 for sinusoids, a plain fixed-point iteration.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from math import isnan, prod
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from . import _validate as check
from ._torch import can_branch_on
from .arrays import Array
from .sinusoid import Sinusoid

# Below this size, one more step for all elements is faster than selecting the unconverged ones.
_SMALL = 4096


class InversionError(RuntimeError):
    """An inverse failed: the map is not triangular, not deterministic or not finite."""


class InversionWarning(UserWarning):
    """An inverse missed its tolerance, or some of its values leave the range of the dtype."""


@dataclass(frozen=True)
class Solver:
    r"""How an inverse is computed.

    Args:
        method: ``"default"`` inverts sinusoids by Halley's method and bracketed Newton steps, and
            triangular maps by forward substitution or repeated passes. ``"banach"`` is meant for
            comparison: the paper's Algorithm 1 for sinusoids, which converges linearly with rate
            :math:`|\alpha|`, and for triangular maps the passes of the default, started at y.
        tolerance: The relative tolerance, in :math:`(0, 1)`. Sinusoids: iterate until
            :math:`|f(x) - y| \leq` ``tolerance`` :math:`\cdot (1 + |x| + |y|)` for all elements of
            each sinusoid. Triangular maps: iterate until a pass changes no feature by more than
            ``tolerance`` :math:`\cdot (1 + |x|)`. If :py:`None`, the iteration stops at 4 times the
            machine epsilon of the dtype, and a warning is given beyond 32 times.
        max_iter: The largest number of iterations. If :py:`None`, 200 for sinusoids and one pass
            per feature for triangular maps; 100 for ``"banach"``. Where Python cannot branch on
            values (``torch.compile``, ``torch.func``, ``torch.jit.trace``, ``make_fx``, forward
            mode, and the capture of a CUDA graph), the solver cannot stop early and does all
            iterations. The default for sinusoids is then 40, and during the capture of a CUDA
            graph, triangular maps use forward substitution if they support it.
        derivatives: How many times the inverse of a triangular map can be differentiated by
            reverse mode. Each order takes one more evaluation of the map.

    Raises:
        ValueError: If ``method`` is unknown, ``tolerance`` is not in :math:`(0, 1)`, or another
            number is not positive.
        TypeError: If ``tolerance`` is not a number, or another number is not an integer.

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
        """Returns the tolerance at which the iteration stops, and that beyond which it warns."""
        if self.tolerance is not None:
            return self.tolerance, self.tolerance
        return 4 * eps, 32 * eps


class Inversion(NamedTuple):
    """One run of a solver.

    Args:
        problem: ``"sinusoid"``, ``"triangular"`` or ``"adjoint"``.
        iterations: For a chain of sinusoids, the largest number of iterations that any element
            took. For a triangular map, the number of passes through its network, which is 1 for
            forward substitution.
        elements: The number of equations: the number of elements of the solution, batch included,
            times the number of sinusoids of a chain.

    Example:
        >>> with record_inversions() as inversions:
        ...     x = LDU(3).inv(torch.randn(5, 3))
        >>> [i.problem for i in inversions]
        ['triangular', 'sinusoid', 'triangular']
    """

    problem: str
    iterations: int
    elements: int


# The lists of all active contexts, from outer to inner.
_records: ContextVar[tuple[list[Inversion], ...]] = ContextVar("records", default=())


@contextmanager
def record_inversions() -> Iterator[list[Inversion]]:
    """Records every inverse that is computed within the context, and its iterations.

    Yields:
        A list to which each run of a solver appends an :class:`Inversion`. The gradient of the
        inverse of a triangular map is recorded as ``"adjoint"``.

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
    """Appends a run of a solver to the lists of all active contexts."""
    if not torch.compiler.is_compiling():
        for records in _records.get():
            records.append(Inversion(problem, iterations, elements))


WHAT = {
    "sinusoid": "inverse of a sinusoidal map",
    "triangular": "inverse of a triangular map",
    "adjoint": "gradient of the inverse of a triangular map",
}


def missed(problem: str, worst: float, tolerance: float, iterations: int) -> str:
    """Returns the message that a solver missed its tolerance."""
    return (
        f"The {WHAT[problem]} stopped after {iterations} iterations with a relative "
        f"error of {worst:.2g}, while its tolerance is {tolerance:.2g}."
    )


class Root(NamedTuple):
    """The result of a solver."""

    x: Array
    iterations: int
    # The largest relative error, an array inside torch transforms. It is 0 if a bound of the error
    # shows that it is below the tolerance.
    error: float | Array


def solve_increasing(
    function: Sinusoid,
    y: Array,
    solver: Solver,
    fast: Callable[[Array], tuple[Array, ...]] | None = None,
) -> Root:
    r"""Solves :math:`f(x) = y` for each number.

    Up to four steps of Halley's method find nearly all roots. The remaining elements are solved
    separately by Newton's method with bisection as a safeguard: each iteration at least halves the
    residual or the bracket.

    ``fast`` is a faster version of the function, which evaluates all elements.
    """
    may_branch = not isinstance(y, Tensor) or can_branch_on(y, function.a)
    x = function.start(y)
    eps = float(function.xp.finfo(y.dtype).eps)
    aim, _ = solver.tolerances(eps)
    evaluate = fast or partial(function.evaluate, curvature=True)
    if solver.method == "banach":
        return _banach(function, evaluate, y, x, aim, solver.max_iter or 100, may_branch)
    limit = solver.max_iter or (200 if may_branch else 40)
    # For tolerances below round-off, the error has to be computed from the residual.
    if not may_branch or aim < eps:
        return _safeguarded(function, y, x, aim, limit, may_branch)
    return _halley(function, evaluate, y, x, aim, limit)


def _relative(error: Array, x: Array, y: Array, xp: SimpleNamespace) -> Array:
    """Returns the largest relative error, of those elements whose values y are finite."""
    relative = xp.where(y - y == 0, abs(error) / (1 + abs(x) + abs(y)), 0.0)
    return relative.max() if prod(x.shape) else relative.sum()


def _banach(
    function: Sinusoid,
    evaluate: Callable[[Array], tuple[Array, ...]],
    y: Array,
    x: Array,
    aim: float,
    limit: int,
    may_branch: bool,
) -> Root:
    """Runs Algorithm 1 of the paper."""
    for iteration in range(limit + 1):
        error = evaluate(x)[0] - y
        worst = _relative(error, x, y, function.xp)
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
    r"""Runs Halley's method for all elements, then safeguarded steps for those that need them.

    After a step :math:`\delta`, the residual is at most :math:`|\delta|^3 (3 M_2^2 / 8 f'(x) +
    M_3 / 6)`, where :math:`M_2` and :math:`M_3` bound second and third derivative. For most
    elements, this shows that they have converged without another evaluation of the function.
    """
    xp = function.xp
    second, third = function.bounds()
    square, cubic, enough = 0.375 * second * second, third / 6, (1 + abs(y)) * (aim / 2)
    size = prod(y.shape)
    on_gpu = isinstance(y, Tensor) and y.is_cuda
    few = 0 if size <= _SMALL or on_gpu else size // 8
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
        # The bound does not hold where the step was clipped.
        converged = (residual <= enough) & (half == turn)
        count = size - int(converged.sum())
    if count == 0:
        return Root(x, iteration, 0.0)

    row, _, column = xp.where(~converged)
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
    """Runs Newton's method, with bisection where a step leaves the bracket or is too slow."""
    xp = function.xp
    eps = float(xp.finfo(y.dtype).eps)
    lower, upper = function.bracket(y)
    x = xp.minimum(xp.maximum(x, lower), upper)
    previous = xp.full_like(x, float("inf"))
    for iteration in range(limit + 1):
        value, slope = function.evaluate(x)
        error = value - y
        done = abs(error) <= aim * (1 + abs(x) + abs(y))
        done = done | (upper - lower <= 2 * eps * abs(x))  # no floating-point number in between
        done = done | (error != error)  # NaN has no root
        if iteration == limit or (may_branch and bool(done.all())):
            break
        lower = xp.where(error < 0, x, lower)
        upper = xp.where(error > 0, x, upper)
        step = x - error / slope
        bisect = (step < lower) | (step > upper) | (abs(error) > previous / 2)
        step = xp.where(bisect, lower + (upper - lower) / 2, step)
        x = xp.where(done, x, step)
        previous = abs(error)
    return Root(x, iteration, _relative(error, x, y, xp))


def report(roots: Sequence[Root], elements: int, solver: Solver, eps: float) -> None:
    """Records the roots of the sinusoids of a chain, each with ``elements`` elements.

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
