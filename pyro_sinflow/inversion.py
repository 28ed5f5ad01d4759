r"""Solvers that invert monotone and triangular maps, and their implicit derivatives.

There are two problems, each with a guarantee:

* an element-wise increasing function with known bounds of its root
  (:func:`solve_bracketed`): Newton's method, and bisection wherever Newton's step leaves the
  bracket or fails to halve the residual;
* a triangular map :math:`y_i = \tau(x_i; h_i(x_{<i}))` (:func:`invert_triangular`): the iteration
  :math:`x \leftarrow \tau^{-1}(y; h(x))` settles at least one more feature in each pass, whatever
  the map, so that it is exact after as many passes as there are features. It usually reaches
  round-off in a handful.

Algorithm 1 of the paper, a fixed-point iteration for both, is the method ``"banach"``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributions import Transform

from ._checks import check_choice, check_instance, check_real, check_size, readable


class InversionError(RuntimeError):
    """An inverse failed: its input, or the map, breaks what the solver relies on."""


class InversionWarning(UserWarning):
    """An inverse stopped before it reached its tolerance."""


@dataclass(frozen=True)
class Solver:
    r"""How an inverse is computed.

    Args:
        method: ``"newton"`` inverts sinusoids by bracketed Newton, and triangular maps by nilpotent
            iteration. ``"banach"`` is the paper's Algorithm 1, a fixed-point iteration for both. It
            converges linearly, at the rate :math:`|\alpha|`: use it for comparison.
        tolerance: The iteration stops once :math:`|f(x) - y| \leq` ``tolerance``
            :math:`\cdot (1 + |x| + |y|)` holds everywhere; for triangular maps, once a pass changes
            no feature by more than ``tolerance`` :math:`\cdot (1 + |x|)`. If :py:`None`, it aims at
            4 times the machine epsilon of the dtype, and answers for 32 times.
        max_iter: The largest number of iterations. If :py:`None`, 200 for ``"newton"`` and 100 for
            ``"banach"``, while a nilpotent iteration takes at most one pass per feature. Where
            values cannot be read (``torch.compile``, ``torch.func``, fake tensors), exactly this
            many iterations run.

    Raises:
        ValueError: If the method is unknown, or a number not positive.

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
    """One run of a solver."""

    problem: str  # "sinusoid", "triangular" or "adjoint"
    iterations: int
    elements: int  # of the solution, batch included


_trace: ContextVar[list[Inversion] | None] = ContextVar("inversions", default=None)


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
    token = _trace.set(records)
    try:
        yield records
    finally:
        _trace.reset(token)


def _record(problem: str, iterations: int, x: Tensor) -> None:
    records = _trace.get()
    if records is not None:
        records.append(Inversion(problem, iterations, x.numel()))


def _missed(problem: str, worst: Tensor, tolerance: float, iterations: int) -> str:
    return (
        f"The inverse of a {problem} map stopped after {iterations} iterations with a relative "
        f"error of {float(worst):.2g}, while its tolerance is {tolerance:.2g}."
    )


class Increasing(Protocol):
    """An increasing function of each element of x, with shape (B, 1, N)."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns value and slope, with shape (B, 1, N)."""

    def take(self, rows: Tensor) -> Increasing:
        """Returns the functions of some of the B rows."""


def solve_bracketed(
    function: Increasing, y: Tensor, lower: Tensor, upper: Tensor, start: Tensor, solver: Solver
) -> Tensor:
    r"""Solves :math:`f(x) = y` element by element, for an increasing :math:`f`.

    A few Newton steps, kept in the bracket, settle nearly all elements. What remains is solved
    apart, with bisection as a safeguard: each iteration halves the residual or the bracket, or does
    better.

    Args:
        function: Returns value and slope of :math:`f`.
        y: The values to invert, with shape :math:`(B, 1, N)`.
        lower: A lower bound of the root, with shape :math:`(B, 1, N)`.
        upper: An upper bound of the root, with shape :math:`(B, 1, N)`.
        start: The first guess, with shape :math:`(B, 1, N)`.
        solver: Method, tolerance and number of iterations.

    Returns:
        The root, with shape :math:`(B, 1, N)`.

    Warns:
        InversionWarning: If the tolerance is missed.
    """
    look = readable(y, lower)
    if solver.method == "banach":
        x, iterations, error = _banach(function, y, start, solver)
    elif not look:
        x = start.clamp(lower, upper)
        x, iterations, error = _safeguarded(function, y, lower, upper, x, solver, limit=40)
    else:
        x, iterations, error = _newton(function, y, lower, upper, start, solver)

    _record("sinusoid", iterations, x)
    if look and x.numel():
        _, tolerance = solver.tolerances(y.dtype)
        if not error <= tolerance:
            warnings.warn(
                _missed("sinusoidal", error, tolerance, iterations), InversionWarning, stacklevel=2
            )
    return x


