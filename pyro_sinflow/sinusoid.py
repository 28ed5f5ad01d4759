r"""Chains of monotone sinusoids and their derivatives, as functions of tensors.

A sinusoid (Eq. 13 and 15 of the paper) is the integral of a Fourier series that stays positive:

.. math::
    f'(x) & = 1 + \sum_k c_k \cos(2 a_k x) + s_k \sin(2 a_k x) \\
    f(x) & = x + d + \sum_k c_k \frac{P_k}{a_k} + s_k \frac{Q_k}{a_k}

with :math:`c_k = -\alpha w_k \cos(2 b_k)`, :math:`s_k = \alpha w_k \sin(2 b_k)`,
:math:`P_k = \sin(a_k x) \cos(a_k x)` and :math:`Q_k = \sin^2(a_k x)`. The constant of Eq. 13 is
folded into :math:`d`, so that :math:`f(0) = d`. Unlike a difference of sines, :math:`P / a` and
:math:`Q / a` lose no digits when :math:`a` is small.

Value, slope and their derivatives are linear in :math:`P` and :math:`Q`. Hence a sinusoid costs one
sine and one cosine per component, and one small matrix product; so does its gradient. Nothing of
size :math:`N \times D \times K` outlives the call: the backward pass keeps inputs and slopes, and
computes the rest again.

All functions work in one layout, which :func:`_align` makes: rows of numbers, one row for each of
the ``B`` sets of parameters. ``x`` has shape :math:`(B, N)`, ``a``, ``c`` and ``s`` have shape
:math:`(B, M, K)`, for the M sinusoids of a chain, and ``d`` has shape :math:`(B, M)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Size, Tensor
from torch.autograd import Function

from ._checks import autocasting, broadcast
from .inversion import Root, Solver, report, solve_bracketed

_BLOCK = 2**20


class Chain(NamedTuple):
    """The parameters of a chain of M sinusoids."""

    a: Tensor  # angular frequency > 0, (*, M, K)
    c: Tensor  # amplitude of the slope's cosine, (*, M, K)
    s: Tensor  # amplitude of the slope's sine, (*, M, K)
    d: Tensor  # shift, (*, M)

    @property
    def batch_shape(self) -> Size:
        """The common shape of the parameters, without the M sinusoids and K components."""
        return broadcast(*(p.shape[:-2] for p in self[:3]), self.d.shape[:-1])


def constrain(
    frequency: Tensor,
    phase: Tensor,
    weight: Tensor,
    residual: Tensor,
    shift: Tensor,
    *,
    slope: float,
) -> Chain:
    """Maps unconstrained tensors to a chain of sinusoids whose slopes exceed ``slope``."""
    dtype = torch.promote_types(frequency.dtype, torch.float32)
    # At a = 0 the sinusoid has a limit, x + d + c x, and a frequency this small reaches it to the
    # last digit, while P / a stays clear of 0 / 0 and of denormal numbers.
    smallest = math.sqrt(torch.finfo(dtype).tiny)
    angle = 2 * phase.to(dtype)
    alpha = (1 - slope) * residual.to(dtype).tanh()
    amplitude = alpha.unsqueeze(-1) * weight.to(dtype).softmax(dim=-1)

    return Chain(
        a=F.softplus(frequency.to(dtype)).clamp_min(smallest),
        c=-amplitude * angle.cos(),
        s=amplitude * angle.sin(),
        d=shift.to(dtype),
    )


def _align(x: Tensor, chain: Chain) -> tuple[Tensor, Chain, Size]:
    """Brings x and a chain into the layout of this module.

    Returns:
        The numbers as rows, the chain, and the shape to :func:`_restore`. Where a batch shares its
        parameters, these are neither copied nor expanded.
    """
    batch = chain.batch_shape
    shape = broadcast(x.shape, batch)
    varying = [*batch]
    while varying and varying[0] == 1:
        varying.pop(0)
    if varying != [*shape[len(shape) - len(varying) :]]:
        varying, batch = [*shape], shape  # the parameters vary with the batch: each x has its own
    rows = math.prod(varying)
    shared = math.prod(shape[: len(shape) - len(varying)])

    def flat(q: Tensor, event: int) -> Tensor:
        kept = q.shape[q.ndim - event :]
        return q if q.shape == (rows, *kept) else q.expand(*batch, *kept).reshape(rows, *kept)

    x = x.expand(shape).reshape(shared, rows).t().contiguous()
    return x, Chain(flat(chain.a, 2), flat(chain.c, 2), flat(chain.s, 2), flat(chain.d, 1)), shape


def _restore(x: Tensor, shape: Size) -> Tensor:
    """Brings rows back into the shape from which :func:`_align` made them."""
    return x.t().reshape(shape)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """A batched matrix product that autocast leaves in full precision."""
    if autocasting(a):
        with torch.autocast(a.device.type, enabled=False):
            return torch.bmm(a, b)
    return torch.bmm(a, b)


def _features(x: Tensor, a: Tensor, extra: Tensor, space: Tensor | None = None) -> Tensor:
    """Returns P, Q and extra features, stacked.

    Components come first in memory, so that all operations run over contiguous numbers.

    Args:
        x: The numbers, with shape (B, N).
        a: The frequencies, with shape (K, B, 1).
        extra: Other features, with shape (E, B, N).
        space: Memory of shape (2K + E, B, N) that is overwritten, or :py:`None`.

    Returns:
        The features, with shape (B, 2K + E, N).
    """
    if space is None:
        t = a * x
        sine, cosine = t.sin(), t.cos()
        return torch.cat((sine * cosine, sine * sine, extra)).transpose(0, 1)
    # P = tan / (1 + tan^2) and Q = P tan: eagerly, one tangent takes less time than a sine and a
    # cosine. It loses no digits either, as its poles are no floating-point numbers.
    p, q, more = space.split((len(a), len(a), len(extra)))
    torch.mul(a, x, out=q)
    q.tan_()
    torch.mul(q, q, out=p).add_(1)
    torch.div(q, p, out=p)
    q.mul_(p)
    more.copy_(extra)
    return space.transpose(0, 1)


def _space(x: Tensor, components: int, extra: int = 1) -> Tensor | None:
    """Allocates what features of x need, unless autograd or the compiler is looking.

    To reuse memory matters: to allocate it takes longer than to fill it.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return x.new_empty(2 * components + extra, *x.shape)


