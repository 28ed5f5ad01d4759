r"""Chains of monotone sinusoids and their derivatives, as functions of tensors.

With :math:`t = a x`, a sinusoid (Eq. 13 and 15 of the paper) and its slope are

.. math::
    f(x) & = x + d - \alpha \sum_k w_k \left(
        \cos(2 b_k) \frac{P_k}{a_k} - \sin(2 b_k) \frac{Q_k}{a_k} \right) \\
    f'(x) & = 1 - \alpha \sum_k w_k \left(
        \cos(2 b_k) (1 - 2 Q_k) - 2 \sin(2 b_k) P_k \right)

where :math:`P = \sin t \cos t` and :math:`Q = \sin^2 t`. The constant of Eq. 13 is folded into
:math:`d`, so that :math:`f(0) = d`. Unlike a difference of sines, :math:`P / a` and :math:`Q / a`
lose no digits when :math:`a` is small.

Value, slope and all their derivatives are linear in :math:`P` and :math:`Q`, with coefficients that
depend on the parameters alone. Hence a sinusoid costs one tangent per element, from which
:math:`P` and :math:`Q` follow, and one small matrix product; so does its gradient. Nothing of size
:math:`N \times D \times K` outlives the call, and only the inputs and slopes are kept for the
backward pass.

All functions work in one layout, which :func:`align` makes: rows of numbers, one row for each of
the ``B`` sets of parameters. ``x`` has shape :math:`(B, N)`, ``a``, ``b`` and ``w`` have shape
:math:`(B, M, K)`, ``alpha`` and ``d`` have shape :math:`(B, M)`.
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


class Parameters(NamedTuple):
    """The constrained parameters of a chain of M sinusoids."""

    a: Tensor  # angular frequency > 0, (*, M, K)
    b: Tensor  # phase, (*, M, K)
    w: Tensor  # convex weights, (*, M, K)
    alpha: Tensor  # residual weight, |alpha| < 1, (*, M)
    d: Tensor  # shift, (*, M)

    @property
    def batch_shape(self) -> Size:
        """The common shape of the parameters, without the M sinusoids and K components."""
        return torch.broadcast_shapes(
            *(p.shape[:-2] for p in self[:3]), *(p.shape[:-1] for p in self[3:])
        )


def constrain(
    frequency: Tensor,
    phase: Tensor,
    weight: Tensor,
    residual: Tensor,
    shift: Tensor,
    *,
    slope: float,
) -> Parameters:
    """Maps unconstrained tensors to the parameters of sinusoids whose slopes exceed ``slope``."""
    dtype = torch.promote_types(frequency.dtype, torch.float32)
    # At a = 0 the sinusoid has a limit, x cos(2b), and a frequency this small reaches it to the
    # last digit, while P / a stays clear of 0 / 0 and of denormal numbers.
    smallest = math.sqrt(torch.finfo(dtype).tiny)

    return Parameters(
        a=F.softplus(frequency.to(dtype)).clamp_min(smallest),
        b=phase.to(dtype),
        w=weight.to(dtype).softmax(dim=-1),
        alpha=(1 - slope) * residual.to(dtype).tanh(),
        d=shift.to(dtype),
    )


def align(x: Tensor, p: Parameters) -> tuple[Tensor, Parameters, Size]:
    """Brings x and the parameters into the layout of this module.

    Returns:
        The numbers as rows, the parameters, and the shape to :func:`restore`. Where all rows of a
        batch share their parameters, these are neither copied nor expanded.
    """
    batch = p.batch_shape
    shape = torch.broadcast_shapes(x.shape, batch)
    varying = [*batch]
    while varying and varying[0] == 1:
        varying.pop(0)
    if varying != [*shape[len(shape) - len(varying) :]]:
        varying, batch = [*shape], shape  # the parameters vary with the batch: each x has its own
    rows = math.prod(varying)
    shared = math.prod(shape[: len(shape) - len(varying)])

    x = x.expand(shape).reshape(shared, rows).t().contiguous()
    flat = (q.expand(*batch, *q.shape[-2:]).reshape(rows, *q.shape[-2:]) for q in p[:3])
    last = (q.expand(*batch, *q.shape[-1:]).reshape(rows, *q.shape[-1:]) for q in p[3:])

    return x, Parameters(*flat, *last), shape


def restore(x: Tensor, shape: Size) -> Tensor:
    """Brings rows back into the shape from which :func:`align` made them."""
    return x.t().reshape(shape)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """A batched matrix product that autocast leaves in full precision."""
    if torch.is_autocast_enabled(a.device.type):
        with torch.autocast(a.device.type, enabled=False):
            return torch.bmm(a, b)
    return torch.bmm(a, b)


class _Sinusoid(NamedTuple):
    """One sinusoid in a form that is linear in P and Q."""

    a: Tensor  # (B, K)
    linear: Tensor  # the coefficients of value and slope, (B, 2, 2K)
    d: Tensor  # (B)
    slope0: Tensor  # the slope where P = Q = 0, (B)

    def features(self, x: Tensor) -> Tensor:
        """Returns P and Q, with shape (B, 2K, N)."""
        u = (self.a.unsqueeze(-1) * x.unsqueeze(-2)).tan_()
        r = u.square().add_(1).reciprocal_()  # cos(t) squared
        p = u * r
        return torch.cat((p, u * p), dim=-2)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns value and slope."""
        value, slope = _bmm(self.linear, self.features(x)).unbind(dim=-2)
        return value + x + self.d.unsqueeze(-1), slope + self.slope0.unsqueeze(-1)

    def take(self, rows: Tensor) -> _Sinusoid:
        """Returns the sinusoids of some rows."""
        return _Sinusoid(*(tensor[rows] for tensor in self))


