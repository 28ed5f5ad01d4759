"""Chains of sinusoids on a GPU: value, gradients and inverse, each in one launch of a kernel.

Functions and formulas are those of :mod:`pyro_sinflow.kernels.eager`. A program holds a block of
numbers as a column, and the components of one sinusoid as rows: one row for all numbers if they
share their parameters, otherwise one row for each number. Parameters are unconstrained, and so are
their cotangents: the constraint is computed and differentiated in registers.

Each program writes to its own memory, and sums have a fixed order, so results are deterministic.
The import of this module fails if Triton is not installed, or too old.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._torch import can_branch_on
from ..sinusoid import largest_residual
from ..solvers import Root, Solver

if [*map(int, triton.__version__.split(".")[:2])] < [3, 2]:
    raise ImportError("The compilers of Triton 3.0 and 3.1 crash on these kernels.")

_TILE = 512  # numbers times components in a program

# Below, Python numbers are combined with tensors only by operators, where they take the dtype of
# the tensor. Functions such as tl.where would round them to float32.


@triton.jit
def _expm1(x):
    """Returns exp(x) - 1, by a ratio in which the error of exp(x) cancels (Kahan)."""
    e = tl.exp(x)
    return tl.where(e == 1, x, (e - 1) * x / tl.log(e))


@triton.jit
def _softplus(x):
    e = tl.exp(-tl.abs(x))
    more = e + 1
    # log(1 + e), by a ratio in which the error of 1 + e cancels.
    return tl.maximum(x, 0.0) + tl.where(more == 1, e, tl.log(more) * e / (more - 1))


@triton.jit
def _tanh(x):
    y = -2 * tl.abs(x)
    e = tl.exp(y)
    size = tl.where(e < 0.5, 1 - e, -_expm1(y)) / (1 + e)
    return tl.where(x < 0, -size, size)


@triton.jit
def _indices(rows, period, own: tl.constexpr, block: tl.constexpr):
    """Returns the indices and masks of a program's numbers and parameters.

    Numbers are a matrix with ``rows`` rows of ``period`` numbers, one for each set of parameters.
    If each number has its own parameters, the matrix is a single column.
    """
    program = tl.program_id(0).to(tl.int64)  # offsets may exceed 32 bits
    row = program // period * block + tl.arange(0, block)[:, None]
    column = program % period + tl.arange(0, 1)[:, None]
    ok = row < rows
    if own:
        return row, ok, row, ok
    else:  # noqa: RET505 - Triton compiles what follows a return
        return row * period + column, ok, column, column >= 0


@triton.jit
def _constrain(
    parameters, ok,
    count: tl.constexpr, width: tl.constexpr, limit: tl.constexpr, smallest: tl.constexpr,
    has_shift: tl.constexpr,
):  # fmt: skip
    """Returns the sigmoid of the frequencies, and the fields of ``sinusoid.Chain``.

    ``parameters`` is a column of pointers to the first parameter of a sinusoid.
    """
    k = tl.arange(0, width)[None, :]
    inside = ok & (k < count)
    raw = tl.load(parameters + k, inside, other=0.0)
    angle = 2 * tl.load(parameters + count + k, inside, other=0.0)
    # Padding components have weight zero.
    weight = tl.load(parameters + 2 * count + k, inside, other=float("-inf"))
    weight = tl.where(ok, weight, 0.0)
    a = _softplus(raw)
    a = tl.where(a < smallest, tl.full(a.shape, smallest, a.dtype), a)  # tl.maximum would drop NaN
    w = tl.exp(weight - tl.max(weight, axis=1, keep_dims=True))
    w = w / tl.sum(w, axis=1, keep_dims=True)
    residual = _tanh(tl.load(parameters + 3 * count, ok, other=0.0))
    shift = tl.zeros_like(residual)
    if has_shift:
        shift = tl.load(parameters + 3 * count + 1, ok, other=0.0)
    sigmoid = 1 / (1 + tl.exp(-raw))
    return sigmoid, a, w, residual, limit * residual * w, -tl.cos(angle), tl.sin(angle), shift


@triton.jit
def _waves(x, a):
    """Returns P and Q."""
    t = a * x
    sine = tl.sin(t)
    return sine * tl.cos(t), sine * sine


@triton.jit
def _value_and_slope(x, p, q, over_a, c, s, shift):
    value = x + tl.sum(c * over_a * p + s * over_a * q, axis=1, keep_dims=True) + shift
    return value, 1 + tl.sum(c * (1 - 2 * q) + 2 * s * p, axis=1, keep_dims=True)


@triton.jit(do_not_specialize=["rows", "period"])
def _forward(
    x_in, parameters, y_out, ladj_out, inputs_out, rows, period,
    m: tl.constexpr, count: tl.constexpr, width: tl.constexpr, limit: tl.constexpr,
    smallest: tl.constexpr, has_shift: tl.constexpr, own: tl.constexpr, save: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Computes value and log-slope, and the inputs of all sinusoids except the first."""
    size: tl.constexpr = 3 * count + 1 + has_shift
    i, ok, row, row_ok = _indices(rows, period, own, block)
    x = tl.load(x_in + i, ok, other=0.0)
    ladj = tl.zeros_like(x)
    for j in range(m):
        if save:
            tl.store(inputs_out + i * (m - 1) + (j - 1), x, ok & (j > 0))
        _, a, _, _, amplitude, u, v, shift = _constrain(
            parameters + row * (m * size) + j * size,
            row_ok, count, width, limit, smallest, has_shift,
        )  # fmt: skip
        p, q = _waves(x, a)
        x, slope = _value_and_slope(x, p, q, 1 / a, amplitude * u, amplitude * v, shift)
        ladj += tl.log(slope)
    tl.store(y_out + i, x, ok)
    tl.store(ladj_out + i, ladj, ok)