class Sinusoid(NamedTuple):
    """One sinusoid: its value and its derivatives are linear in its features P, Q and 1."""

    a: Tensor  # (K, B, 1)
    linear: Tensor  # the coefficients of value, slope, ..., (B, R, 2K + 1)

    def from_features(self, x: Tensor, features: Tensor) -> tuple[Tensor, ...]:
        """Returns value, slope, ..., given the features at x."""
        value, *derivatives = _bmm(self.linear, features).split(1, dim=1)
        return x + value, *derivatives


def _leading(a: Tensor) -> Tensor:
    """Brings the components of frequencies (B, M, K) first, and returns (K, M, B, 1)."""
    return a.permute(2, 1, 0).unsqueeze(-1)


def _bend(a: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """Returns the coefficients of the second derivative."""
    ac, as_ = -4 * a * c, 2 * a * s
    return torch.cat((ac, -2 * as_, as_.sum(dim=-1, keepdim=True)), dim=-1)


def _sinusoids(chain: Chain, bend: bool = False) -> list[Sinusoid]:
    a, c, s, d = chain
    value = torch.cat((c / a, s / a, d.unsqueeze(-1)), dim=-1)
    slope = torch.cat((s + s, -2 * c, 1 + c.sum(dim=-1, keepdim=True)), dim=-1)
    rows = (value, slope, _bend(a, c, s)) if bend else (value, slope)

    return [*map(Sinusoid, _leading(a).unbind(1), torch.stack(rows, dim=-2).unbind(1))]


def _evaluate(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """Evaluates a chain.

    Returns:
        The value and the log-slope of the chain, with shape (B, N); then the slopes of the M
        sinusoids, with shape (B, M, N), and the inputs of all but the first, (B, M - 1, N).
    """
    values, slopes = [x.unsqueeze(1)], []
    one, space = torch.ones_like(x).unsqueeze(0), _space(x, parameters[0].shape[-1])
    for sinusoid in _sinusoids(Chain(*parameters)):
        features = _features(values[-1].squeeze(1), sinusoid.a, one, space)
        value, slope = sinusoid.from_features(values[-1], features)
        values.append(value)
        slopes.append(slope)
    slope = torch.cat(slopes, dim=1)
    inputs = torch.cat(values[1:-1], dim=1) if len(slopes) > 1 else slope[:, :0].clone()

    return values[-1].squeeze(1), slope.log().sum(dim=1), slope, inputs


def _pull(
    gy: Tensor | None,
    gl: Tensor | None,
    x: Tensor,
    a: Tensor,
    c: Tensor,
    s: Tensor,
    d: Tensor,
    slope: Tensor,
    inputs: Tensor,
) -> tuple[Tensor, ...]:
    """Pulls cotangents of value and log-slope back to input and parameters.

    Args:
        gy: The cotangent of the value, with shape (B, N), or :py:`None` for zero.
        gl: The cotangent of the log-slope.
        x: The input, with shape (B, N).
        a: The frequencies.
        c: The cosine amplitudes.
        s: The sine amplitudes.
        d: The shifts.
        slope: The slopes that :func:`_evaluate` returns.
        inputs: The inputs that :func:`_evaluate` returns.
    """
    b, m, k = a.shape
    x = torch.cat((x.unsqueeze(1), inputs), dim=1)  # of each sinusoid, (B, M, N)
    # All sinusoids at once, as their inputs are known: (B M, 2K + 2, N).
    flat = x.flatten(0, 1)
    extra = torch.stack((torch.ones_like(flat), flat.square()))
    frequency = a.flatten(0, 1).t().unsqueeze(-1)
    features = _features(flat, frequency, extra, _space(flat, k, 2))
    if gl is not None:
        gs = gl.unsqueeze(1) / slope
        bend = _bend(a, c, s).flatten(0, 1).unsqueeze(1)
        bent = _bmm(bend, features[:, :-1]).view_as(x) * gs
    # From the last sinusoid to the first: the cotangent of each one's value.
    g = torch.zeros_like(x[:, 0]) if gy is None else gy
    cotangents = []
    for i in reversed(range(m)):
        cotangents.append(g)
        g = g * slope[:, i] if gl is None else torch.addcmul(bent[:, i], g, slope[:, i])
    gv = torch.stack(cotangents[::-1], dim=1)
    rows = torch.stack((gv, gv * x) if gl is None else (gv, gv * x, gs, gs * x), dim=2)
    moments = _bmm(rows.flatten(0, 1), features.mT).unflatten(0, (b, m))

    # Sums over N of P, Q, 1 and x^2, times cotangents, times 1 or x; (B, M, K) or (B, M, 1).
    p, q, one, square = (t.unbind(dim=2) for t in moments.split((k, k, 1, 1), dim=-1))
    # The derivative of P / a by a is (x (1 - 2Q) - P / a) / a, a difference of nearly equal numbers
    # where ax is small: there, it is the first term of its series.
    reach = x.detach().abs().amax(dim=-1, keepdim=True) if x.numel() else one[0]
    gc, gs_ = p[0] / a, q[0] / a
    p_a = torch.where(
        a * reach < torch.finfo(a.dtype).eps ** 0.25,
        -4 / 3 * a * square[1],
        (one[1] - 2 * q[1] - gc) / a,
    )
    ga = c * p_a + s * (2 * p[1] - gs_) / a
    if gl is not None:
        ga = ga + 2 * s * (one[3] - 2 * q[3]) - 4 * c * p[3]
        gc = gc + one[2] - 2 * q[2]
        gs_ = gs_ + 2 * p[2]

    return g, ga, gc, gs_, one[0].squeeze(-1)


def _by_rows(
    function: Callable[..., tuple[Tensor, ...]], size: int, *args: Tensor | None
) -> tuple[Tensor, ...]:
    """Applies a function to blocks of rows.

    This bounds the memory of the temporaries, of ``size`` elements a row.
    """
    block = max(_BLOCK // max(size, 1), 1)
    rows = next(len(arg) for arg in args if arg is not None)
    if rows <= block or torch.compiler.is_compiling():
        return function(*args)
    count = -(-rows // block)
    split = (count * [None] if arg is None else arg.split(block) for arg in args)
    outputs = [function(*part) for part in zip(*split, strict=True)]
    return tuple(map(torch.cat, zip(*outputs, strict=True)))


def _push(
    x: Tensor, chain: Chain, tangents: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pushes tangents of x and the parameters to value and log-slope, and returns all four."""
    a, c, s, _ = chain
    dx, da, dc, ds, dd = (
        torch.zeros_like(i) if t is None else t for t, i in zip(tangents, (x, *chain), strict=True)
    )
    ladj, dladj = torch.zeros_like(x), torch.zeros_like(x)
    for m, sinusoid in enumerate(_sinusoids(chain)):
        am, cm, sm, dam, dcm, dsm = (t[:, m].unsqueeze(-1) for t in (a, c, s, da, dc, ds))
        along = x.unsqueeze(1)
        features = _features(x, sinusoid.a, torch.ones_like(x).unsqueeze(0))
        p, q, one = features.split((am.shape[1], am.shape[1], 1), dim=1)
        y, slope = (t.squeeze(1) for t in sinusoid.from_features(along, features))
        cosine = one - 2 * q
        dt = dam * along + am * dx.unsqueeze(1)
        dlog = dam / am
        dy = (
            dx
            + dd[:, m].unsqueeze(-1)
            + (
                ((dcm - cm * dlog) * p + (dsm - sm * dlog) * q + (cm * cosine + 2 * sm * p) * dt)
                / am
            ).sum(dim=1)
        )
        dslope = (dcm * cosine + 2 * dsm * p + (2 * sm * cosine - 4 * cm * p) * dt).sum(dim=1)
        ladj, dladj = ladj + slope.log(), dladj + dslope / slope
        x, dx = y, dy

    return x, ladj, dx, dladj


def _fold(args: Sequence[Tensor], in_dims: Sequence[int | None], n: int) -> list[Tensor]:
    """Turns a batch dimension of ``torch.func.vmap`` into more rows: rows are independent."""
    batched = (
        arg.expand(n, *arg.shape) if dim is None else arg.movedim(dim, 0)
        for arg, dim in zip(args, in_dims, strict=True)
    )
    return [arg.flatten(0, 1) for arg in batched]


class _Forward(Function):
    """Value and log-slope of a chain, with gradients in closed form."""

    @staticmethod
    def forward(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return _by_rows(_evaluate, parameters[0].shape[-1] * x.shape[-1], x, *parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output[2:])
        ctx.save_for_forward(*inputs)
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, gl: Tensor | None, *_: Any) -> tuple[Any, ...]:
        x, a, c, s, d, slope, inputs = ctx.saved_tensors
        if torch.is_grad_enabled():  # the derivative will itself be differentiated
            slope, inputs = _evaluate(x, a, c, s, d)[2:]
        size = a[0].numel() * x.shape[-1]
        return _by_rows(_pull, size, gy, gl, x, a, c, s, d, slope, inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        _, _, dy, dladj = _push(x, Chain(*parameters), tangents)
        return dy, dladj, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Tensor) -> Any:
        output = _Forward.apply(*_fold(args, in_dims, info.batch_size))
        unfolded = tuple(o.unflatten(0, (info.batch_size, -1)) for o in output)
        return unfolded, (0,) * len(unfolded)


class _Equation:
    """A sinusoid to be inverted, with shape (B, 1, N)."""

    def __init__(
        self, sinusoid: Sinusoid, amplitude: Tensor, shift: Tensor, space: Tensor | None
    ) -> None:
        self.sinusoid = sinusoid
        self.amplitude = amplitude  # of each component of the slope, (K, B, 1)
        self.shift = shift  # (B, 1, 1)
        self.space = space

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Bounds of the magnitudes of second and third derivative, with shape (B, 1, 1)."""
        second = 2 * self.sinusoid.a * self.amplitude
        third = 2 * self.sinusoid.a * second
        return second.sum(dim=0).unsqueeze(1), third.sum(dim=0).unsqueeze(1)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns value, slope and second derivative."""
        one = torch.ones_like(x).transpose(0, 1)
        features = _features(x.squeeze(1), self.sinusoid.a, one, self.space)
        value, slope, bend = self.sinusoid.from_features(x, features)
        return value, slope, bend

    def take(self, rows: Tensor) -> _Equation:
        """Returns the equations of some rows."""
        a, linear = self.sinusoid
        sinusoid = Sinusoid(a[:, rows], linear[rows])
        space = _space(rows.unsqueeze(1).to(a.dtype), len(a))
        return _Equation(sinusoid, self.amplitude[:, rows], self.shift[rows], space)

    def bracket(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns bounds of the root, from the bounds of slope and residual term."""
        info = torch.finfo(y.dtype)
        size = self.amplitude.sum(dim=0).unsqueeze(1)  # |alpha|
        reach = (self.amplitude / self.sinusoid.a).sum(dim=0).unsqueeze(1)
        # f(0) = d and f' is in [1 - |alpha|, 1 + |alpha|]: x is between z / (1 + |alpha|) and this.
        z = y - self.shift
        far = z / (1 - size).clamp_min(info.tiny)
        near = z / (1 + size)
        reach = reach + 8 * info.eps * (reach + z.abs())

        return (
            torch.maximum(torch.minimum(near, far), z - reach),
            torch.minimum(torch.maximum(near, far), z + reach),
        )


def _solve(solver: Solver, y: Tensor, chain: Chain) -> list[Root]:
    """Inverts the sinusoids of a chain, the last first, and returns their roots."""
    amplitude = torch.hypot(chain.c, chain.s) * (1 + 4 * torch.finfo(y.dtype).eps)
    amplitude, shift = _leading(amplitude), chain.d.unsqueeze(-1)
    roots, space = [Root(y.unsqueeze(1), 0, y)], _space(y, chain.a.shape[-1])
    for m, sinusoid in reversed([*enumerate(_sinusoids(chain, bend=True))]):
        y, d = roots[-1].x, shift[:, m : m + 1]
        equation = _Equation(sinusoid, amplitude[:, m], d, space)
        roots.append(solve_bracketed(equation, y, y - d, solver))
    return roots[1:]


class _Inverse(Function):
    """The root x of f(x) = y, differentiated by the implicit function theorem."""

    @staticmethod
    def forward(solver: Solver, y: Tensor, *parameters: Tensor) -> Tensor:
        roots: list[Root] = []

        def solve(y: Tensor, *parameters: Tensor) -> tuple[Tensor]:
            roots.extend(_solve(solver, y, Chain(*parameters)))
            return (roots[-1].x.squeeze(1),)

        (x,) = _by_rows(solve, parameters[0].shape[-1] * y.shape[-1], y, *parameters)
        report(roots, solver)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs[2:])
        ctx.save_for_forward(output, *inputs[2:])

    @staticmethod
    def backward(ctx: Any, gx: Tensor) -> tuple[Tensor | None, ...]:
        x, a, c, s, d = ctx.saved_tensors
        _, ladj, slope, inputs = _evaluate(x, a, c, s, d)
        gy = gx * (-ladj).exp()
        _, *grads = _pull(-gy, None, x, a, c, s, d, slope, inputs)
        return None, gy, *grads

    @staticmethod
    def jvp(ctx: Any, _: None, dy: Tensor | None, *tangents: Tensor | None) -> Tensor:
        x, *parameters = ctx.saved_tensors
        ladj, moved = _push(x, Chain(*parameters), (None, *tangents))[1:3]
        return ((0 if dy is None else dy) - moved) * (-ladj).exp()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], solver: Solver, *args: Tensor) -> Any:
        x = _Inverse.apply(solver, *_fold(args, in_dims[1:], info.batch_size))
        return x.unflatten(0, (info.batch_size, -1)), 0


def evaluate(x: Tensor, chain: Chain) -> tuple[Tensor, Tensor]:
    """Returns value and log-slope of a chain of sinusoids.

    Args:
        x: The numbers, with shape :math:`(*)`.
        chain: The parameters, with batch shape :math:`(*)`; they broadcast.
    """
    x, chain, shape = _align(x, chain)
    # The compiler knows no jvp, and fuses what autograd records.
    function = _evaluate if torch.compiler.is_compiling() else _Forward.apply
    y, ladj, *_ = function(x, *chain)
    return _restore(y, shape), _restore(ladj, shape)


def invert(y: Tensor, chain: Chain, solver: Solver) -> Tensor:
    """Returns the root x at which a chain of sinusoids is y.

    Args:
        y: The numbers, with shape :math:`(*)`.
        chain: The parameters, with batch shape :math:`(*)`; they broadcast.
        solver: Method, tolerance and number of iterations.
    """
    y, chain, shape = _align(y, chain)
    if not torch.compiler.is_compiling():
        return _restore(_Inverse.apply(solver, y, *chain), shape)
    roots = _solve(solver, y.detach(), Chain(*(p.detach() for p in chain)))
    x = roots[-1].x.squeeze(1)
    if torch.is_grad_enabled():
        # A step of Newton's method, whose derivative is that of the root.
        value, ladj, *_ = _evaluate(x, *chain)
        x = x - (value - y) * (-ladj).exp().detach()
    return _restore(x, shape)
