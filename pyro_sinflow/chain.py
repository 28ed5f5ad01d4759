"""Value and inverse of chains of sinusoids, with derivatives in closed form for autograd.

Both run over blocks of rows, keep inputs and slopes alone for the backward pass, and can be
differentiated forward as well, twice, and under ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ._checks import forward_levels, has_duals, readable
from .compilation import compiling_kernels, kernel
from .inversion import Root, Solver, attempt, report, solve_bracketed
from .sinusoid import (
    Chain,
    Sinusoid,
    align,
    allocate,
    by_sums,
    evaluate_rows,
    has_own,
    pull,
    push,
    restore,
    sinusoids,
)

_BLOCK = 2**20
_MANY = 2**14


def _by_blocks(
    function: Callable[..., tuple[Tensor, ...]], own: bool, size: int, *args: Tensor | None
) -> tuple[Tensor, ...]:
    """Applies a function to blocks of numbers, or of rows where numbers share their parameters.

    This bounds the memory of the temporaries, of ``size`` elements in all, unless a few sets of
    parameters are shared by very many numbers.
    """
    blocks, dim = -(-size // _BLOCK), -1 if own else -2
    length = next(arg.shape[dim] for arg in args if arg is not None)
    if blocks <= 1 or length <= 1 or torch.compiler.is_compiling():
        return function(*args)
    step = -(-length // blocks)
    split = [() if arg is None else arg.split(step, dim) for arg in args]
    outputs = [function(*part) for part in zip_longest(*split)]
    return tuple(torch.cat(parts, dim) for parts in zip(*outputs, strict=True))


def _unrecorded(*tensors: Tensor) -> bool:
    """Whether autograd, and the transforms of ``torch.func``, need not hear of a function."""
    return not torch.is_grad_enabled() and readable(*tensors)


def _fold(args: Sequence[Tensor], in_dims: Sequence[int | None], n: int) -> list[Tensor]:
    """Turns a batch dimension of ``torch.func.vmap`` into more rows: rows are independent."""
    batched = (
        arg.unsqueeze(-3).expand(*arg.shape[:-2], n, *arg.shape[-2:])
        if dim is None
        else arg.movedim(dim, -3)
        for arg, dim in zip(args, in_dims, strict=True)
    )
    return [arg.flatten(-3, -2) for arg in batched]


def _unfold(x: Tensor, n: int) -> Tensor:
    """Undoes :func:`_fold`, and brings the batch dimension first."""
    return x.unflatten(-2, (n, -1)).movedim(-3, 0)


class _Forward(Function):
    """Value and log-slope of a chain, with gradients in closed form."""

    @staticmethod
    def forward(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        own, size = has_own(x, parameters[0]), len(parameters[0]) * x.numel()
        return _by_blocks(evaluate_rows, own, size, x, *parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output[2:])
        ctx.save_for_forward(*inputs)
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, gl: Tensor | None, *_: Any) -> tuple[Any, ...]:
        x, a, c, s, d, slope, inputs = ctx.saved_tensors
        if torch.is_grad_enabled() or has_duals():  # the derivative is itself differentiated
            slope, inputs = evaluate_rows(x, a, c, s, d)[2:]
        size = len(a) * len(d) * x.numel()
        return _by_blocks(pull, has_own(x, a), size, gy, gl, x, a, c, s, d, slope, inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        _, _, dy, dladj = push(x, Chain(*parameters), tangents)
        return dy, dladj, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Tensor) -> Any:
        output = _Forward.apply(*_fold(args, in_dims, info.batch_size))
        return tuple(_unfold(o, info.batch_size) for o in output), (0,) * len(output)


def _pick(parameters: Sequence[Tensor], where: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns the parameters of some numbers, given their indices, as those of a single row."""
    rows, columns = where
    if parameters[0].shape[-1] == 1:  # the numbers of a row share them
        columns = torch.zeros_like(columns)
    return tuple(p[..., rows, columns].unsqueeze(-2) for p in parameters)