@triton.jit
def _total(t, own: tl.constexpr):
    """Sums over the numbers that share their parameters."""
    if own:
        return t
    else:  # noqa: RET505
        return tl.sum(t, axis=0, keep_dims=True)


@triton.jit(do_not_specialize=["rows", "period"])
def _backward(
    x_in, parameters, inputs_in, gy_in, gl_in, gx_out, gp_out, rows, period,
    m: tl.constexpr, count: tl.constexpr, width: tl.constexpr, limit: tl.constexpr,
    smallest: tl.constexpr, small: tl.constexpr, has_shift: tl.constexpr, own: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Computes cotangents of numbers and parameters, the latter summed within a program."""
    size: tl.constexpr = 3 * count + 1 + has_shift
    i, ok, row, row_ok = _indices(rows, period, own, block)
    out = row
    if not own:
        out = tl.program_id(0) + tl.zeros_like(row)
    first = tl.load(x_in + i, ok, other=0.0)
    g = tl.load(gy_in + i, ok, other=0.0)  # 0 outside of the block, which adds nothing to sums
    gl = tl.load(gl_in + i, ok, other=0.0)
    k = tl.arange(0, width)[None, :]
    inside = row_ok & (k < count)
    for step in range(m):
        j = m - 1 - step
        sigmoid, a, w, residual, amplitude, u, v, _ = _constrain(
            parameters + row * (m * size) + j * size,
            row_ok, count, width, limit, smallest, has_shift,
        )  # fmt: skip
        x = tl.load(inputs_in + i * (m - 1) + (j - 1), ok & (j > 0), other=0.0)
        x = tl.where(j > 0, x, first)
        p, q = _waves(x, a)
        cosine = 1 - 2 * q
        slope = 1 + tl.sum(amplitude * (u * cosine + 2 * v * p), axis=1, keep_dims=True)
        h = gl / slope  # the cotangent of the slope
        over_a = 1 / a
        by_c = _total(g * over_a * p + h * cosine, own)
        by_s = _total(g * over_a * q + 2 * h * p, own)
        # The derivative of P / a by a; for small ax the first term of its series, as in eager.py.
        t = a * x
        by_p = tl.where(t * t < small, t * t * x * (-4 / 3), x * cosine - p * over_a)
        by_q = 2 * x * p - q * over_a
        turned = v * cosine - 2 * u * p
        by_a = _total(g * over_a * (u * by_p + v * by_q) + 2 * h * x * turned, own)
        by_weight = w * (u * by_c + v * by_s)
        by_residual = tl.sum(by_weight, axis=1, keep_dims=True)
        by_weight = limit * residual * (by_weight - w * by_residual)
        at = gp_out + out * (m * size) + j * size
        tl.store(at + k, amplitude * sigmoid * by_a, inside)
        tl.store(at + count + k, 2 * amplitude * (v * by_c - u * by_s), inside)
        tl.store(at + 2 * count + k, by_weight, inside)
        tl.store(at + 3 * count, limit * by_residual * (1 - residual * residual), row_ok)
        if has_shift:
            tl.store(at + 3 * count + 1, _total(g, own), row_ok)
        g = g * slope + 2 * h * tl.sum(amplitude * a * turned, axis=1, keep_dims=True)
    tl.store(gx_out + i, g, ok)


@triton.jit
def _bracket(z, a, amplitude, eps: tl.constexpr):
    """Returns a lower and an upper bound of the root, as ``sinusoid.Sinusoid.bracket`` does."""
    magnitude = tl.abs(amplitude) * (1 + 8 * eps)
    alpha = tl.sum(magnitude, axis=1, keep_dims=True)
    distance = tl.sum(magnitude / a, axis=1, keep_dims=True)
    distance += 8 * eps * (distance + tl.abs(z))
    far = z / tl.maximum(1 - alpha, 1e-37) * (1 + 8 * eps)  # division may round by two units
    near = z / (1 + alpha) * (1 - 8 * eps)
    lower = tl.maximum(tl.minimum(near, far), z - distance)
    return lower, tl.minimum(tl.maximum(near, far), z + distance)


@triton.jit
def _step(x, error, slope, curvature, lower, upper, previous):
    """Returns a step of Halley's method, or bisection if it leaves the bracket or is too slow."""
    newton = -error / slope
    turn = newton * curvature / slope * 0.5
    turn = tl.minimum(tl.maximum(turn, -0.5), 0.5)
    new = x + newton / (1 + turn)
    bisect = (new < lower) | (new > upper) | (tl.abs(error) > previous * 0.5)
    return tl.where(bisect, lower + (upper - lower) * 0.5, new)


@triton.jit
def _solve(
    y, ok, a, amplitude, u, v, shift,
    eps: tl.constexpr, aim: tl.constexpr, max_iter: tl.constexpr, banach: tl.constexpr,
):  # fmt: skip
    """Returns the root of one sinusoid, its relative error and the iterations that it took."""
    c, s, over_a, x = amplitude * u, amplitude * v, 1 / a, y - shift
    lower, upper = _bracket(x, a, amplitude, eps)
    previous = tl.full(x.shape, float("inf"), x.dtype)
    error = tl.zeros_like(x)
    iterations = 0
    left = 1
    while left > 0:
        p, q = _waves(x, a)
        value, slope = _value_and_slope(x, p, q, over_a, c, s, shift)
        error = value - y
        done = tl.abs(error) <= aim * (1 + tl.abs(x) + tl.abs(y))
        done = done | (error != error) | ~ok  # values that are not finite have no root
        if banach:
            new = x - error
        else:
            done = done | (upper - lower <= 2 * eps * tl.abs(x))  # adjacent numbers
            lower = tl.where(error < 0, x, lower)
            upper = tl.where(error > 0, x, upper)
            turned = a * (s * (1 - 2 * q) - 2 * c * p)
            curvature = 2 * tl.sum(turned, axis=1, keep_dims=True)
            new = _step(x, error, slope, curvature, lower, upper, previous)
            previous = tl.abs(error)
        left = tl.sum(tl.sum((~done).to(tl.int32), axis=1), axis=0)
        left = tl.where(iterations < max_iter, left, 0)
        x = tl.where(done | (left == 0), x, new)
        iterations += tl.minimum(left, 1)
    relative = tl.abs(error) / (1 + tl.abs(x) + tl.abs(y))
    relative = tl.where(relative == relative, relative, float("inf"))
    x = tl.where(error == error, x, error)
    return x, tl.where(y - y == 0, relative, 0.0), iterations  # of values that are finite


@triton.jit(do_not_specialize=["rows", "period"])
def _invert(
    y_in, parameters, x_out, report_out, rows, period,
    m: tl.constexpr, count: tl.constexpr, width: tl.constexpr, limit: tl.constexpr,
    smallest: tl.constexpr, has_shift: tl.constexpr, own: tl.constexpr, eps: tl.constexpr,
    aim: tl.constexpr, max_iter: tl.constexpr, banach: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Computes the root and, for each program, the largest error and number of iterations."""
    size: tl.constexpr = 3 * count + 1 + has_shift
    i, ok, row, row_ok = _indices(rows, period, own, block)
    x = tl.load(y_in + i, ok, other=0.0)
    worst = tl.zeros_like(x)
    most = tl.zeros(x.shape, tl.int32)
    for step in range(m):
        _, a, _, _, amplitude, u, v, shift = _constrain(
            parameters + row * (m * size) + (m - 1 - step) * size,
            row_ok, count, width, limit, smallest, has_shift,
        )  # fmt: skip
        x, error, iterations = _solve(x, ok, a, amplitude, u, v, shift, eps, aim, max_iter, banach)
        worst = tl.maximum(worst, tl.where(ok, error, 0.0))
        most = tl.maximum(most, iterations)
    tl.store(x_out + i, x, ok)
    at = report_out + 2 * tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    tl.store(at, tl.max(worst, axis=0))
    tl.store(at + 1, tl.max(most, axis=0).to(x.dtype))


def chain_constants(m: int, count: int, min_slope: float, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the constants of a chain of m sinusoids that are compiled into kernels."""
    info = torch.finfo(dtype)
    return {
        "m": m,
        "count": count,
        "width": triton.next_power_of_2(count),
        "limit": largest_residual(min_slope, info.eps),
        "smallest": info.tiny**0.5,
    }


def solver_constants(solver: Solver, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the constants of a solver that are compiled into kernels."""
    eps, banach = torch.finfo(dtype).eps, solver.method == "banach"
    return {
        "eps": eps,
        "aim": solver.tolerances(eps)[0],
        "max_iter": solver.max_iter or (100 if banach else 200),
        "banach": banach,
    }


def _plan(x: Tensor, parameters: Tensor, min_slope: float) -> tuple[int, dict[str, Any]]:
    """Returns the number of programs, and the arguments that all kernels share.

    Blocks have one of two sizes, so that few variants of a kernel are compiled.
    """
    *batch, m, size = parameters.shape
    count, rest = divmod(size, 3)
    own = x.ndim == len(batch)
    period = 1 if own else prod(batch)
    rows = x.numel() // period
    width = triton.next_power_of_2(count)
    block = max(1, _TILE // width)
    if 8 * rows <= block:
        block //= 8
    constants = {
        **chain_constants(m, count, min_slope, x.dtype),
        "rows": rows,
        "period": period,
        "has_shift": int(rest == 2),
        "own": own,
        "block": block,
        "num_warps": max(1, min(8, block * width // 128)),
    }
    return period * triton.cdiv(rows, block), constants


def forward(
    x: Tensor, parameters: Tensor, *, min_slope: float, save: bool
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Returns value, log-slope and what to save for the backward pass."""
    x, parameters = x.contiguous(), parameters.contiguous()
    programs, constants = _plan(x, parameters, min_slope)
    y, ladj = torch.empty_like(x), torch.empty_like(x)
    inputs = x.new_empty(x.numel() if save else 0, parameters.shape[-2] - 1)
    with torch.cuda.device_of(x):
        _forward[(programs,)](x, parameters, y, ladj, inputs, save=save, **constants)
    return y, ladj, (inputs,)


def backward(
    x: Tensor,
    parameters: Tensor,
    gy: Tensor,
    gl: Tensor,
    *,
    saved: Sequence[Tensor],
    min_slope: float,
) -> tuple[Tensor, Tensor]:
    """Returns the cotangents of numbers and parameters, given those of value and log-slope."""
    x, parameters = x.contiguous(), parameters.contiguous()
    programs, constants = _plan(x, parameters, min_slope)
    gx = torch.empty_like(x)
    # Each program writes its own sums. A second sum over them is deterministic.
    blocks = 1 if constants["own"] else programs // constants["period"]
    gp = parameters.new_empty(blocks, *parameters.shape)
    with torch.cuda.device_of(x):
        _backward[(programs,)](
            x, parameters, saved[0], gy.contiguous(), gl.contiguous(), gx, gp,
            small=torch.finfo(x.dtype).eps ** 0.5, **constants,
        )  # fmt: skip
    return gx, gp[0] if blocks == 1 else gp.sum(0)


def invert(
    y: Tensor, parameters: Tensor, *, min_slope: float, solver: Solver
) -> tuple[Tensor, list[Root]]:
    """Returns the numbers with the values y, and the result of the solver for each sinusoid.

    The host waits once to read the number of iterations and the error, so that a failure is
    reported. During the capture of a CUDA graph, it cannot wait, and there are no results.
    """
    y, parameters = y.contiguous(), parameters.contiguous()
    programs, constants = _plan(y, parameters, min_slope)
    x, found = torch.empty_like(y), y.new_empty(programs, 2)
    with torch.cuda.device_of(y):
        _invert[(programs,)](
            y, parameters, x, found, **solver_constants(solver, y.dtype), **constants
        )
    if not can_branch_on(y):
        return x, []
    worst, iterations = found.amax(0).tolist()
    return x, parameters.shape[-2] * [Root(x, int(iterations), worst)]


def probe(device: torch.device) -> None:
    """Launches a kernel on a device, which raises an error if it does not run there."""
    x = torch.zeros(1, device=device)
    forward(x, x.new_zeros(1, 4), min_slope=0.5, save=False)
