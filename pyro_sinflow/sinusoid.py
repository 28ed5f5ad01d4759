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
tangent, or one sine and one cosine, per component, and one small matrix product, or a sum where
each number has its own parameters; so does its gradient. Nothing of size
:math:`N \times D \times K` outlives the call: the backward pass keeps inputs and slopes, and
computes the rest again.

All functions work in one layout, which :func:`align` makes. Components come first in memory, then
the M sinusoids of a chain, and numbers last, so that all operations run over contiguous memory.
``x`` has shape :math:`(B, N)`. ``a``, ``c`` and ``s`` have shape :math:`(K, M, B, P)`, and ``d``
has shape :math:`(M, B, P)`, where P is 1 if the N numbers of a row share their parameters, and N if
each has its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from ._checks import broadcast, full_precision, has_duals
from .compilation import kernel, sums_are_fast

_FEW = 32  # components, for which matrix products, which add one after the other, lose no digits


class Chain(NamedTuple):
    """The parameters of a chain of M sinusoids."""

    a: Tensor  # angular frequency > 0, (K, M, *)
    c: Tensor  # amplitude of the slope's cosine, (K, M, *)
    s: Tensor  # amplitude of the slope's sine, (K, M, *)
    d: Tensor  # shift, (M, *)

    @property
    def batch_shape(self) -> Size:
        """The common shape of the parameters, without the K components and M sinusoids."""
        return broadcast(*(p.shape[2:] for p in self[:3]), self.d.shape[1:])


@kernel
def constrain(
    frequency: Tensor,
    phase: Tensor,
    weight: Tensor,
    residual: Tensor,
    shift: Tensor,
    *,
    slope: float,
) -> Chain:
    """Maps unconstrained tensors to a chain of sinusoids whose slopes exceed ``slope``.

    Args:
        frequency: The unconstrained frequencies, with shape (*, M, K).
        phase: The phases, with shape (*, M, K).
        weight: The unconstrained weights, with shape (*, M, K).
        residual: The unconstrained residual weights, with shape (*, M).
        shift: The shifts, with shape (*, M).
        slope: The smallest slope, which is not less than 16 times the machine epsilon.
    """
    dtype = torch.promote_types(frequency.dtype, torch.float32)
    # At a = 0 the sinusoid has a limit, x + d + c x, and a frequency this small reaches it to the
    # last digit, while P / a stays clear of 0 / 0 and of denormal numbers.
    smallest = math.sqrt(torch.finfo(dtype).tiny)
    slope = max(slope, 16 * torch.finfo(dtype).eps)  # or round-off would take it below zero
    vectors, scalars = (frequency, phase, weight), (residual, shift)
    batch = max(*(t.ndim - 2 for t in vectors), *(t.ndim - 1 for t in scalars))

    def leading(t: Tensor, event: int) -> Tensor:
        t = t.to(dtype)[(None,) * (batch + event - t.ndim)]
        return t.permute(*range(t.ndim - 1, batch - 1, -1), *range(batch)).contiguous()

    frequency, phase, weight = (leading(t, 2) for t in vectors)
    residual, shift = (leading(t, 1) for t in scalars)
    angle = 2 * phase
    amplitude = ((1 - slope) * residual.tanh()) * weight.softmax(dim=0)

    return Chain(
        a=F.softplus(frequency).clamp_min(smallest),
        c=-amplitude * angle.cos(),
        s=amplitude * angle.sin(),
        d=shift,
    )


def align(x: Tensor, chain: Chain) -> tuple[Tensor, Chain, Size]:
    """Brings x and a chain into the layout of this module.

    Returns:
        The numbers as rows, the chain, and the shape to :func:`restore`. Where a batch shares its
        parameters, these are neither copied nor expanded.
    """
    batch = chain.batch_shape
    shape = broadcast(x.shape, batch)
    varying = [*batch]
    while varying and varying[0] == 1:
        varying.pop(0)
    cut = len(shape) - len(varying)
    shared, rows, own = shape[:cut].numel(), batch.numel(), 1
    if shared == 1 or varying != [*shape[cut:]]:  # each number has its own parameters
        shared, rows, own, batch = 1, 1, shape.numel(), shape

    def flat(q: Tensor, event: int) -> Tensor:
        kept, given = q.shape[:event], q.shape[event:]
        if given != batch:
            q = q.reshape(*kept, *(len(batch) - len(given)) * (1,), *given).expand(*kept, *batch)
        return q.reshape(*kept, rows, own)

    x = x.expand(shape)
    x = x.reshape(1, -1) if rows == 1 else x.reshape(shared, rows).t().contiguous()
    return x, Chain(flat(chain.a, 2), flat(chain.c, 2), flat(chain.s, 2), flat(chain.d, 1)), shape


