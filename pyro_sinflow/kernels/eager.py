"""A chain of sinusoids, evaluated, differentiated and inverted in closed form.

Value, derivatives and gradients are linear in the waves P and Q. If the numbers of a row share
their parameters, they are computed by small matrix products; if each number has its own, by sums
over the components. No tensor of size N * K is kept after a call: the inputs and slopes of the
sinusoids are saved for the backward pass, which computes the rest again.

The layout is that of :mod:`pyro_sinflow.sinusoid`. Numbers have the shape (*), which ends with the
batch shape of the parameters. The functions take arrays without a graph, and the library for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arrays import PLAIN, Array
from ..sinusoid import Chain, constrain, largest_residual, sinusoids
from ..solvers import Root, Solver, solve_increasing

_PRODUCT = 32  # components up to which matrix products, which sum sequentially, are accurate


def arrange(x: Array, batch: Sequence[int]) -> Array:
    """Brings numbers into the layout."""
    n = prod(batch[-1:] if x.ndim == len(batch) else batch)
    return x.reshape(-1, 1, n).swapaxes(0, 2)


def arrange_all(x: Array, parameters: Array, xp: SimpleNamespace) -> tuple[Array, Array]:
    """Brings numbers and parameters, shared or one set for each number, into the layout."""
    *batch, m, size = parameters.shape
    numbers = xp.contiguous(arrange(x, batch))
    if x.ndim > len(batch) or not batch:
        return numbers, parameters.reshape(prod(batch), m, size, 1).swapaxes(0, 1)
    n = batch[-1]
    rows = xp.contiguous(parameters.reshape(-1, n * m * size).swapaxes(0, 1))
    return numbers, rows.reshape(n, m, size, -1).swapaxes(0, 1)


def restore(x: Array, shape: Sequence[int]) -> Array:
    """Brings numbers back into the shape from which they were arranged."""
    return x.swapaxes(0, 2).reshape(shape)


def differentiable(x: Tensor, parameters: Tensor, min_slope: float) -> tuple[Tensor, Tensor]:
    """Returns value and log-slope, in operations that torch can transform."""
    value, raw = arrange_all(x, parameters, PLAIN)
    ladj = torch.zeros_like(value)
    for sinusoid in sinusoids(constrain(raw, min_slope)):
        value, slope = sinusoid.evaluate(value)
        ladj = ladj + slope.log()
    return restore(value, x.shape), restore(ladj, x.shape)


def forward(
    x: Array, parameters: Array, *, min_slope: float, xp: SimpleNamespace
) -> tuple[Array, Array, Sequence[Array]]:
    """Returns value, log-slope and what to save for the backward pass."""
    value, raw = arrange_all(x, parameters, xp)
    chain = constrain(raw, min_slope, xp)
    inputs, slopes = [], []
    for function in _functions(chain, xp):
        inputs.append(value)
        value, slope = function(value)
        slopes.append(slope)
    slope = xp.stack(slopes)
    ladj = xp.log(slope).sum(0)
    return restore(value, x.shape), restore(ladj, x.shape), (*chain[:6], slope, *inputs[1:])


def backward(
    x: Array,
    parameters: Array,
    gy: Array,
    gl: Array,
    *,
    saved: Sequence[Array],
    min_slope: float,
    xp: SimpleNamespace,
) -> tuple[Array, Array]:
    """Returns the cotangents of numbers and parameters, given those of value and log-slope."""
    shape, batch = x.shape, parameters.shape[:-2]
    x, raw = arrange_all(x, parameters, xp)
    g, gl = arrange(gy, batch), arrange(gl, batch)
    chain, slopes, xs = Chain._make((*saved[:6], None)), saved[6], xp.stack((x, *saved[7:]))
    derivative = (_WithProducts if _shares_parameters(chain) else _WithSums)(xs, chain, xp)
    curvature = derivative.curvature()
    g_slope = gl / slopes
    curvature *= g_slope
    # From the last sinusoid to the first: the cotangent of each one's value.
    values = []
    for i in reversed(range(len(xs))):
        values.append(g)
        g = g * slopes[i] + curvature[i]
    reduced = derivative.reduce(xp.stack(values[::-1]), g_slope)
    grads = _parameter_gradients(reduced, raw, chain, min_slope, xp)
    m, b, size, own = raw.shape
    grad = xp.concatenate(grads if size % 3 == 2 else grads[:4], 2).swapaxes(0, 1)
    if own > 1:
        grad = grad.reshape(b * m * size, own).swapaxes(0, 1)
    return restore(g, shape), grad.reshape(parameters.shape)


def invert(
    y: Array, parameters: Array, *, min_slope: float, solver: Solver, xp: SimpleNamespace
) -> tuple[Array, list[Root]]:
    """Returns the numbers with the values y, and the result of the solver for each sinusoid."""
    rows, raw = arrange_all(y, parameters, xp)
    chain = constrain(raw, min_slope, xp)
    # In plain operations there are no products: they add in place.
    fast: Sequence[Any] = len(raw) * [None] if xp is PLAIN else _functions(chain, xp, True)
    roots: list[Root] = []
    for sinusoid, function in reversed([*zip(sinusoids(chain, xp), fast, strict=True)]):
        roots.append(solve_increasing(sinusoid, rows, solver, function))
        rows = roots[-1].x
    return restore(rows, y.shape), roots


class _Product(NamedTuple):
    """One sinusoid, evaluated by a matrix product."""

    frequency: Array  # (B, K, 1)
    matrix: Array  # from the waves to value, slope and perhaps curvature, (B, R, 2K)
    constant: Array  # (B, R, 1)
    xp: SimpleNamespace

    def evaluate(self, x: Array) -> tuple[Array, ...]:
        rows = self.xp.matmul(self.matrix, self.xp.waves(x, self.frequency))
        rows += self.constant
        value, slope = x + rows[:, :1], rows[:, 1:2]
        return (value, slope) if rows.shape[1] == 2 else (value, slope, rows[:, 2:])


def _shares_parameters(chain: Chain) -> bool:
    return chain.frequency.shape[3] == 1 and chain.frequency.shape[2] <= _PRODUCT


def _functions(
    chain: Chain, xp: SimpleNamespace, curvature: bool = False
) -> list[Callable[[Array], tuple[Array, ...]]]:
    """Returns functions that evaluate the sinusoids of a chain."""
    functions: list[Callable[[Array], tuple[Array, ...]]] = []
    if not _shares_parameters(chain):
        for s in sinusoids(chain, xp):
            functions.append(partial(s.evaluate, curvature=curvature))
        return functions
    a, c, s = chain.frequency, chain.amplitude * chain.cosine, chain.amplitude * chain.sine
    level = 1 + c.sum(2, keepdims=True)
    rows = [c / a, s / a, 2 * s, -2 * c]
    constants = [0 * level if chain.shift is None else chain.shift, level]
    if curvature:
        ac, as_ = a * c, a * s
        rows += [-4 * ac, -4 * as_]
        constants.append(2 * as_.sum(2, keepdims=True))
    m, b, k, _ = a.shape
    matrices = xp.concatenate(rows, 2).reshape(m, b, len(constants), 2 * k)
    constant = xp.concatenate(constants, 2)
    for i in range(m):
        functions.append(_Product(a[i], matrices[i], constant[i], xp).evaluate)
    return functions


class _Reduced(NamedTuple):
    """Cotangents of value and slope times waves, summed over numbers that share their parameters.

    The shape is (M, B, K, P); that of the last three is (M, B, 1, P).
    """

    p: Array  # of the value, times P / a
    q: Array  # of the value, times Q / a
    cosine: Array  # of the slope, times cos(2ax)
    sine: Array  # of the slope, times sin(2ax)
    x_cosine: Array  # of the value, times x cos(2ax)
    x_sine: Array  # of the value, times x sin(2ax)
    curvature: Array  # of the slope, times 2x (sin(2b) cos(2ax) + cos(2b) sin(2ax))
    total: Array  # of the value
    cubic: Array  # of the value, times x (x / peak)^2; x^3 might overflow
    peak: Array  # the largest |x|


def _peak(xs: Array, own: bool, xp: SimpleNamespace) -> Array:
    """Returns the largest magnitude of numbers that share their parameters, and not zero."""
    size = abs(xs) if own else xp.amax(abs(xs), 3, keepdims=True)
    return xp.clip(size, float(xp.finfo(xs.dtype).tiny), None)


class _WithProducts:
    """Intermediate results for derivatives, if numbers share their parameters."""

    def __init__(self, xs: Array, chain: Chain, xp: SimpleNamespace) -> None:
        self.xs, self.chain, self.xp = xs, chain, xp
        self.waves = xp.waves(xs, chain.frequency)

    def curvature(self) -> Array:
        """Returns the curvatures of the sinusoids, with shape (M, B, 1, N)."""
        chain = self.chain
        m, b, k, _ = chain.frequency.shape
        turned = chain.frequency * chain.amplitude
        rows = self.xp.concatenate((turned * chain.cosine, turned * chain.sine), 2)
        curvature = self.xp.matmul(rows.reshape(m, b, 1, 2 * k), self.waves)
        curvature *= -4
        curvature += 2 * rows[:, :, k:].sum(2, keepdims=True)
        return curvature

    def reduce(self, g_value: Array, g_slope: Array) -> _Reduced:
        """Sums cotangents over the numbers of a row."""
        chain, xp, xs = self.chain, self.xp, self.xs
        k = chain.frequency.shape[2]
        rows = xp.concatenate((g_value, g_slope, g_value * xs, g_slope * xs), 2)
        products = xp.matmul(self.waves, rows.swapaxes(2, 3))  # (M, B, 2K, 4)
        total = rows.sum(3)[:, :, None]  # (M, B, 1, 4)
        sine = 2 * products[:, :, :k]
        cosine = total - 2 * products[:, :, k:]
        peak = _peak(xs, False, xp)
        unit = xs / peak
        return _Reduced(
            p=products[:, :, :k, :1] / chain.frequency,
            q=products[:, :, k:, :1] / chain.frequency,
            cosine=cosine[..., 1:2],
            sine=sine[..., 1:2],
            x_cosine=cosine[..., 2:3],
            x_sine=sine[..., 2:3],
            curvature=2 * (chain.sine * cosine[..., 3:] - chain.cosine * sine[..., 3:]),
            total=total[..., :1],
            cubic=(rows[:, :, 2:3] * (unit * unit)).sum(3, keepdims=True),
            peak=peak,
        )


class _WithSums:
    """Intermediate results for derivatives, if each number has its own parameters."""

    def __init__(self, xs: Array, chain: Chain, xp: SimpleNamespace) -> None:
        self.xs, self.chain, self.xp = xs, chain, xp
        k = chain.frequency.shape[2]
        waves = xp.waves(xs, chain.frequency)
        self.p, self.q = waves[:, :, :k], waves[:, :, k:]
        self.cosine = 1 - 2 * self.q
        turned = xp.addcmul(chain.sine * self.cosine, chain.cosine, self.p, value=-2.0)
        self.turned = turned

    def curvature(self) -> Array:
        """Returns the curvatures of the sinusoids, with shape (M, B, 1, N)."""
        a_turned = self.turned * self.chain.amplitude
        a_turned *= self.chain.frequency
        return 2 * a_turned.sum(2, keepdims=True)

    def reduce(self, g_value: Array, g_slope: Array) -> _Reduced:
        """Sums cotangents over the numbers of a row, if they share their parameters."""
        xs, p, q, cosine, xp = self.xs, self.p, self.q, self.cosine, self.xp
        over_a = g_value / self.chain.frequency
        value_x, own = g_value * xs, self.chain.frequency.shape[3] > 1
        peak = _peak(xs, own, xp)
        sums = (
            over_a * p,
            over_a * q,
            g_slope * cosine,
            (2 * g_slope) * p,
            value_x * cosine,
            (2 * value_x) * p,
            (2 * g_slope * xs) * self.turned,
            g_value,
            value_x * (xs / peak) ** 2,
        )
        if own:
            return _Reduced._make((*sums, peak))
        return _Reduced._make((*[t.sum(3, keepdims=True) for t in sums], peak))


def _parameter_gradients(
    reduced: _Reduced, raw: Array, chain: Chain, min_slope: float, xp: SimpleNamespace
) -> tuple[Array, ...]:
    """Returns the cotangents of the unconstrained parameters."""
    a, w, alpha, amplitude, u, v, _ = chain
    eps = float(xp.finfo(a.dtype).eps)
    limit = largest_residual(min_slope, eps)
    # The derivative of P / a by a is (x cos(2ax) - P / a) / a. For small ax, this is a difference
    # of nearly equal numbers, and is replaced by the first term of its series.
    largest = a * reduced.peak
    squares = largest * largest
    series = squares * reduced.cubic * (-4 / 3)
    by_p = xp.where(squares < eps**0.5, series, reduced.x_cosine - reduced.p)
    by_q = reduced.x_sine - reduced.q
    by_a = xp.addcmul(u * by_p, v, by_q)
    by_a /= a
    by_a += reduced.curvature
    by_a *= amplitude
    by_a *= xp.exp(raw[:, :, : a.shape[2]] - a)  # the derivative of the softplus
    # The cotangents of c and s, and of w and alpha.
    by_c, by_s = reduced.p + reduced.cosine, reduced.q + reduced.sine
    by_phase = xp.addcmul(v * by_c, u, by_s, value=-1.0)
    by_phase *= 2 * amplitude
    by_w = xp.addcmul(u * by_c, v, by_s)
    by_w *= w
    by_alpha = by_w.sum(2, keepdims=True)
    by_w -= w * by_alpha
    by_w *= limit * alpha
    return by_a, by_phase, by_w, limit * by_alpha * (1 - alpha * alpha), reduced.total
