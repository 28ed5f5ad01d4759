r"""Solvers, what they record, and the inverse of increasing functions.

An element-wise increasing function with known bounds of its root is inverted by
:func:`solve_bracketed`, with a guarantee: by Halley's method, then for the few that it leaves by
Newton's, and by bisection wherever Newton's step leaves the bracket or fails to halve the residual.
Triangular maps are the business of :mod:`pyro_sinflow.triangular`.

Algorithm 1 of the paper, a fixed-point iteration for both, is the method ``"banach"``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ._checks import check_choice, check_real, check_size, readable

# To pick the elements that have not arrived takes longer than to move as many as these once more;
# on a GPU, which is quick to move all, longer than to move any number.
_SMALL = 4096


class InversionError(RuntimeError):
    """An inverse failed: its input, or the map, breaks what the solver relies on."""


class InversionWarning(UserWarning):
    """An inverse stopped before it reached its tolerance."""


@dataclass(frozen=True)
class Solver:
    r"""How an inverse is computed.

    Args:
        method: ``"newton"`` inverts sinusoids by Halley's steps and, where these do not arrive, by
            bracketed ones of Newton's, and triangular maps by forward substitution or nilpotent
            iteration. ``"banach"`` is the paper's Algorithm 1, a fixed-point iteration for both. It
            converges linearly, at the rate :math:`|\alpha|`: use it for comparison.
        tolerance: The iteration stops once :math:`|f(x) - y| \leq` ``tolerance``
            :math:`\cdot (1 + |x| + |y|)` holds everywhere, for each sinusoid of a chain by itself,
            whose errors add up; for triangular maps, once a pass changes no feature by more than
            ``tolerance`` :math:`\cdot (1 + |x|)`. If :py:`None`, it aims at 4 times the machine
            epsilon of the dtype, and answers for 32 times.
        max_iter: The largest number of iterations. If :py:`None`, 200 for ``"newton"`` and 100 for
            ``"banach"``, while a nilpotent iteration takes at most one pass per feature, or two
            where it begins with a preconditioner that turns out to be of no use. Where values
            cannot be read (``torch.compile``, ``torch.func``, fake tensors), a sinusoid takes
            ``max_iter`` iterations, or 40, and a triangular map one pass per feature, or
            ``max_iter`` if that is less.

    Raises:
        ValueError: If the method is unknown, or a number not positive.
        TypeError: If ``tolerance`` is not a number, or ``max_iter`` not an integer.

    Example:
        >>> Solver("banach", max_iter=50)
        Solver(method='banach', tolerance=None, max_iter=50)
    """

    method: str = "newton"
    tolerance: float | None = None
    max_iter: int | None = None

    def __post_init__(self) -> None:
        check_choice("method", self.method, ("newton", "banach"))
        if self.tolerance is not None:
            check_real("tolerance", self.tolerance, 0.0, 1.0)
        if self.max_iter is not None:
            check_size("max_iter", self.max_iter)

    def tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        """The tolerance that stops the iteration, and the one beyond which the result is wrong."""
        if self.tolerance is not None:
            return self.tolerance, self.tolerance
        eps = torch.finfo(dtype).eps
        return 4 * eps, 32 * eps


class Inversion(NamedTuple):
    """One run of a solver.

    Args:
        problem: ``"sinusoid"``, ``"triangular"`` or ``"adjoint"``.
        iterations: For a chain of sinusoids, the most that any element of any of them took. For a
            triangular map, the passes through its network; 1 where features are settled one after
            the other, by forward substitution.
        elements: The number of equations: the size of the solution, batch included, for each
            sinusoid of a chain.
    """

    problem: str
    iterations: int
    elements: int


# The lists of all contexts, one inside of the other.
_trace: ContextVar[tuple[list[Inversion], ...]] = ContextVar("inversions", default=())


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
    token = _trace.set((*_trace.get(), records))
    try:
        yield records
    finally:
        _trace.reset(token)


def record(problem: str, iterations: int, elements: int) -> None:
    """Adds a run of a solver to all records that are open."""
    if torch.compiler.is_compiling():
        return
    for records in _trace.get():
        records.append(Inversion(problem, iterations, elements))


def missed(problem: str, worst: Tensor, tolerance: float, iterations: int) -> str:
    """Says that a solver missed its tolerance."""
    what = {
        "sinusoid": "inverse of a sinusoidal map",
        "triangular": "inverse of a triangular map",
        "adjoint": "gradient of the inverse of a triangular map",
    }
    return (
        f"The {what[problem]} stopped after {iterations} iterations with a relative "
        f"error of {float(worst):.2g}, while its tolerance is {tolerance:.2g}."
    )


class Increasing(Protocol):
    """An increasing function of each element of x, with shape (B, N)."""

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Bounds of the magnitudes of second and third derivative, with shape (B, 1) or (B, N)."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns value, slope and second derivative, with shape (B, N)."""

    def bracket(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a lower and an upper bound of the root, with shape (B, N)."""

    def take(self, where: tuple[Tensor, ...]) -> Increasing:
        """Returns the functions of some elements, given their indices, as a single row."""


class Root(NamedTuple):
    """What a solver found."""

    x: Tensor
    iterations: int
    error: Tensor  # the largest relative error that was seen, a scalar


def solve_bracketed(function: Increasing, y: Tensor, start: Tensor, solver: Solver) -> Root:
    r"""Solves :math:`f(x) = y` element by element, for an increasing :math:`f`.

    Up to four of Halley's steps settle nearly all elements. What remains is solved apart, by
    Newton's method with bisection as a safeguard: each iteration halves the residual or the
    bracket, or does better.

    Args:
        function: The function :math:`f`, with bounds of its derivatives and of its root.
        y: The values to invert, with shape :math:`(B, N)`.
        start: The first guess, with shape :math:`(B, N)`.
        solver: Method, tolerance and number of iterations.

    Returns:
        The root, with shape :math:`(B, N)`, to :func:`report`.
    """
    if solver.method == "banach":
        return _banach(function, y, start, solver)
    if not readable(y, start):
        return _safeguarded(function, y, start, solver, solver.max_iter or 40)
    limit = solver.max_iter or 200
    if solver.tolerances(y.dtype)[0] < torch.finfo(y.dtype).eps:
        # Out of reach: only the residual itself tells by how much.
        return _safeguarded(function, y, start, solver, limit)
    return _halley(function, y, start, solver, limit)


def report(roots: Sequence[Root], solver: Solver) -> None:
    """Records the roots of element-wise functions as one inversion.

    Warns:
        InversionWarning: If the tolerance is missed.
    """
    iterations = max((root.iterations for root in roots), default=0)
    record("sinusoid", iterations, sum(root.x.numel() for root in roots))
    if not roots or not all(readable(root.x, root.error) for root in roots):
        return
    _, tolerance = solver.tolerances(roots[0].x.dtype)
    worst = torch.stack([root.error for root in roots]).max()  # NaN, if one is
    if not worst <= tolerance:
        message = missed("sinusoid", worst, tolerance, iterations)
        warnings.warn(message, InversionWarning, stacklevel=2)


def _banach(function: Increasing, y: Tensor, x: Tensor, solver: Solver) -> Root:
    """Algorithm 1 of the paper."""
    aim, _ = solver.tolerances(y.dtype)
    limit = solver.max_iter or 100
    for iteration in range(limit + 1):
        error = function(x)[0] - y
        relative = error.abs() / (1 + x.abs() + y.abs())
        if iteration == limit or (readable(x) and bool((relative <= aim).all())):
            break
        x = x - error
    return Root(x, iteration, relative.max() if x.numel() else relative.sum())


class _Margins(NamedTuple):
    """What tells of an element that it has arrived."""

    square: Tensor
    cubic: Tensor
    enough: Tensor

    @classmethod
    def of(cls, function: Increasing, y: Tensor, solver: Solver) -> _Margins:
        second, third = function.bounds
        aim, _ = solver.tolerances(y.dtype)
        return cls(0.375 * second.square(), third / 6, (1 + y.abs()).mul_(aim / 2))


def _halley_steps(
    function: Increasing, y: Tensor, x: Tensor, margins: _Margins, steps: int
) -> tuple[Tensor, Tensor]:
    r"""Takes steps of Halley's method, and returns which elements have arrived by the last.

    After the step :math:`\delta`, the residual is at most :math:`|\delta|^3 (3 M_2^2 / 8 f'(x) +
    M_3 / 6)`, where :math:`M_2` and :math:`M_3` bound second and third derivative. This tells of
    most elements that they have arrived, without evaluating the function again.
    """
    for _ in range(steps):
        value, slope, bend = function(x)
        newton = (y - value).div_(slope)
        half = (newton * bend).div_(slope).mul_(0.5)
        turn = half.clamp(-0.5, 0.5)
        step = newton.div_(turn + 1)
        x = x + step
    residual = step.abs_().pow(3).mul_((margins.square / slope).add_(margins.cubic))
    return x, (residual <= margins.enough) & (half == turn)  # or else the formula does not hold


def attempt(
    function: Increasing, y: Tensor, start: Tensor, solver: Solver, steps: int
) -> tuple[Tensor, Tensor]:
    """Takes some of Halley's steps without reading values, as compiled kernels have to.

    Returns:
        The likely root, and which elements have arrived.
    """
    return _halley_steps(function, y, start, _Margins.of(function, y, solver), steps)


def _halley(function: Increasing, y: Tensor, x: Tensor, solver: Solver, limit: int) -> Root:
    """Halley's steps for all elements, then safeguarded ones for those that need them."""
    margins = _Margins.of(function, y, solver)
    few = y.numel() // 8 if y.device.type == "cpu" and y.numel() > _SMALL else 0
    iteration, count = 0, y.numel()
    while iteration < min(limit, 4) and count > few:
        # A first guess is hardly ever so good that one step is enough.
        steps = 1 if iteration else min(limit, 2)
        x, arrived = _halley_steps(function, y, x, margins, steps)
        iteration += steps
        count = y.numel() - int(arrived.sum())
    if count == 0:
        return Root(x, iteration, y.new_zeros(()))

    where = (~arrived).nonzero(as_tuple=True)
    some_y, some_x = y[where].unsqueeze(0), x[where].unsqueeze(0)
    solved, iterations, worst = _safeguarded(
        function.take(where), some_y, some_x, solver, limit - iteration
    )
    x = x.index_put(where, solved.squeeze(0))
    return Root(x, iteration + iterations, worst)


def _safeguarded(function: Increasing, y: Tensor, x: Tensor, solver: Solver, limit: int) -> Root:
    """Newton's method, with bisection where it leaves the bracket or gains less than a bit."""
    aim, _ = solver.tolerances(y.dtype)
    eps = torch.finfo(y.dtype).eps
    may_read = readable(x)

    lower, upper = function.bracket(y)
    x = x.clamp(lower, upper)
    value, slope, _ = function(x)
    error = value - y
    previous = torch.full_like(error, torch.inf)
    iteration = 0
    for iteration in range(limit + 1):
        settled = error.abs() <= aim * (1 + x.abs() + y.abs())
        settled = settled | (upper - lower <= 2 * eps * x.abs())  # no number left between them
        if iteration == limit or (may_read and bool(settled.all())):
            break
        lower = torch.where(error < 0, x, lower)
        upper = torch.where(error > 0, x, upper)
        step = x - error / slope
        bisect = (step < lower) | (step > upper) | (error.abs() > previous / 2)
        step = torch.where(bisect, lower + (upper - lower) / 2, step)
        x = torch.where(settled, x, step)
        previous = error.abs()
        value, slope, _ = function(x)
        error = value - y

    relative = error.abs() / (1 + x.abs() + y.abs())
    return Root(x, iteration, relative.max() if x.numel() else relative.sum())