def _sinusoids(p: Parameters) -> list[_Sinusoid]:
    c, s = (2 * p.b).cos(), (2 * p.b).sin()
    weight = p.alpha.unsqueeze(-1) * p.w
    value = torch.cat((-weight * c / p.a, weight * s / p.a), dim=-1)
    slope = torch.cat((2 * weight * s, 2 * weight * c), dim=-1)
    linear = torch.stack((value, slope), dim=-2)
    slope0 = 1 - (weight * c).sum(dim=-1)
    parts = zip(p.a.unbind(1), linear.unbind(1), p.d.unbind(1), slope0.unbind(1), strict=True)

    return [_Sinusoid(*tensors) for tensors in parts]


def evaluate(x: Tensor, p: Parameters) -> tuple[list[Tensor], list[Tensor]]:
    """Evaluates a chain.

    Returns:
        The input of each of the M sinusoids and the value of the last, and their slopes. All have
        shape (B, N).
    """
    values, slopes = [x], []
    for sinusoid in _sinusoids(p):
        value, slope = sinusoid(values[-1])
        values.append(value)
        slopes.append(slope)

    return values, slopes


def _pull(
    p: Parameters,
    inputs: Sequence[Tensor],
    slopes: Sequence[Tensor],
    gy: Tensor,
    gl: Tensor | None,
) -> tuple[Tensor, ...]:
    """Pulls cotangents of value and log-slope back to x and the parameters."""
    c, s = (2 * p.b).cos(), (2 * p.b).sin()
    weight = p.alpha.unsqueeze(-1) * p.w
    curve = 4 * weight * p.a * torch.stack((c, -s))  # of the slope's derivative, in P and Q
    curve = curve.movedim(0, -2).flatten(-2).unsqueeze(-2)  # (B, M, 1, 2K)
    curve0 = 2 * (weight * p.a * s).sum(dim=-1, keepdim=True)  # (B, M, 1)

    # From the last sinusoid to the first, with all that depends on x summed over N.
    moments, totals, values = [], [], []
    sinusoids = _sinusoids(p)
    for m in reversed(range(len(sinusoids))):
        x, slope = inputs[m], slopes[m]
        features = sinusoids[m].features(x)
        values.append(gy)
        rows = [gy, x * gy]
        gx = gy * slope
        if gl is not None:
            gs = gl / slope
            rows += [gs, x * gs]
            bend = _bmm(curve[:, m], features).squeeze(-2) + curve0[:, m]
            gx = torch.addcmul(gx, gs, bend)
        stacked = torch.stack(rows, dim=-2)
        moments.append(_bmm(stacked, features.mT))
        totals.append(stacked.sum(dim=-1))
        gy = gx

    moment = torch.stack(moments[::-1], dim=1)  # (B, M, 2 or 4, 2K)
    total = torch.stack(totals[::-1], dim=1).unsqueeze(-1)  # (B, M, 2 or 4, 1)
    p_y, q_y = moment[..., 0, :].chunk(2, dim=-1)
    p_xy, q_xy = moment[..., 1, :].chunk(2, dim=-1)
    total_y, total_xy = total[..., 0, :], total[..., 1, :]

    # The derivative of P / a by a is (x (1 - 2Q) - P / a) / a, a difference of nearly equal numbers
    # where t is small: there its series, 4/3 and 8/15 being those of sin(2t) and cos(2t).
    x = torch.stack(tuple(inputs), dim=1)  # (B, M, N)
    square = x.square()
    cube = torch.stack(values[::-1], dim=1) * square * x
    third, fifth = cube.sum(dim=-1, keepdim=True), (cube * square).sum(dim=-1, keepdim=True)
    reach = x.detach().abs().amax(dim=-1, keepdim=True) if x.shape[-1] else third
    small = p.a * reach < torch.finfo(p.a.dtype).eps ** 0.25
    dp_a = torch.where(
        small,
        p.a * (8 / 15 * p.a.square() * fifth - 4 / 3 * third),
        (total_xy - 2 * q_xy - p_y / p.a) / p.a,
    )
    dq_a = (2 * p_xy - q_y / p.a) / p.a

    change = (c * p_y - s * q_y) / p.a
    change_a = c * dp_a - s * dq_a
    change_b = -2 * (s * p_y + c * q_y) / p.a
    if gl is not None:
        p_s, q_s = moment[..., 2, :].chunk(2, dim=-1)
        p_xs, q_xs = moment[..., 3, :].chunk(2, dim=-1)
        cos_s = total[..., 2, :] - 2 * q_s
        change = change + c * cos_s - 2 * s * p_s
        change_a = change_a - 4 * c * p_xs - 2 * s * (total[..., 3, :] - 2 * q_xs)
        change_b = change_b - 2 * s * cos_s - 4 * c * p_s

    return (
        gy,
        -weight * change_a,
        -weight * change_b,
        -p.alpha.unsqueeze(-1) * change,
        -(p.w * change).sum(dim=-1),
        total_y.squeeze(-1),
    )


