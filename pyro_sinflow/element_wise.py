r"""Element-wise transforms: sinusoids and the inverse hyperbolic sine."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Size, Tensor

from . import _validate as check
from ._torch import can_branch_on
from .bijection import Bijection, at_least_float32
from .kernels import evaluate, invert
from .solvers import InversionWarning, Solver

FASTER = 10  # the factor of free locations and scales: each step moves them ten times as far


class SinusoidalChain(Bijection):
    """Composes M sinusoids, and evaluates them together.

    The unconstrained parameters have the layout of :mod:`pyro_sinflow.sinusoid`. They come from
    modules and are not checked.
    """

    def __init__(
        self, parameters: Tensor, min_slope: float = 1e-3, solver: Solver = Solver()
    ) -> None:
        super().__init__()

        self.packed = parameters
        self.min_slope = min_slope
        self.solver = solver

    def __repr__(self) -> str:
        *shape, m, size = self.packed.shape
        return (
            f"SinusoidalChain(sinusoids: {m}, components: {size // 3}, batch_shape: {tuple(shape)})"
        )

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return evaluate(x, self.packed, self.min_slope)

    def _inverse(self, y: Tensor) -> Tensor:
        return invert(y, self.packed, self.min_slope, self.solver)


class Asinh(Bijection):
    r"""Creates an element-wise transformation that compresses tails.

    .. math:: f(x) = \frac{\text{asinh}(b x)}{b}

    It is nearly the identity for :math:`|x| < 1 / b`, and logarithmic beyond.

    Args:
        parameter: The unconstrained b, with shape :math:`(*)`. b lies between 0.001 and 1; zero
            makes 0.3.
    """

    def __init__(self, parameter: Tensor) -> None:
        super().__init__()

        self.parameter = parameter

    def __repr__(self) -> str:
        return f"Asinh(batch_shape: {tuple(self.parameter.shape)})"

    def _b(self) -> Tensor:
        # At each use: a stored value would be out of date after a step of the optimizer, and its
        # graph freed by the first backward pass.
        u = math.log(0.3 / 0.7) + FASTER * at_least_float32(self.parameter)
        return 1e-3 + (1 - 1e-3) * u.sigmoid()

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b = self._b()
        bx = b * x
        # The hypotenuse does not overflow where the square of bx would.
        return bx.asinh() / b, -torch.hypot(bx.new_ones(()), bx).log()

    def _inverse(self, y: Tensor) -> Tensor:
        b = self._b()
        x = (b * y).sinh() / b
        if can_branch_on(x) and bool((lost := x.isinf() & y.isfinite()).any()):
            warnings.warn(
                f"The inverse of asinh leaves the range of {x.dtype} in {int(lost.sum())} of "
                f"{x.numel()} values: its inputs are far outside the range of the training data. "
                "tails=False or float64 may help.",
                InversionWarning,
                stacklevel=2,
            )
        return x


class SinusoidalTransform(Bijection):
    r"""Creates an element-wise monotone sinusoidal transformation.

    .. math:: f(x) = x + d - \alpha \sum_{k=1}^K w_k \frac{\cos(a_k x + 2 b_k) \sin(a_k x)}{a_k}

    with :math:`a = \text{softplus}(\text{frequency})`,
    :math:`w = \text{softmax}(\text{weight})` and
    :math:`\alpha = (1 - \epsilon) \tanh(\text{residual})`. Its slope lies in
    :math:`[1 - |\alpha|, 1 + |\alpha|]` and :math:`f(0) = d`. With ``residual = 0`` it is a shift.
    The scale of the tails is kept: :math:`|f(x) - x - d| \leq |\alpha| \sum_k w_k / a_k`.

    References:
        | Sinusoidal Flow: A Fast Invertible Autoregressive Flow (Wei, 2021), Eq. 12, 13 and 15
        | https://arxiv.org/abs/2110.13344

    Args:
        frequency: The unconstrained frequencies, with shape :math:`(*, K)`.
        phase: The phases :math:`b`, with shape :math:`(*, K)`.
        weight: The unconstrained weights, with shape :math:`(*, K)`.
        residual: The unconstrained residual weight, with shape :math:`(*)`.
        shift: The shift :math:`d`, with shape :math:`(*)`.
        min_slope: The smallest slope :math:`\epsilon`, in :math:`(0, 1)`. Values below 16 times the
            machine epsilon are raised to that.
        solver: How the inverse is computed.
        cache_size: Whether the latest pair (x, y) is kept (1) or not (0).

    Raises:
        TypeError: If a parameter is not a floating-point tensor, dtypes differ, ``min_slope`` is
            not a number, or ``solver`` is not a :class:`Solver`.
        ValueError: If shapes do not broadcast, there are no components, a tensor has NaN or
            infinite values, or ``min_slope`` or ``cache_size`` is out of range.

    Example:
        >>> t = SinusoidalTransform(*torch.randn(3, 2, 4), torch.randn(2), torch.randn(2))
        >>> t
        SinusoidalTransform(components: 4, batch_shape: (2,))
        >>> x = torch.randn(5, 2)
        >>> bool(torch.allclose(t.inv(t(x)), x, atol=1e-4))
        True
    """

    def __init__(
        self,
        frequency: Tensor,
        phase: Tensor,
        weight: Tensor,
        residual: Tensor,
        shift: Tensor,
        *,
        min_slope: float = 1e-3,
        solver: Solver = Solver(),
        cache_size: int = 0,
    ) -> None:
        vectors = {"frequency": frequency, "phase": phase, "weight": weight}
        tensors = {**vectors, "residual": residual, "shift": shift}
        for name, tensor in tensors.items():
            check.tensor(name, tensor)
            check.dtype(name, tensor, frequency.dtype)
        for name, tensor in vectors.items():
            shape = tensor.shape
            if not shape or shape[-1] == 0 or shape[-1] != frequency.shape[-1]:
                raise ValueError(
                    f"'{name}' should have shape (*, K), with the same K > 0 for 'frequency', "
                    f"'phase' and 'weight', got {tuple(shape)}."
                )
        shapes = {n: t.shape[:-1] if n in vectors else t.shape for n, t in tensors.items()}
        check.broadcast(**shapes)
        check.choice("cache_size", cache_size, (0, 1))
        super().__init__(cache_size=cache_size)

        self.frequency = frequency
        self.phase = phase
        self.weight = weight
        self.residual = residual
        self.shift = shift
        self.min_slope = check.real("min_slope", min_slope, 0.0, 1.0)
        self.solver = check.instance("solver", solver, Solver)

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.frequency, self.phase, self.weight, self.residual, self.shift

    @property
    def parameter_shape(self) -> Size:
        """The shape that the parameters broadcast to, without the components."""
        *vectors, residual, shift = self._tensors()
        return check.common_shape(*(t.shape[:-1] for t in vectors), residual.shape, shift.shape)

    def _chain(self) -> Tensor:
        """Returns the parameters as those of a chain of one sinusoid."""
        shape = self.parameter_shape
        *vectors, residual, shift = self._tensors()
        parts = [t.expand(*shape, t.shape[-1]) for t in vectors]
        parts += [t.expand(shape).unsqueeze(-1) for t in (residual, shift)]
        return at_least_float32(torch.cat(parts, dim=-1).unsqueeze(-2))

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return evaluate(x, self._chain(), self.min_slope)

    def _inverse(self, y: Tensor) -> Tensor:
        return invert(y, self._chain(), self.min_slope, self.solver)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(components: {self.frequency.shape[-1]}, "
            f"batch_shape: {tuple(self.parameter_shape)})"
        )

    def _checked(self, name: str, x: Any) -> Tensor:
        lifted = super()._checked(name, x)
        check.dtype(name, x, self.frequency.dtype)
        check.broadcast(**{name: x.shape, "parameters": self.parameter_shape})
        return lifted
