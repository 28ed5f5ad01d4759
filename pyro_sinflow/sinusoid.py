r"""Chains of monotone sinusoids: the formulas, for arrays of numpy and tensors of torch.

A sinusoid (Eq. 13 and 15 of the paper) is the integral of a Fourier series that stays positive:

.. math::
    f'(x) & = 1 + \sum_k c_k \cos(2 a_k x) + s_k \sin(2 a_k x) \\
    f(x) & = x + d + \sum_k c_k \frac{P_k}{a_k} + s_k \frac{Q_k}{a_k}

with :math:`c_k = -\alpha w_k \cos(2 b_k)`, :math:`s_k = \alpha w_k \sin(2 b_k)`,
:math:`P_k = \sin(a_k x) \cos(a_k x)` and :math:`Q_k = \sin^2(a_k x)`. The constant of Eq. 13 is
included in :math:`d`, so that :math:`f(0) = d`. Unlike a difference of sines, :math:`P / a` and
:math:`Q / a` lose no digits for small :math:`a`. Value, slope and curvature are linear in the waves
:math:`P` and :math:`Q`.

The parameters of a chain of M sinusoids are one tensor of shape :math:`(*, M, 3K + 2)`: for each
sinusoid K frequencies, K phases and K weights, a residual weight and a shift, all unconstrained.
Without shifts the last dimension is :math:`3K + 1`.

In this module, numbers have shape :math:`(B, 1, N)` and parameters have shape
:math:`(M, B, \cdot, P)`, where P is 1 if the N numbers of a row share their parameters, and N if
each has its own.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

from .arrays import PLAIN, Array


def largest_residual(min_slope: float, eps: float) -> float:
    """Returns the largest |alpha|, which is below 1 by more than round-off."""
    return 1 - max(min_slope, 16 * eps)


class Chain(NamedTuple):
    """The constrained parameters of M sinusoids."""

    frequency: Array  # a > 0, (M, B, K, P)
    weight: Array  # w
    residual: Array  # alpha over its largest value, (M, B, 1, P)
    amplitude: Array  # alpha w, (M, B, K, P)
    cosine: Array  # -cos(2b)
    sine: Array  # sin(2b)
    shift: Array | None  # d, (M, B, 1, P)


def constrain(parameters: Array, min_slope: float, xp: SimpleNamespace = PLAIN) -> Chain:
    """Maps unconstrained parameters, with shape (M, B, 3K + 2, P), to those of a chain."""
    k, rest = divmod(int(parameters.shape[2]), 3)
    info = xp.finfo(parameters.dtype)
    angle = 2 * parameters[:, :, k : 2 * k]
    weight = xp.softmax(parameters[:, :, 2 * k : 3 * k], 2)
    residual = xp.tanh(parameters[:, :, 3 * k : 3 * k + 1])
    # For a -> 0 the sinusoid has the limit x + d + c x. A frequency this small equals the limit to
    # round-off, and avoids 0 / 0 and denormal numbers in P / a.
    smallest = float(info.tiny) ** 0.5
    return Chain(
        frequency=xp.clip(xp.softplus(parameters[:, :, :k]), smallest, None),
        weight=weight,
        residual=residual,
        amplitude=largest_residual(min_slope, float(info.eps)) * residual * weight,
        cosine=-xp.cos(angle),
        sine=xp.sin(angle),
        shift=parameters[:, :, 3 * k + 1 :] if rest == 2 else None,
    )


class Sinusoid(NamedTuple):
    """One sinusoid, an increasing function."""

    a: Array  # (B, K, P)
    c: Array
    s: Array
    d: Array | None  # (B, 1, P)
    xp: SimpleNamespace

    def evaluate(self, x: Array, curvature: bool = False) -> tuple[Array, ...]:
        """Returns value, slope and, with ``curvature``, curvature."""
        a, c, s, d, xp = self
        waves = xp.waves(x, a)
        p, q = waves[:, : a.shape[1]], waves[:, a.shape[1] :]
        value = x + (xp.addcmul(c * p, s, q) / a).sum(1, keepdims=True)
        cosine = 1 - 2 * q
        slope = 1 + xp.addcmul(c * cosine, s, p, value=2.0).sum(1, keepdims=True)
        if d is not None:
            value = value + d
        if not curvature:
            return value, slope
        turned = xp.addcmul(s * cosine, c, p, value=-2.0)
        return value, slope, 2 * (a * turned).sum(1, keepdims=True)

    def _magnitude(self) -> Array:
        """Returns bounds of the magnitudes of the slope's components, with shape (B, K, P)."""
        return self.xp.hypot(self.c, self.s) * (1 + 4 * float(self.xp.finfo(self.c.dtype).eps))

    def bounds(self) -> tuple[Array, Array]:
        """Returns bounds of second and third derivative, with shape (B, 1, P)."""
        second = 2 * self.a * self._magnitude()
        third = 2 * self.a * second
        return second.sum(1, keepdims=True), third.sum(1, keepdims=True)

    def start(self, y: Array) -> Array:
        """Returns a first guess of the root."""
        return y if self.d is None else y - self.d

    def bracket(self, y: Array) -> tuple[Array, Array]:
        """Returns a lower and an upper bound of the root."""
        xp, magnitude = self.xp, self._magnitude()
        info = xp.finfo(y.dtype)
        alpha = magnitude.sum(1, keepdims=True)
        distance = (magnitude / self.a).sum(1, keepdims=True)
        # As f(0) = d and f' is in [1 - |alpha|, 1 + |alpha|], x is between ``near`` and ``far``.
        z = self.start(y)
        far = z / xp.clip(1 - alpha, float(info.tiny), None)
        near = z / (1 + alpha)
        distance = distance + 8 * float(info.eps) * (distance + abs(z))

        return (
            xp.maximum(xp.minimum(near, far), z - distance),
            xp.minimum(xp.maximum(near, far), z + distance),
        )

    def take(self, row: Array, column: Array) -> Sinusoid:
        """Returns the functions of selected numbers, given their indices, as a single row."""
        if self.a.shape[-1] == 1:
            column = column * 0
        a, c, s, d = (
            None if t is None else t[row, :, column].T[None]
            for t in (self.a, self.c, self.s, self.d)
        )
        return Sinusoid(a, c, s, d, self.xp)


def sinusoids(chain: Chain, xp: SimpleNamespace = PLAIN) -> list[Sinusoid]:
    """Returns the sinusoids of a chain."""
    c, s = chain.amplitude * chain.cosine, chain.amplitude * chain.sine
    return [
        Sinusoid(
            chain.frequency[m], c[m], s[m], None if chain.shift is None else chain.shift[m], xp
        )
        for m in range(len(c))
    ]