def _push(
    x: Tensor, p: Parameters, tangents: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pushes tangents of x and the parameters to value and log-slope, and returns all four."""
    dx, da, db, dw, dalpha, dd = (
        torch.zeros_like(i) if t is None else t for t, i in zip(tangents, (x, *p), strict=True)
    )
    c, s = (2 * p.b).cos(), (2 * p.b).sin()
    weight = p.alpha.unsqueeze(-1) * p.w
    dweight = dalpha.unsqueeze(-1) * p.w + p.alpha.unsqueeze(-1) * dw
    dc, ds = dweight * c - 2 * weight * s * db, dweight * s + 2 * weight * c * db
    log_a = da / p.a

    ladj, dladj = torch.zeros_like(x), torch.zeros_like(x)
    for m, sinusoid in enumerate(_sinusoids(p)):
        sines, squares = sinusoid.features(x).chunk(2, dim=-2)  # P and Q
        cosine = 1 - 2 * squares

        def total(*terms: tuple[Tensor, Tensor], m: int = m) -> Tensor:
            return sum((coef[:, m].unsqueeze(-1) * f).sum(dim=-2) for coef, f in terms)

        y, slope = sinusoid(x)
        bend = 2 * total((weight * p.a * s, cosine), (2 * weight * p.a * c, sines))
        dy = dx * slope + dd[:, m].unsqueeze(-1)
        dy = dy - total(((dc - weight * c * log_a) / p.a, sines))
        dy = dy + total(((ds - weight * s * log_a) / p.a, squares))
        dy = dy - x * total((weight * c * log_a, cosine), (-2 * weight * s * log_a, sines))
        dslope = dx * bend - total((dc, cosine), (-2 * ds, sines))
        dslope = dslope + 2 * x * total((weight * s * da, cosine), (2 * weight * c * da, sines))
        ladj, dladj = ladj + slope.log(), dladj + dslope / slope
        x, dx = y, dy

    return x, ladj, dx, dladj


class _Chain(Function):
    """Value and log-slope of a chain, with gradients in closed form."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        (_, *values), slopes = evaluate(x, Parameters(*parameters))
        ladj = torch.stack(slopes).log_().sum(dim=0)
        return values[-1], ladj, *slopes, *values[:-1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output[2:])
        ctx.save_for_forward(*inputs)
        ctx.mark_non_differentiable(*output[2:])

    @staticmethod
    def backward(ctx: Any, gy: Tensor, gl: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        x, a, b, w, alpha, d, *kept = ctx.saved_tensors
        p = Parameters(a, b, w, alpha, d)
        if torch.is_grad_enabled():  # the derivative will itself be differentiated
            values, slopes = evaluate(x, p)
        else:
            slopes, values = kept[: a.shape[1]], [x, *kept[a.shape[1] :]]
        return _pull(p, values[: a.shape[1]], slopes, gy, gl)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        _, _, dy, dladj = _push(x, Parameters(*rest), tangents)
        return dy, dladj, *[None] * (2 * rest[0].shape[1] - 1)


def _bracket(y: Tensor, a: Tensor, w: Tensor, alpha: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Returns bounds of the root, in closed form from the bounds on slope and residual term."""
    eps = torch.finfo(y.dtype).eps
    z, size = y - d, alpha.abs()
    # f(0) = d and f' is in [1 - |alpha|, 1 + |alpha|]: x lies between z / (1 + |alpha|) and this.
    far = z / (1 - size) * (1 + 4 * eps / (1 - size))
    near = z / (1 + size) * (1 - 4 * eps)
    reach = size * (w / a).sum(dim=-1, keepdim=True)
    reach = reach + 4 * eps * (reach + z.abs())

    return (
        torch.maximum(torch.minimum(near, far), z - reach),
        torch.minimum(torch.maximum(near, far), z + reach),
    )


class _Inverse(Function):
    """The root x of f(x) = y, differentiated by the implicit function theorem."""

    @staticmethod
    def forward(solver: Solver, y: Tensor, *parameters: Tensor) -> Tensor:
        p = Parameters(*parameters)
        for m, sinusoid in reversed([*enumerate(_sinusoids(p))]):
            alpha, d = p.alpha[:, m, None], p.d[:, m, None]
            lower, upper = _bracket(y, p.a[:, m], p.w[:, m], alpha, d)
            y = solve_bracketed(sinusoid, y, lower, upper, y - d, solver)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs[2:])
        ctx.save_for_forward(output, *inputs[2:])

    @staticmethod
    def backward(ctx: Any, gx: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        p = Parameters(*rest)
        values, slopes = evaluate(x, p)
        gy = gx / math.prod(slopes)
        _, *grads = _pull(p, values[:-1], slopes, -gy, None)
        return None, gy, *grads

    @staticmethod
    def jvp(ctx: Any, _: None, dy: Tensor | None, *tangents: Tensor | None) -> Tensor:
        x, *rest = ctx.saved_tensors
        _, ladj, moved, _ = _push(x, Parameters(*rest), (None, *tangents))
        return ((0 if dy is None else dy) - moved) * (-ladj).exp()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], solver: Solver, *args: Tensor) -> Any:
        # Rows are independent, so that a batch dimension is only more rows.
        n = info.batch_size
        batched = [
            arg.expand(n, *arg.shape) if dim is None else arg.movedim(dim, 0)
            for arg, dim in zip(args, in_dims[1:], strict=True)
        ]
        x = _Inverse.apply(solver, *(arg.flatten(0, 1) for arg in batched))
        return x.unflatten(0, (n, -1)), 0


def chain(x: Tensor, p: Parameters) -> tuple[Tensor, Tensor]:
    """Returns value and log-slope of a chain of sinusoids, for tensors that broadcast.

    Args:
        x: The numbers, with shape :math:`(*)`.
        p: The parameters, with batch shape :math:`(*)`.
    """
    x, p, shape = align(x, p)
    y, ladj, *_ = _Chain.apply(x, *p)
    return restore(y, shape), restore(ladj, shape)


def invert_chain(y: Tensor, p: Parameters, solver: Solver) -> Tensor:
    """Returns the root x of a chain of sinusoids at y, for tensors that broadcast.

    Args:
        y: The numbers, with shape :math:`(*)`.
        p: The parameters, with batch shape :math:`(*)`.
        solver: Method, tolerance and number of iterations.
    """
    y, p, shape = align(y, p)
    return restore(_Inverse.apply(solver, y, *p), shape)