def restore(x: Tensor, shape: Size) -> Tensor:
    """Brings rows back into the shape from which :func:`align` made them."""
    return x.t().reshape(shape)


def _apply(linear: Tensor, features: Tensor) -> Tensor:
    """Applies maps (B, R, F + 1), whose last column is constant, to features (F, B, N)."""
    constant, factors = linear[..., -1:], linear[..., :-1]
    return full_precision(torch.baddbmm, constant, factors, features.transpose(0, 1))


def _features(x: Tensor, a: Tensor, space: Tensor | None = None) -> Tensor:
    """Returns P and Q, stacked.

    Args:
        x: The numbers, with shape (*, N).
        a: The frequencies, with shape (K, *, P).
        space: Memory of shape (2K, *, N) that is overwritten, or :py:`None`.

    Returns:
        The features, with shape (2K, *, N).
    """
    if space is None:
        t = a * x
        sine, cosine = t.sin(), t.cos()
        return torch.cat((sine * cosine, sine * sine))
    # P = tan / (1 + tan^2) and Q = P tan: eagerly, one tangent takes less time than a sine and a
    # cosine. It loses no digits either, as its poles are no floating-point numbers.
    p, q = space.chunk(2)
    torch.mul(a, x, out=q)
    q.tan_()
    torch.mul(q, q, out=p).add_(1)
    torch.div(q, p, out=p)
    q.mul_(p)
    return space


