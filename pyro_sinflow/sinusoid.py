r"""The monotone sinusoid and its derivatives, as functions of tensors.

With :math:`t_k = a_k x`, a sinusoid (Eq. 13 and 15 of the paper) is

.. math::
    f(x) & = x + d - \alpha \sum_k w_k \frac{\cos(t_k + 2 b_k) \sin(t_k)}{a_k} \\
    f'(x) & = 1 - \alpha \sum_k w_k \cos(2 t_k + 2 b_k)

The constant of Eq. 13 is folded into :math:`d`, so that :math:`f(0) = d`. Written as a product
instead of a difference of sines, it loses no digits when :math:`a_k` is small.

Everything follows from one sine and one cosine of :math:`t_k`: angles are added with constants that
depend on the parameters only. Values, gradients and tangents are written out here instead of being
recorded operation by operation, so that the backward pass needs the inputs and nothing else.

Throughout, ``x`` has shape :math:`(*)`, ``a``, ``b`` and ``w`` have shape :math:`(*, K)`, ``alpha``
and ``d`` have shape :math:`(*)`, and batch shapes broadcast.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .inversion import Solver, solve_bracketed


class Parameters(NamedTuple):
    """The constrained parameters of a sinusoid."""

    a: Tensor  # angular frequency > 0, (*, K)
    b: Tensor  # phase, (*, K)
    w: Tensor  # convex weights, (*, K)
    alpha: Tensor  # residual weight, |alpha| < 1, (*)
    d: Tensor  # shift, (*)


def constrain(
    frequency: Tensor,
    phase: Tensor,
    weight: Tensor,
    residual: Tensor,
    shift: Tensor,
    slope: float,
) -> Parameters:
    """Maps unconstrained tensors to the parameters of a sinusoid whose slope exceeds ``slope``."""
    dtype = torch.promote_types(frequency.dtype, torch.float32)
    # At a = 0 the sinusoid has a limit, x cos(2b), and a frequency this small reaches it to the
    # last digit, while sin(ax) / a stays clear of 0 / 0 and of denormal numbers.
    smallest = math.sqrt(torch.finfo(dtype).tiny)

    return Parameters(
        a=F.softplus(frequency.to(dtype)).clamp_min(smallest),
        b=phase.to(dtype),
        w=weight.to(dtype).softmax(dim=-1),
        alpha=(1 - slope) * residual.to(dtype).tanh(),
        d=shift.to(dtype),
    )


class _Angles(NamedTuple):
    """Sines and cosines, each of shape (*, K)."""

    t: Tensor
    sin_t: Tensor
    cos_t: Tensor
    sin_tb: Tensor  # sin(t + b)
    cos_tb: Tensor
    sin_t2b: Tensor  # sin(t + 2b)
    cos_t2b: Tensor


def _angles(x: Tensor, a: Tensor, b: Tensor) -> _Angles:
    t = a * x.unsqueeze(-1)
    sin_t, cos_t = t.sin(), t.cos()
    sin_b, cos_b = b.sin(), b.cos()
    sin_tb = sin_t * cos_b + cos_t * sin_b
    cos_tb = cos_t * cos_b - sin_t * sin_b
    sin_t2b = sin_tb * cos_b + cos_tb * sin_b
    cos_t2b = cos_tb * cos_b - sin_tb * sin_b

    return _Angles(t, sin_t, cos_t, sin_tb, cos_tb, sin_t2b, cos_t2b)


def _slope(angles: _Angles, w: Tensor, alpha: Tensor) -> Tensor:
    # A sum of squares (Eq. 12), and of squared cosines where alpha is negative: nothing cancels,
    # so that the logarithm keeps its digits where the slope almost vanishes.
    square = torch.where(alpha.unsqueeze(-1) < 0, angles.cos_tb, angles.sin_tb).square()
    size = alpha.abs()

    return (1 - size) + 2 * size * (w * square).sum(dim=-1)


def evaluate(
    x: Tensor, a: Tensor, b: Tensor, w: Tensor, alpha: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the value and the slope of a sinusoid."""
    angles = _angles(x, a, b)
    y = x + d - alpha * (w / a * angles.sin_t * angles.cos_t2b).sum(dim=-1)

    return y, _slope(angles, w, alpha).expand(y.shape)


class _Derivatives(NamedTuple):
    """What gradients and tangents are made of; all but the slope have shape (*, K)."""

    slope: Tensor  # df/dx, (*)
    r: Tensor  # cos(t + 2b) sin(t) / a
    r_a: Tensor  # dr/da
    r_b: Tensor  # dr/db
    cos: Tensor  # cos(2t + 2b)
    sin: Tensor  # sin(2t + 2b)


def _derivatives(x: Tensor, p: Parameters) -> _Derivatives:
    angles = _angles(x, p.a, p.b)
    t, sin_t, cos_t, sin_tb, cos_tb, sin_t2b, cos_t2b = angles
    # sinc(t) = sin(t) / t and its derivative; by their series, where the quotients lose digits.
    small = t.abs() < 0.1
    t2 = t.square()
    safe = torch.where(small, torch.ones_like(t), t)
    sinc = torch.where(
        small, 1 - t2 / 6 * (1 - t2 / 20 * (1 - t2 / 42 * (1 - t2 / 72))), sin_t / safe
    )
    dsinc = torch.where(
        small, -t / 3 * (1 - t2 / 10 * (1 - t2 / 28 * (1 - t2 / 54))), (cos_t - sinc) / safe
    )

    return _Derivatives(
        slope=_slope(angles, p.w, p.alpha),
        r=sin_t * cos_t2b / p.a,
        r_a=x.square().unsqueeze(-1) * (dsinc * cos_t2b - sinc * sin_t2b),
        r_b=-2 * sin_t * sin_t2b / p.a,
        cos=(cos_tb - sin_tb) * (cos_tb + sin_tb),
        sin=2 * sin_tb * cos_tb,
    )


