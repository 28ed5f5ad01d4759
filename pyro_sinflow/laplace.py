r"""Laplace approximations, from which guides start.

A Laplace approximation is a normal distribution around a mode of a density. Its covariance is the
inverse of the Hessian of the negative log-density.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Normal = tuple[Tensor, Tensor]  # location and lower triangular scale
LogDensity = Callable[[Tensor], Tensor]

_STEPS = 50  # of Newton's method
_GAIN = 0.01  # the gain of a step, in nats, below which the search stops
_DAMPING = 1e9  # the damping at which no step goes uphill
_DISTANCE = 0.1  # to the mode, in standard deviations
_ROWS = 16  # rows of a Hessian that are computed at a time, which bounds the memory
_POINTS = 32  # random points, of which the best are starts
_DRAWS = 32  # for the ELBO


def best_laplace(log_density: LogDensity, default: Normal, starts: int) -> Normal | None:
    """Returns the Laplace approximation with the highest ELBO, or None if the default's is higher.

    Args:
        log_density: The unnormalized log-density of a vector. A point where it raises an error or
            is not finite is not a mode. If it is random, there is no approximation.
        default: The location and the scale of a normal distribution.
        starts: The number of points from which modes are searched: the location of the default, and
            those of several random points where the density is highest.
    """
    loc, _ = default
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")  # Pyro warns of densities that are not finite
        if _is_random(log_density, loc):
            return None
        points = loc.new_empty(_POINTS, len(loc)).uniform_(-2, 2)
        values = torch.tensor([_value(log_density, x) for x in points])
        highest = values.nan_to_num(-math.inf).argsort(descending=True)[: starts - 1]
        found = [approximate(log_density, x) for x in (loc, *points[highest])]
        noise = torch.randn(_DRAWS, len(loc), dtype=loc.dtype, device=loc.device)
        best, score = None, elbo(log_density, default, noise)
        for normal in found:
            if normal is not None and (new := elbo(log_density, normal, noise)) > score:
                best, score = normal, new
    return best


def elbo(log_density: LogDensity, normal: Normal, noise: Tensor) -> float:
    """Returns the ELBO of a normal distribution, up to a constant, from draws of standard noise."""
    loc, scale = normal
    values = [_value(log_density, z) for z in loc + noise @ scale.mT]
    score = sum(values) / len(values) + float(scale.diagonal().log().sum())
    return score if math.isfinite(score) else -math.inf


def approximate(log_density: LogDensity, x: Tensor) -> Normal | None:
    r"""Returns the Laplace approximation at the mode that Newton's method finds from x.

    A step along an eigenvector of the Hessian is :math:`g / (|\lambda| + \mu)`, for the gradient g
    and the eigenvalue :math:`\lambda`. It goes uphill at saddle points, too. The damping
    :math:`\mu` grows until a step does not go downhill, and falls afterwards.

    Returns:
        Location and scale, or :py:`None` if no mode is found.
    """
    damping, value = 1.0, _value(log_density, x)
    for _ in range(_STEPS):
        if (quadratic := _Quadratic.at(log_density, x)) is None:
            return None
        while True:
            new = x + quadratic.step(damping).to(x)
            if (new_value := _value(log_density, new)) >= value:  # NaN is not
                break
            damping *= 8
            if damping > _DAMPING:
                return quadratic.normal(x)
        gain, x, value, damping = new_value - value, new, new_value, damping / 8
        if gain < _GAIN and damping < 1 and quadratic.eigenvalues.min() > 0:
            break
    quadratic = _Quadratic.at(log_density, x)
    return None if quadratic is None else quadratic.normal(x)


def _is_random(log_density: LogDensity, x: Tensor) -> bool:
    """Whether a log-density draws random numbers, or changes from one evaluation to the next."""

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(x.device)] if x.is_cuda else [])]

    before = states()
    first, second = _value(log_density, x), _value(log_density, x)
    drawn = not all(map(torch.equal, before, states()))
    return drawn or abs(first - second) > 1e-5 * (1 + abs(first))  # sums on a GPU may vary


def _value(log_density: LogDensity, x: Tensor) -> float:
    """Returns the log-density, or NaN where there is none."""
    try:
        return float(log_density(x))
    except Exception:  # the model has run elsewhere, so it has no density here
        return math.nan


class _Quadratic(NamedTuple):
    """A quadratic approximation of a log-density, in units in which the Hessian's diagonal is 1."""

    unit: Tensor
    gradient: Tensor  # in the basis of the eigenvectors
    eigenvalues: Tensor  # of the negative Hessian
    eigenvectors: Tensor

    @classmethod
    def at(cls, log_density: LogDensity, x: Tensor) -> _Quadratic | None:
        """Returns the approximation at x, or None if the log-density has no derivatives there."""
        x = x.detach().clone().requires_grad_()  # not a tensor of the inference mode
        eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
        try:
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(log_density(x), x, create_graph=True)
                rows = [
                    torch.autograd.grad(
                        gradient, x, part, True, is_grads_batched=True, materialize_grads=True
                    )[0]
                    for part in eye.split(_ROWS)
                ]
            hessian = -torch.cat(rows).detach().cpu().double()
            unit = hessian.diagonal().abs().rsqrt()
            unit = unit.where(unit.isfinite(), 1.0)
            hessian = unit[:, None] * hessian * unit
            values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
        except Exception:  # some densities cannot be differentiated twice
            return None
        gradient = vectors.mT @ (unit * gradient.detach().cpu().double())
        if not bool(values.isfinite().all() & gradient.isfinite().all()):
            return None
        return cls(unit, gradient, values, vectors)

    def step(self, damping: float) -> Tensor:
        """Returns a damped step of Newton's method."""
        return self.unit * (
            self.eigenvectors @ (self.gradient / (self.eigenvalues.abs() + damping))
        )

    def normal(self, x: Tensor) -> Normal | None:
        """Returns the Laplace approximation if x is close to a mode, in standard deviations."""
        if self.eigenvalues.min() <= 8 * torch.finfo(x.dtype).eps:
            return None
        if (self.gradient.square() / self.eigenvalues).sum() > _DISTANCE**2:
            return None
        root = self.unit[:, None] * self.eigenvectors / self.eigenvalues.sqrt()
        scale, failed = torch.linalg.cholesky_ex(root @ root.mT)
        return None if failed else (x.detach() + self.step(0.0).to(x), scale.to(x))