def allocate(x: Tensor, a: Tensor) -> Tensor | None:
    """Allocates what features of x need, unless autograd or the compiler is looking.

    To reuse memory matters: to allocate it takes longer than to fill it.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or has_duals():
        return None
    return x.new_empty(2 * len(a), *x.shape)


class Sinusoid(NamedTuple):
    """One sinusoid."""

    a: Tensor  # (K, B, P)
    c: Tensor  # (K, B, P)
    s: Tensor  # (K, B, P)
    d: Tensor  # (B, P)
    # Where the numbers of a row share the parameters, one matrix product gives value, slope and
    # second derivative: their R coefficients of P, Q and 1, with shape (B, R, 2K + 1).
    linear: Tensor | None = None

    def __call__(
        self, x: Tensor, space: Tensor | None = None, bend: bool = False
    ) -> tuple[Tensor, ...]:
        """Returns value, slope and, with ``bend``, second derivative at x, with shape (B, N)."""
        return self.from_features(x, _features(x, self.a, space), bend)

    def from_features(self, x: Tensor, features: Tensor, bend: bool = False) -> tuple[Tensor, ...]:
        """Returns the same, given the features at x."""
        if self.linear is not None:
            value, *derivatives = _apply(self.linear, features).unbind(1)
            return x + value, *derivatives
        p, q = features.chunk(2)
        value = x + self.d + (torch.addcmul(self.c * p, self.s, q) / self.a).sum(dim=0)
        sine, cosine = p + p, torch.rsub(q, 1, alpha=2)
        slope = 1 + torch.addcmul(self.c * cosine, self.s, sine).sum(dim=0)
        if not bend:
            return value, slope
        waves = torch.addcmul(self.s * cosine, self.c, sine, value=-1)
        return value, slope, 2 * (self.a * waves).sum(dim=0)


def _bend(a: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """Returns the coefficients of the second derivative, with shape (2K + 1, *)."""
    ac, as_ = -4 * a * c, 2 * a * s
    return torch.cat((ac, -2 * as_, as_.sum(dim=0, keepdim=True)))


def sinusoids(chain: Chain, sums: bool, bend: bool = False) -> list[Sinusoid]:
    """Returns the sinusoids of a chain, to evaluate by sums or by matrix products.

    The latter have to know in advance whether the second derivative is wanted.
    """
    a, c, s, d = chain
    each = [*map(Sinusoid, a.unbind(1), c.unbind(1), s.unbind(1), d.unbind(0))]
    if sums:
        return each
    value = torch.cat((c / a, s / a, d.unsqueeze(0)))
    slope = torch.cat((s + s, -2 * c, 1 + c.sum(dim=0, keepdim=True)))
    rows = (value, slope, _bend(a, c, s)) if bend else (value, slope)
    linear = torch.stack(rows).squeeze(-1).permute(2, 3, 0, 1).contiguous()

    return [sinusoid._replace(linear=m) for sinusoid, m in zip(each, linear.unbind(0), strict=True)]


def has_own(x: Tensor, a: Tensor) -> bool:
    """Whether each number has its own parameters."""
    return a.shape[-1] == x.shape[-1]


def by_sums(x: Tensor, a: Tensor) -> bool:
    """Whether sums evaluate sinusoids, where matrix products cannot, or are not as good."""
    return has_own(x, a) or len(a) > _FEW or sums_are_fast()


@kernel
def evaluate_rows(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """Evaluates a chain.

    Returns:
        The value and the log-slope of the chain, with shape (B, N); then the slopes of the M
        sinusoids, with shape (M, B, N), and the inputs of all but the first, (M - 1, B, N).
    """
    values, slopes = [x], []
    space = allocate(x, parameters[0])
    for sinusoid in sinusoids(Chain(*parameters), by_sums(x, parameters[0])):
        value, slope = sinusoid(values[-1], space)
        values.append(value)
        slopes.append(slope)
    slope = torch.stack(slopes)
    inputs = torch.stack(values[1:-1]) if len(slopes) > 1 else slope[:0].clone()

    return values[-1], slope.log().sum(dim=0), slope, inputs


@kernel
def pull(
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
        slope: The slopes that :func:`evaluate_rows` returns.
        inputs: The inputs that :func:`evaluate_rows` returns.
    """
    k, m, own = len(a), len(d), has_own(x, a)
    # All sinusoids at once, as their inputs are known: their rows, (M B, N), are side by side.
    along = torch.cat((x.unsqueeze(0), inputs))
    x = along.flatten(0, 1)
    a, c, s = (p.flatten(1, 2) for p in (a, c, s))
    features = _features(x, a, allocate(x, a))
    if gl is not None:
        g_slope = gl / slope
        bent = _bend(a, c, s)
        if by_sums(x, a):
            bent = (bent[:-1] * features).sum(dim=0) + bent[-1]
        else:
            bent = _apply(bent.permute(1, 2, 0), features)
        bent = bent.view_as(slope) * g_slope
    # From the last sinusoid to the first: the cotangent of each one's value.
    g = torch.zeros_like(along[0]) if gy is None else gy
    cotangents = []
    for i in reversed(range(m)):
        cotangents.append(g)
        g = g * slope[i] if gl is None else torch.addcmul(bent[i], g, slope[i])
    gv = torch.stack(cotangents[::-1])
    rows = (gv, gv * along) if gl is None else (gv, gv * along, g_slope, g_slope * along)

    # Cotangents, times 1 or x, times 1, P and Q: (M B, P) or (K, M B, P), summed over numbers that
    # share their parameters.
    one = torch.stack(rows).flatten(1, 2)
    square = one[1] * x.square()
    reach = x.detach().abs()
    if own:
        products = one.unsqueeze(1) * features
    else:
        products = full_precision(torch.bmm, one.transpose(0, 1), features.permute(1, 2, 0))
        products = products.permute(1, 2, 0).unsqueeze(-1)
        one, square = one.sum(dim=-1, keepdim=True), square.sum(dim=-1, keepdim=True)
        reach = reach.amax(dim=-1, keepdim=True) if x.numel() else square
    p, q = products.split(k, dim=1)
    # The derivative of P / a by a is (x (1 - 2Q) - P / a) / a, a difference of nearly equal numbers
    # where ax is small: there, it is the first term of its series.
    gc, gs = p[0] / a, q[0] / a
    p_a = torch.where(
        a * reach < torch.finfo(a.dtype).eps ** 0.25,
        -4 / 3 * a * square,
        (one[1] - 2 * q[1] - gc) / a,
    )
    ga = c * p_a + s * (2 * p[1] - gs) / a
    if gl is not None:
        ga = ga + 2 * s * (one[3] - 2 * q[3]) - 4 * c * p[3]
        gc = gc + one[2] - 2 * q[2]
        gs = gs + 2 * p[2]

    vectors = (t.unflatten(1, d.shape[:2]) for t in (ga, gc, gs))
    return g, *vectors, one[0].view_as(d)


def push(
    x: Tensor, chain: Chain, tangents: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pushes tangents of x and the parameters to value and log-slope, and returns all four."""
    a, c, s, _ = chain
    dx, da, dc, ds, dd = (
        torch.zeros_like(i) if t is None else t for t, i in zip(tangents, (x, *chain), strict=True)
    )
    ladj, dladj = torch.zeros_like(x), torch.zeros_like(x)
    for m, sinusoid in enumerate(sinusoids(chain, by_sums(x, a))):
        am, cm, sm, dam, dcm, dsm = (t[:, m] for t in (a, c, s, da, dc, ds))
        features = _features(x, am)
        y, slope = sinusoid.from_features(x, features)
        p, q = features.chunk(2)
        cosine = 1 - 2 * q
        dt = dam * x + am * dx
        dlog = dam / am
        moved = (dcm - cm * dlog) * p + (dsm - sm * dlog) * q + (cm * cosine + 2 * sm * p) * dt
        dslope = dcm * cosine + 2 * dsm * p + (2 * sm * cosine - 4 * cm * p) * dt
        dy = dx + dd[m] + (moved / am).sum(dim=0)
        ladj, dladj = ladj + slope.log(), dladj + dslope.sum(dim=0) / slope
        x, dx = y, dy

    return x, ladj, dx, dladj