def _banach(
    function: Increasing, y: Tensor, x: Tensor, solver: Solver
) -> tuple[Tensor, int, Tensor]:
    """Algorithm 1 of the paper."""
    aim, _ = solver.tolerances(y.dtype)
    limit = solver.max_iter or 100
    for iteration in range(limit + 1):
        error = function(x)[0] - y
        relative = error.abs() / (1 + x.abs() + y.abs())
        if iteration == limit or (readable(x) and bool((relative <= aim).all())):
            break
        x = x - error
    return x, iteration, relative.max() if x.numel() else relative.sum()


def _newton(
    function: Increasing, y: Tensor, lower: Tensor, upper: Tensor, x: Tensor, solver: Solver
) -> tuple[Tensor, int, Tensor]:
    """Plain Newton steps for all elements, then safeguarded ones for those that need them."""
    aim, _ = solver.tolerances(y.dtype)
    limit = solver.max_iter or 200
    bound = aim * (1 + y.abs())
    x = x.clamp(lower, upper)
    steps = min(limit, 4)
    for iteration in range(steps + 1):
        value, slope = function(x)
        error = value - y
        settled = error.abs() <= x.abs().mul_(aim).add_(bound)
        if bool(settled.all()):
            return x, iteration, bound.sum() * 0
        if iteration < steps:
            x = torch.where(settled, x, (x - error / slope).clamp(lower, upper))

    rest = (~settled).flatten().nonzero().squeeze(-1)

    def pick(tensor: Tensor) -> Tensor:
        return tensor.flatten()[rest].reshape(-1, 1, 1)

    part = function.take(rest // max(x.shape[-1], 1))
    solved, iterations, worst = _safeguarded(
        part, pick(y), pick(lower), pick(upper), pick(x), solver, limit=limit - steps
    )
    x = x.flatten().index_copy(0, rest, solved.flatten()).view_as(x)
    return x, steps + iterations, worst


def _safeguarded(
    function: Increasing,
    y: Tensor,
    lower: Tensor,
    upper: Tensor,
    x: Tensor,
    solver: Solver,
    limit: int,
) -> tuple[Tensor, int, Tensor]:
    """Newton's method, with bisection where it leaves the bracket or gains less than a bit."""
    aim, _ = solver.tolerances(y.dtype)
    eps = torch.finfo(y.dtype).eps
    look = readable(x)
    if not look and solver.max_iter:
        limit = solver.max_iter

    value, slope = function(x)
    error = value - y
    previous = torch.full_like(error, torch.inf)
    iteration = 0
    for iteration in range(limit + 1):
        settled = error.abs() <= aim * (1 + x.abs() + y.abs())
        settled = settled | (upper - lower <= 2 * eps * x.abs())  # no number left between them
        if iteration == limit or (look and bool(settled.all())):
            break
        lower = torch.where(error < 0, x, lower)
        upper = torch.where(error > 0, x, upper)
        step = x - error / slope
        bisect = (step < lower) | (step > upper) | (error.abs() > previous / 2)
        step = torch.where(bisect, lower + (upper - lower) / 2, step)
        x = torch.where(settled, x, step)
        previous = error.abs()
        value, slope = function(x)
        error = value - y

    relative = error.abs() / (1 + x.abs() + y.abs())
    return x, iteration, relative.max() if x.numel() else relative.sum()


class TriangularMap(NamedTuple):
    r"""A map :math:`y_i = \tau(x_i; h_i(x_{<i}))`, in whatever order of the features.

    Args:
        conditioner: Returns, given x, the element-wise increasing :math:`\tau` as a transform.
        event_dim: The number of dimensions of an event.
    """

    conditioner: Callable[[Tensor], Transform]
    event_dim: int

    def at(self, x: Tensor) -> Transform:
        """Returns the element-wise transform for the conditioner's input x."""
        return check_instance("conditioner(x)", self.conditioner(x), Transform)

    def value(self, x: Tensor, fixed: Tensor | None = None) -> Tensor:
        """Returns y; with ``fixed`` in place of x as the conditioner's input, where given."""
        return self.at(x if fixed is None else fixed)(x)

    def step(self, y: Tensor, x: Tensor) -> Tensor:
        """Returns the root of the map whose conditioner is held at x."""
        return self.at(x).inv(y)


def _settle(
    step: Callable[[Tensor], Tensor],
    x: Tensor,
    event_dim: int,
    solver: Solver,
    problem: str,
    passes: int | None = None,
) -> Tensor:
    """Iterates a nilpotent step until it settles, at most as many times as there are features."""
    features = x.shape[x.ndim - event_dim :].numel()
    bound = min(features, passes or features)
    limit = min(bound, solver.max_iter or (100 if solver.method == "banach" else bound))
    aim, tolerance = solver.tolerances(x.dtype)
    look = readable(x)
    # A feature that is not settled yet may overflow on the way, and infinity times a masked weight
    # of zero would spoil the features that are.
    largest = torch.finfo(x.dtype).max ** 0.5

    def advance(x: Tensor) -> tuple[Tensor, Tensor]:
        new = step(x)
        change = (new - x).abs() / (1 + new.abs())  # NaN where the step is not finite
        return new.nan_to_num(nan=0.0).clamp(-largest, largest), change

    change = x
    for iteration in range(limit):
        x, change = advance(x)
        if look and bool((change <= aim).all()):
            _record(problem, iteration + 1, x)
            return x

    _record(problem, limit, x)
    if look and x.numel() and features > 1:
        # The bound makes x exact, if the map is what it should be: one more pass tells.
        _, change = advance(x)
        worst = change.max()
        if not worst <= tolerance:
            message = _missed(problem, worst, tolerance, limit)
            if limit == bound and not worst <= torch.finfo(x.dtype).eps ** 0.5:
                raise InversionError(
                    f"{message} {limit} passes are exact for every triangular map: this one is not "
                    "finite, not triangular or not deterministic. Call '.eval()' if it has dropout."
                )
            warnings.warn(message, InversionWarning, stacklevel=2)
    return x


def solve_triangular(
    function: TriangularMap, y: Tensor, solver: Solver, passes: int | None = None
) -> Tensor:
    """Inverts a triangular map by nilpotent iteration, recorded by autograd pass by pass."""
    start = y if solver.method == "banach" else torch.zeros_like(y)
    return _settle(
        lambda x: function.step(y, x), start, function.event_dim, solver, "triangular", passes
    )


def invert_triangular(
    function: TriangularMap,
    y: Tensor,
    phi: Sequence[Tensor],
    solver: Solver,
    passes: int | None = None,
) -> Tensor:
    r"""Inverts a triangular map, with implicit derivatives.

    The gradient solves the transposed triangular system by the same nilpotent iteration, so that
    memory does not depend on the number of passes. It can be differentiated once more. Inside
    ``torch.func`` transforms the passes are recorded instead.

    Args:
        function: The map.
        y: The values to invert, with shape :math:`(*, D)` or another event shape.
        phi: The tensors, besides y, for which gradients are wanted.
        solver: Method, tolerance and number of iterations.
        passes: A bound of the number of passes that is lower than the number of features.

    Returns:
        The root x, with the shape of y.

    Raises:
        InversionError: If the map turns out not to be triangular, or not deterministic.

    Warns:
        InversionWarning: If the tolerance is missed, because ``solver.max_iter`` is small.
    """
    if not readable(y):
        return solve_triangular(function, y, solver, passes)
    wanted = [p for p in phi if p.requires_grad]
    if torch.is_grad_enabled() and (y.requires_grad or wanted):
        return _TriangularInverse.apply(_Problem(function, solver, passes), y, *wanted)
    with torch.no_grad():
        return solve_triangular(function, y, solver, passes)


class _Problem(NamedTuple):
    function: TriangularMap
    solver: Solver
    passes: int | None

    def settle(self, step: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
        # A linear system is solved to round-off, whatever the user's tolerance for samples.
        event_dim = self.function.event_dim
        return _settle(step, start, event_dim, Solver(), "adjoint", self.passes)


class _Gate(Function):
    """The identity, whose backward is blocked while the gate is shut.

    It makes an intermediate result a constant for one derivative, and a variable for the next.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: list[bool]) -> Tensor:
        ctx.gate = gate
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gx: Tensor) -> tuple[Tensor | None, None]:
        return (gx if ctx.gate[0] else None), None


def _split_jacobian(function: TriangularMap, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y as a function of a leaf that feeds the conditioner, that leaf, and the diagonal."""
    with torch.enable_grad():
        leaf, own = x.detach().requires_grad_(), x.detach().requires_grad_()
        y = function.value(own, fixed=leaf)
        (diagonal,) = torch.autograd.grad(y, own, torch.ones_like(y), retain_graph=True)
    return y, leaf, diagonal


def _pull(y: Tensor, leaf: Tensor, v: Tensor, create_graph: bool = False) -> Tensor:
    """Returns the product of the transposed Jacobian with v; zero where nothing depends on leaf."""
    if not y.requires_grad:
        return torch.zeros_like(leaf)
    (product,) = torch.autograd.grad(
        y, leaf, v, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return product


def _solve_adjoint(problem: _Problem, x: Tensor, g: Tensor) -> Tensor:
    """Solves J^T v = g, for the Jacobian J at x."""
    y, leaf, diagonal = _split_jacobian(problem.function, x)
    return problem.settle(lambda v: (g - _pull(y, leaf, v)) / diagonal, g / diagonal)


class _TriangularInverse(Function):
    """x = f^{-1}(y): the gradient v solves J^T v = g, and reaches phi as -v^T df/dphi."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, y: Tensor, *phi: Tensor) -> Tensor:
        x = solve_triangular(problem.function, y, problem.solver, problem.passes)
        ctx.problem = problem
        ctx.autocast = _autocast_state(y)
        ctx.save_for_backward(x, *phi)
        ctx.set_materialize_grads(False)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *phi = ctx.saved_tensors
        if g is None:
            return (None, None, *[None for _ in phi])
        create_graph = torch.is_grad_enabled()
        with torch.autocast(**ctx.autocast):
            if create_graph:
                v = _TriangularAdjoint.apply(ctx.problem, ctx.autocast, g, x, *phi)
            else:
                v = _solve_adjoint(ctx.problem, x, g)
            if not phi:
                return None, v
            # For this derivative x is a constant, lest the gradient of phi run through this very
            # node again; for the derivative of the result it is a variable.
            gate = [False]
            with torch.enable_grad():
                y = ctx.problem.function.value(_Gate.apply(x, gate) if create_graph else x.detach())
            grads: Sequence[Tensor | None] = [None for _ in phi]
            if y.requires_grad:
                grads = torch.autograd.grad(
                    y, phi, -v, create_graph=create_graph, allow_unused=True
                )
            gate[0] = True
        return None, v, *grads


class _TriangularAdjoint(Function):
    """v = J(x)^{-T} g, as a function of g, x and phi; for the second derivative of the inverse."""

    @staticmethod
    def forward(
        ctx: Any, problem: _Problem, autocast: dict[str, Any], g: Tensor, x: Tensor, *phi: Tensor
    ) -> Tensor:
        v = _solve_adjoint(problem, x, g)
        ctx.problem, ctx.autocast = problem, autocast
        ctx.save_for_backward(v, x, *phi)
        return v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, ...]:
        v, x, *phi = ctx.saved_tensors
        v = v.detach()  # an output of this very node, through which phi's gradient must not run
        function = ctx.problem.function
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            # J u = w. The product with J is the derivative, with respect to z, of J^T z.
            y, leaf, diagonal = _split_jacobian(function, x)
            z = torch.zeros_like(v).requires_grad_()
            pulled = _pull(y, leaf, z, create_graph=True)
            u = ctx.problem.settle(lambda u: (w - _pull(pulled, z, u)) / diagonal, w / diagonal)
            # The remaining gradients are those of -<v, J(x) u>, at constant u and v.
            leaf = x.detach().requires_grad_()
            (pulled,) = torch.autograd.grad(function.value(leaf), leaf, v, create_graph=True)
            grads = (
                torch.autograd.grad(pulled, (leaf, *phi), -u, allow_unused=True)
                if pulled.requires_grad
                else (None,) * (1 + len(phi))
            )
        return None, None, u, *grads


def _autocast_state(x: Tensor) -> dict[str, Any]:
    device = x.device.type
    return {
        "device_type": device,
        "dtype": torch.get_autocast_dtype(device),
        "enabled": torch.is_autocast_enabled(device),
    }