class _Equation:
    """A sinusoid to be inverted, with shape (B, N)."""

    def __init__(self, sinusoid: Sinusoid, amplitude: Tensor, space: Tensor | None) -> None:
        self.sinusoid = sinusoid
        self.amplitude = amplitude  # of each component of the slope, (K, B, P)
        self.space = space

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Bounds of the magnitudes of second and third derivative, with shape (B, P)."""
        second = 2 * self.sinusoid.a * self.amplitude
        third = 2 * self.sinusoid.a * second
        return second.sum(dim=0), third.sum(dim=0)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns value, slope and second derivative."""
        value, slope, bend = self.sinusoid(x, self.space, bend=True)
        return value, slope, bend

    def take(self, where: tuple[Tensor, ...]) -> _Equation:
        """Returns the equations of some elements, as a single row."""
        parameters = (*self.sinusoid[:4], self.amplitude)
        a, c, s, d, amplitude = _pick(parameters, where)
        return _Equation(Sinusoid(a, c, s, d), amplitude, allocate(d, a))

    def bracket(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns bounds of the root, from the bounds of slope and residual term."""
        info = torch.finfo(y.dtype)
        size = self.amplitude.sum(dim=0)  # |alpha|
        reach = (self.amplitude / self.sinusoid.a).sum(dim=0)
        # f(0) = d and f' is in [1 - |alpha|, 1 + |alpha|]: x is between z / (1 + |alpha|) and this.
        z = y - self.sinusoid.d
        far = z / (1 - size).clamp_min(info.tiny)
        near = z / (1 + size)
        reach = reach + 8 * info.eps * (reach + z.abs())

        return (
            torch.maximum(torch.minimum(near, far), z - reach),
            torch.minimum(torch.maximum(near, far), z + reach),
        )


def _equations(y: Tensor, chain: Chain) -> Iterator[_Equation]:
    """Yields the sinusoids of a chain, the last first."""
    amplitude = torch.hypot(chain.c, chain.s) * (1 + 4 * torch.finfo(y.dtype).eps)
    space = allocate(y, chain.a)
    for m, sinusoid in reversed([*enumerate(sinusoids(chain, by_sums(y, chain.a), bend=True))]):
        yield _Equation(sinusoid, amplitude[:, m], space)


@kernel
def _attempt(y: Tensor, chain: Chain, solver: Solver, steps: int) -> tuple[list[Tensor], Tensor]:
    """Takes the same number of steps for each number and sinusoid.

    Returns:
        The likely roots, the last sinusoid's first, and which numbers have arrived at all of them.
    """
    roots, arrived = [y], torch.ones_like(y, dtype=torch.bool)
    for equation in _equations(y, chain):
        y = roots[-1]
        x, there = attempt(equation, y, y - equation.sinusoid.d, solver, steps)
        roots.append(x)
        arrived = arrived & there
    return roots[1:], arrived


def _solve_by_kernel(solver: Solver, y: Tensor, chain: Chain) -> list[Root]:
    """Inverts the sinusoids of a chain by a compiled kernel, and stragglers apart."""
    own = has_own(y, chain.a)
    # Where parameters are shared, two hardly ever leave a straggler. Where they are not, to finish
    # one takes longer than a few steps more of all, and among many numbers there is always one.
    steps = 2 if not own else 4 if y.numel() < _MANY else 6
    likely, arrived = _attempt(y, chain, solver, steps)
    rest = (~arrived).nonzero(as_tuple=True)
    if len(rest[0]) == 0:
        return [Root(x, steps, y.new_zeros(())) for x in likely]
    part = Chain(*_pick(chain, rest))
    return [
        Root(x.index_put(rest, root.x.squeeze(0)), steps + root.iterations, root.error)
        for x, root in zip(likely, _solve_each(solver, y[rest].unsqueeze(0), part), strict=True)
    ]


def _solve_each(solver: Solver, y: Tensor, chain: Chain) -> list[Root]:
    """Inverts the sinusoids of a chain one after the other."""
    roots = [Root(y, 0, y)]
    for equation in _equations(y, chain):
        y = roots[-1].x
        roots.append(solve_bracketed(equation, y, y - equation.sinusoid.d, solver))
    return roots[1:]


def _solve(solver: Solver, y: Tensor, chain: Chain) -> list[Root]:
    """Inverts the sinusoids of a chain, the last first, and returns their roots."""
    fast = compiling_kernels() and solver == Solver() and readable(y, *chain)
    return (_solve_by_kernel if fast else _solve_each)(solver, y, chain)


class _Inverse(Function):
    """The root x of f(x) = y, differentiated by the implicit function theorem."""

    @staticmethod
    def forward(solver: Solver, y: Tensor, *parameters: Tensor) -> Tensor:
        roots: list[Root] = []

        def solve(y: Tensor, *parameters: Tensor) -> tuple[Tensor]:
            roots.extend(_solve(solver, y, Chain(*parameters)))
            return (roots[-1].x,)

        own, size = has_own(y, parameters[0]), len(parameters[0]) * y.numel()
        (x,) = _by_blocks(solve, own, size, y, *parameters)
        report(roots, solver)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs[2:])
        ctx.save_for_forward(output, *inputs[2:])

    @staticmethod
    def backward(ctx: Any, gx: Tensor) -> tuple[Tensor | None, ...]:
        def pull_back(
            gx: Tensor, x: Tensor, a: Tensor, c: Tensor, s: Tensor, d: Tensor
        ) -> tuple[Tensor, ...]:
            _, ladj, slope, inputs = evaluate_rows(x, a, c, s, d)
            gy = gx * (-ladj).exp()
            _, *grads = pull(-gy, None, x, a, c, s, d, slope, inputs)
            return gy, *grads

        x, a, *others = ctx.saved_tensors
        size = a.shape[0] * a.shape[1] * x.numel()
        return None, *_by_blocks(pull_back, has_own(x, a), size, gx, x, a, *others)

    @staticmethod
    def jvp(ctx: Any, _: None, dy: Tensor | None, *tangents: Tensor | None) -> Tensor:
        x, *parameters = ctx.saved_tensors
        ladj, moved = push(x, Chain(*parameters), (None, *tangents))[1:3]
        return ((0 if dy is None else dy) - moved) * (-ladj).exp()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], solver: Solver, *args: Tensor) -> Any:
        x = _Inverse.apply(solver, *_fold(args, in_dims[1:], info.batch_size))
        return _unfold(x, info.batch_size), 0


def evaluate(x: Tensor, chain: Chain) -> tuple[Tensor, Tensor]:
    """Returns value and log-slope of a chain of sinusoids.

    Args:
        x: The numbers, with shape :math:`(*)`.
        chain: The parameters, with batch shape :math:`(*)`; they broadcast.
    """
    x, chain, shape = align(x, chain)
    # The compiler knows no jvp, and fuses what autograd records; and torch takes no jvp of a jvp.
    if torch.compiler.is_compiling() or forward_levels() > 1:
        function = evaluate_rows
    else:
        function = _Forward.forward if _unrecorded(x, *chain) else _Forward.apply
    y, ladj, *_ = function(x, *chain)
    return restore(y, shape), restore(ladj, shape)


def invert(y: Tensor, chain: Chain, solver: Solver) -> Tensor:
    """Returns the root x at which a chain of sinusoids is y.

    Args:
        y: The numbers, with shape :math:`(*)`.
        chain: The parameters, with batch shape :math:`(*)`; they broadcast.
        solver: Method, tolerance and number of iterations.
    """
    y, chain, shape = align(y, chain)
    nested = forward_levels() > 1
    if not torch.compiler.is_compiling() and not nested:
        function = _Inverse.forward if _unrecorded(y, *chain) else _Inverse.apply
        return restore(function(solver, y, *chain), shape)
    roots = _solve(solver, y.detach(), Chain(*(p.detach() for p in chain)))
    x = roots[-1].x
    # A step of Newton's method, whose derivative is that of the root. After two, so are the second
    # and the third.
    for _ in range(2 if nested else torch.is_grad_enabled()):
        value, ladj, *_ = evaluate_rows(x, *chain)
        step = (-ladj).exp()
        x = x - (value - y) * (step if nested else step.detach())
    return restore(x, shape)
