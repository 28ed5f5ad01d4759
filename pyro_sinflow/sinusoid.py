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
tangent per element, from which :math:`P` and :math:`Q` follow, and one small matrix product; so
does its gradient. Nothing of size :math:`N \times D \times K` outlives the call: the backward pass
keeps inputs and slopes, and computes the rest again.

All functions work in one layout, which :func:`_align` makes: rows of numbers, one row for each of
the ``B`` sets of parameters. ``x`` has shape :math:`(B, N)`, ``a``, ``c`` and ``s`` have shape
:math:`(B, M, K)`, for the M sinusoids of a chain, and ``d`` has shape :math:`(B, M)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Size, Tensor
from torch.autograd import Function

from .inversion import Solver, solve_bracketed


class Chain(NamedTuple):
    """The parameters of a chain of M sinusoids."""

    a: Tensor  # angular frequency > 0, (*, M, K)
    c: Tensor  # amplitude of the slope's cosine, (*, M, K)
    s: Tensor  # amplitude of the slope's sine, (*, M, K)
    d: Tensor  # shift, (*, M)

    @property
    def batch_shape(self) -> Size:
        """The common shape of the parameters, without the M sinusoids and K components."""
        return torch.broadcast_shapes(*(p.shape[:-2] for p in self[:3]), self.d.shape[:-1])


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
    shape = torch.broadcast_shapes(x.shape, batch)
    varying = [*batch]
    while varying and varying[0] == 1:
        varying.pop(0)
    if varying != [*shape[len(shape) - len(varying) :]]:
        varying, batch = [*shape], shape  # the parameters vary with the batch: each x has its own
    rows = math.prod(varying)
    shared = math.prod(shape[: len(shape) - len(varying)])

    x = x.expand(shape).reshape(shared, rows).t().contiguous()
    a, c, s = (q.expand(*batch, *q.shape[-2:]).reshape(rows, *q.shape[-2:]) for q in chain[:3])
    d = chain.d.expand(*batch, chain.d.shape[-1]).reshape(rows, chain.d.shape[-1])

    return x, Chain(a, c, s, d), shape


def _restore(x: Tensor, shape: Size) -> Tensor:
    """Brings rows back into the shape from which :func:`_align` made them."""
    return x.t().reshape(shape)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """A batched matrix product that autocast leaves in full precision."""
    if torch.is_autocast_enabled(a.device.type):
        with torch.autocast(a.device.type, enabled=False):
            return torch.bmm(a, b)
    return torch.bmm(a, b)


def _features(x: Tensor, a: Tensor) -> Tensor:
    """Returns P, Q and 1, with shape (B, 2K + 1, N), for x of shape (B, N) and a of (B, K)."""
    x = x.unsqueeze(-2)
    u = (a.unsqueeze(-1) * x).tan_()
    r = u.square().add_(1).reciprocal_()  # the squared cosine
    p = u * r
    return torch.cat((p, u * p, torch.ones_like(x)), dim=-2)


class Sinusoid(NamedTuple):
    """One sinusoid, as a function that is linear in its features."""

    a: Tensor  # (B, K)
    linear: Tensor  # the coefficients of value and slope, (B, 2, 2K + 1)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns value and slope."""
        value, slope = _bmm(self.linear, _features(x, self.a)).unbind(dim=-2)
        return x + value, slope

    def take(self, rows: Tensor) -> Sinusoid:
        """Returns the sinusoids of some rows."""
        return Sinusoid(self.a[rows], self.linear[rows])


def _sinusoids(chain: Chain) -> list[Sinusoid]:
    a, c, s, d = chain
    value = torch.cat((c / a, s / a, d.unsqueeze(-1)), dim=-1)
    slope = torch.cat((s + s, -2 * c, 1 + c.sum(dim=-1, keepdim=True)), dim=-1)
    linear = torch.stack((value, slope), dim=-2)

    return [*map(Sinusoid, a.unbind(1), linear.unbind(1))]


def _evaluate(x: Tensor, chain: Chain) -> tuple[list[Tensor], list[Tensor]]:
    """Evaluates a chain.

    Returns:
        The input of each of the M sinusoids and the value of the last, and their slopes. All have
        shape (B, N).
    """
    values, slopes = [x], []
    for sinusoid in _sinusoids(chain):
        value, slope = sinusoid(values[-1])
        values.append(value)
        slopes.append(slope)

    return values, slopes


def _pull(
    chain: Chain,
    inputs: Sequence[Tensor],
    slopes: Sequence[Tensor],
    gy: Tensor,
    gl: Tensor | None,
) -> tuple[Tensor, ...]:
    """Pulls cotangents of value and log-slope back to x and the parameters."""
    a, c, s, _ = chain
    ac, as_ = a * c, a * s
    bend = torch.cat((-4 * ac, -4 * as_, 2 * as_.sum(dim=-1, keepdim=True)), dim=-1).unsqueeze(-2)

    # From the last sinusoid to the first, with everything summed over N as soon as it is there.
    moments, cotangents = [], []
    for m in reversed(range(a.shape[1])):
        x, slope = inputs[m], slopes[m]
        features = _features(x, a[:, m])
        cotangents.append(gy)
        if gl is None:
            rows = gy.unsqueeze(-2)
            gy = gy * slope
        else:
            gs = gl / slope
            rows = torch.stack((gy, gs), dim=-2)
            gy = torch.addcmul(gy * slope, gs, _bmm(bend[:, m], features).squeeze(-2))
        rows = torch.cat((rows, rows * x.unsqueeze(-2)), dim=-2)
        moments.append(_bmm(rows, features.mT))

    # Sums over N of P, Q or 1, times a cotangent, times 1 or x; each (B, M, K), or 1 in place of K.
    k = a.shape[-1]
    moment = torch.stack(moments[::-1], dim=1).split((k, k, 1), dim=-1)
    p, q, one = (t.unbind(dim=-2) for t in moment)
    first, last = 0, len(p) // 2  # without x, and with it

    # The derivative of P / a by a is (x (1 - 2Q) - P / a) / a, a difference of nearly equal numbers
    # where ax is small: there by its series.
    x = torch.stack(tuple(inputs), dim=1)  # (B, M, N)
    square = x.square()
    cube = torch.stack(cotangents[::-1], dim=1) * square * x
    third, fifth = cube.sum(dim=-1, keepdim=True), (cube * square).sum(dim=-1, keepdim=True)
    reach = x.detach().abs().amax(dim=-1, keepdim=True) if x.shape[-1] else third
    p_a = torch.where(
        a * reach < torch.finfo(a.dtype).eps ** 0.25,
        a * (8 / 15 * a.square() * fifth - 4 / 3 * third),
        (one[last] - 2 * q[last] - p[first] / a) / a,
    )
    ga = c * p_a + s * (2 * p[last] - q[first] / a) / a
    gc, gs = p[first] / a, q[first] / a
    if gl is not None:
        ga = ga + 2 * s * (one[3] - 2 * q[3]) - 4 * c * p[3]
        gc = gc + one[1] - 2 * q[1]
        gs = gs + 2 * p[1]

    return gy, ga, gc, gs, one[first].squeeze(-1)


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
        p, q, one = _features(x, sinusoid.a).split((a.shape[-1], a.shape[-1], 1), dim=-2)
        y, slope = sinusoid(x)
        along, cosine = x.unsqueeze(-2), one - 2 * q
        dt = dam * along + am * dx.unsqueeze(-2)
        dlog = dam / am
        dy = (
            dx
            + dd[:, m].unsqueeze(-1)
            + (
                ((dcm - cm * dlog) * p + (dsm - sm * dlog) * q + (cm * cosine + 2 * sm * p) * dt)
                / am
            ).sum(dim=-2)
        )
        dslope = (dcm * cosine + 2 * dsm * p + (2 * sm * cosine - 4 * cm * p) * dt).sum(dim=-2)
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
        (_, *values), slopes = _evaluate(x, Chain(*parameters))
        ladj = torch.stack(slopes).log_().sum(dim=0)
        return values[-1], ladj, *slopes, *values[:-1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output[2:])
        ctx.save_for_forward(*inputs)
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, gl: Tensor | None, *_: None) -> tuple[Any, ...]:
        x, a, c, s, d, *kept = ctx.saved_tensors
        chain, m = Chain(a, c, s, d), a.shape[1]
        if torch.is_grad_enabled():  # the derivative will itself be differentiated
            values, slopes = _evaluate(x, chain)
        else:
            slopes, values = kept[:m], [x, *kept[m:]]
        gy = torch.zeros_like(x) if gy is None else gy
        return _pull(chain, values[:m], slopes, gy, gl)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        chain = Chain(*parameters)
        _, _, dy, dladj = _push(x, chain, tangents)
        return dy, dladj, *[None] * (2 * chain.a.shape[1] - 1)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Tensor) -> Any:
        output = _Forward.apply(*_fold(args, in_dims, info.batch_size))
        unfolded = tuple(o.unflatten(0, (info.batch_size, -1)) for o in output)
        return unfolded, (0,) * len(unfolded)


def _bracket(y: Tensor, a: Tensor, c: Tensor, s: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Returns bounds of the root, in closed form from the bounds on slope and residual term."""
    info = torch.finfo(y.dtype)
    amplitude = torch.hypot(c, s) * (1 + 4 * info.eps)
    size = amplitude.sum(dim=-1, keepdim=True)  # |alpha|
    reach = (amplitude / a).sum(dim=-1, keepdim=True)
    # f(0) = d and f' is in [1 - |alpha|, 1 + |alpha|]: x lies between z / (1 + |alpha|) and this.
    z = y - d
    far = z / (1 - size).clamp_min(info.tiny)
    near = z / (1 + size)
    reach = reach + 8 * info.eps * (reach + z.abs())

    return (
        torch.maximum(torch.minimum(near, far), z - reach),
        torch.minimum(torch.maximum(near, far), z + reach),
    )


class _Inverse(Function):
    """The root x of f(x) = y, differentiated by the implicit function theorem."""

    @staticmethod
    def forward(solver: Solver, y: Tensor, *parameters: Tensor) -> Tensor:
        chain = Chain(*parameters)
        for m, sinusoid in reversed([*enumerate(_sinusoids(chain))]):
            a, c, s, d = (t[:, m] for t in chain)
            d = d.unsqueeze(-1)
            lower, upper = _bracket(y, a, c, s, d)
            y = solve_bracketed(sinusoid, y, lower, upper, y - d, solver)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs[2:])
        ctx.save_for_forward(output, *inputs[2:])

    @staticmethod
    def backward(ctx: Any, gx: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        chain = Chain(*parameters)
        values, slopes = _evaluate(x, chain)
        gy = gx / math.prod(slopes)
        _, *grads = _pull(chain, values[:-1], slopes, -gy, None)
        return None, gy, *grads

    @staticmethod
    def jvp(ctx: Any, _: None, dy: Tensor | None, *tangents: Tensor | None) -> Tensor:
        x, *parameters = ctx.saved_tensors
        _, ladj, moved, _ = _push(x, Chain(*parameters), (None, *tangents))
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
    y, ladj, *_ = _Forward.apply(x, *chain)
    return _restore(y, shape), _restore(ladj, shape)


def invert(y: Tensor, chain: Chain, solver: Solver) -> Tensor:
    """Returns the root x at which a chain of sinusoids is y.

    Args:
        y: The numbers, with shape :math:`(*)`.
        chain: The parameters, with batch shape :math:`(*)`; they broadcast.
        solver: Method, tolerance and number of iterations.
    """
    y, chain, shape = _align(y, chain)
    return _restore(_Inverse.apply(solver, y, *chain), shape)