def _pull(x: Tensor, p: Parameters, q: _Derivatives, gy: Tensor, gs: Tensor) -> list[Tensor]:
    """Pulls cotangents of value and slope back to x and the parameters."""
    weight_y = (p.alpha * gy).unsqueeze(-1) * p.w
    weight_s = 2 * (p.alpha * gs).unsqueeze(-1) * p.w * q.sin
    change = gy.unsqueeze(-1) * q.r + gs.unsqueeze(-1) * q.cos
    grads = (
        gy * q.slope + (weight_s * p.a).sum(dim=-1),
        weight_s * x.unsqueeze(-1) - weight_y * q.r_a,
        weight_s - weight_y * q.r_b,
        -p.alpha.unsqueeze(-1) * change,
        -(p.w * change).sum(dim=-1),
        gy,
    )

    return [g.sum_to_size(i.shape) for g, i in zip(grads, (x, *p), strict=True)]


def _push(
    x: Tensor, p: Parameters, q: _Derivatives, tangents: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor]:
    """Pushes tangents of x and the parameters to value and slope."""
    dx, da, db, dw, dalpha, dd = (
        torch.zeros_like(i) if t is None else t for t, i in zip(tangents, (x, *p), strict=True)
    )
    angle = da * x.unsqueeze(-1) + p.a * dx.unsqueeze(-1) + db
    dr = dw * q.r + p.w * (q.r_a * da + q.r_b * db)
    dcos = dw * q.cos - 2 * p.w * q.sin * angle

    return (
        dx * q.slope + dd - dalpha * (p.w * q.r).sum(dim=-1) - p.alpha * dr.sum(dim=-1),
        -dalpha * (p.w * q.cos).sum(dim=-1) - p.alpha * dcos.sum(dim=-1),
    )


class Sinusoid(Function):
    """Value and slope of a sinusoid, with gradients in closed form: it saves its inputs alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *p: Tensor) -> tuple[Tensor, Tensor]:
        return evaluate(x, *p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gy: Tensor, gs: Tensor) -> tuple[Tensor, ...]:
        x, *rest = ctx.saved_tensors
        p = Parameters(*rest)

        return tuple(_pull(x, p, _derivatives(x, p), gy, gs))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        x, *rest = ctx.saved_tensors
        p = Parameters(*rest)

        return _push(x, p, _derivatives(x, p), tangents)


def _bracket(y: Tensor, p: Parameters) -> tuple[Tensor, Tensor]:
    """Returns bounds of the root, in closed form from the bounds on slope and residual term."""
    eps = torch.finfo(y.dtype).eps
    z, size = y - p.d, p.alpha.abs()
    # f(0) = d and f' is in [1 - |alpha|, 1 + |alpha|]: x lies between z / (1 + |alpha|) and this.
    far = z / (1 - size) * (1 + 4 * eps / (1 - size))
    near = z / (1 + size) * (1 - 4 * eps)
    reach = size * (p.w / p.a).sum(dim=-1)
    reach = reach + 4 * eps * (reach + z.abs())

    return torch.maximum(torch.minimum(near, far), z - reach), torch.minimum(
        torch.maximum(near, far), z + reach
    )


class SinusoidInverse(Function):
    """The root x of f(x) = y, differentiated by the implicit function theorem."""

    @staticmethod
    def forward(solver: Solver, y: Tensor, *parameters: Tensor) -> Tensor:
        p = Parameters(*parameters)
        # A tensor that broadcasts is solved in the shape of the result.
        y = y.expand(torch.broadcast_shapes(y.shape, p.alpha.shape, p.d.shape, p.a.shape[:-1]))
        lower, upper = _bracket(y, p)

        return solve_bracketed(lambda x: evaluate(x, *p), y, lower, upper, y - p.d, solver)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, y, *p = inputs
        ctx.shape = y.shape
        ctx.save_for_backward(output, *p)
        ctx.save_for_forward(output, *p)

    @staticmethod
    def backward(ctx: Any, gx: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        p = Parameters(*rest)
        q = _derivatives(x, p)
        gy = gx / q.slope
        _, *grads = _pull(x, p, q, -gy, torch.zeros_like(gy))

        return (None, gy.sum_to_size(ctx.shape), *grads)

    @staticmethod
    def jvp(ctx: Any, _: None, dy: Tensor | None, *tangents: Tensor | None) -> Tensor:
        x, *rest = ctx.saved_tensors
        p = Parameters(*rest)
        q = _derivatives(x, p)
        moved, _slope = _push(x, p, q, (None, *tangents))

        return ((0 if dy is None else dy) - moved) / q.slope

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], solver: Solver, *args: Tensor) -> Any:
        # The map is element-wise and broadcasts: a batch dimension is one more leading dimension,
        # aligned over the tensors, of which a, b and w (at 1, 2, 3) have K components last.
        events = [1 if i in (1, 2, 3) else 0 for i in range(len(args))]
        logical = [a.ndim - (d is not None) - e for a, d, e in zip(args, in_dims[1:], events)]  # noqa: B905
        depth = max(logical)
        moved = []
        for arg, dim, event in zip(args, in_dims[1:], events, strict=True):
            arg = arg.unsqueeze(0) if dim is None else arg.movedim(dim, 0)
            missing = depth - (arg.ndim - 1 - event)
            moved.append(arg.reshape(arg.shape[0], *[1] * missing, *arg.shape[1:]))

        return SinusoidInverse.apply(solver, *moved), 0
