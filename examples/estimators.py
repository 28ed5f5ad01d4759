"""Neural posterior estimation (NPE) with a flow: by a plain loop, by lampe and by sbi."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import zuko
from simulators import Pairs
from torch import Size, Tensor, nn
from torch.distributions import AffineTransform, ComposeTransform, SigmoidTransform, Transform
from zuko.lazy import Flow

from pyro_sinflow import SinusoidalFlow

Build = Callable[[int, int], Flow]

SIZES: dict[str, Any] = {"hidden_features": (64, 64)}
FLOWS: dict[str, Build] = {
    "Sinusoidal, default": SinusoidalFlow,
    "Sinusoidal, independent": partial(SinusoidalFlow, conditioner="independent"),
    "NSF": partial(zuko.flows.NSF, transforms=3, **SIZES),
}


@dataclass(frozen=True)
class Budget:
    """The options of a fit.

    Args:
        steps: The largest number of steps of the optimizer, Adam.
        epochs: The largest number of passes over the simulations.
        batch: The number of simulations in a step.
        lr: The initial learning rate. It falls to zero along a cosine.
        patience: The number of passes without a better validation score after which the fit stops.
        validation: The fraction of the simulations for validation.
        clip: The largest norm of a gradient; longer ones are scaled down to it.
    """

    steps: int = 5000
    epochs: int = 100
    batch: int = 128
    lr: float = 1e-3
    patience: int = 20
    validation: float = 0.1
    clip: float = 5.0


@dataclass(frozen=True)
class Units:
    """The encoding of parameters and observations for a flow.

    Args:
        bound: The prior is uniform between plus and minus this.
        real: Whether the flow is fitted to the logits of the parameters, which are unbounded.
        mean: The mean of the observations.
        std: Their standard deviation.
    """

    bound: float
    real: bool
    mean: Tensor
    std: Tensor

    @property
    def transform(self) -> Transform:
        """The map to parameters with zero mean and unit variance under the prior."""
        if not self.real:
            return AffineTransform(0.0, 3**0.5 / self.bound)
        share = AffineTransform(0.5, 0.5 / self.bound)
        logit = SigmoidTransform().inv
        return ComposeTransform([share, logit, AffineTransform(0.0, 3**0.5 / math.pi)])

    def encode(self, theta: Tensor, x: Tensor) -> Pairs:
        """Returns parameters and observations in the flow's units."""
        edge = self.bound * (1 - 1e-6)
        return self.transform(theta.clamp(-edge, edge)), (x - self.mean) / self.std

    def decode(self, z: Tensor) -> Tensor:
        """Returns parameters in their own units."""
        return self.transform.inv(z)

    def log_scale(self, theta: Tensor) -> Tensor:
        """Returns the log-determinant of the encoding, over standard deviations of the prior."""
        edge = self.bound * (1 - 1e-6)
        theta = theta.clamp(-edge, edge)
        unit = math.log(3**0.5 / self.bound)
        jacobian = self.transform.log_abs_det_jacobian(theta, self.transform(theta))
        return (jacobian - unit).expand_as(theta).sum(dim=-1)


@dataclass(frozen=True)
class Posterior:
    """A fitted flow, with the same interface for all clients.

    Args:
        score: The log-density of encoded parameters (N, D) given observations (N, L).
        draw: Draws n encoded parameters given observations (N, L), with shape (n, N, D).
        units: The encoding.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    draw: Callable[[int, Tensor], Tensor]
    units: Units

    @torch.no_grad()
    def log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
        """Returns the log-density, with shape (N), in standard deviations of the prior."""
        return self.score(*self.units.encode(theta, x)) + self.units.log_scale(theta)

    @torch.no_grad()
    def sample(self, n: int, x: Tensor) -> Tensor:
        """Draws n samples given observations (N, L), inside and outside the prior's bounds."""
        return self.units.decode(self.draw(n, (x - self.units.mean) / self.units.std))

    def inside(self, theta: Tensor) -> Tensor:
        """Whether parameters are inside the prior's bounds."""
        return (theta.abs() <= self.units.bound).all(dim=-1)

    def accepted(self, n: int, x: Tensor, rounds: int = 200) -> Tensor:
        """Draws n samples inside the prior's bounds, by rejection, given one observation (L).

        Raises:
            RuntimeError: If too few draws are in the prior's bounds.
        """
        parts: list[Tensor] = []
        for _ in range(rounds):
            theta = self.sample(n, x[None])[:, 0]
            parts.append(theta[self.inside(theta)])
            if sum(map(len, parts)) >= n:
                return torch.cat(parts)[:n]
        raise RuntimeError(
            f"Of {rounds * n} draws, {n} should be in the prior's bounds, got "
            f"{sum(map(len, parts))}: train for longer."
        )


def train(
    score: Callable[[Tensor, Tensor], Tensor], module: nn.Module, pairs: Pairs, budget: Budget
) -> int:
    """Fits a module by maximum likelihood, and leaves it with the weights that validated best.

    Args:
        score: The log-density of encoded parameters (N, D) given observations (N, L).
        module: The module.
        pairs: Encoded parameters and observations. The last of them are for validation.
        budget: The options of the fit.

    Returns:
        The number of epochs.
    """
    held = max(int(budget.validation * len(pairs[0])), 1)
    (theta, theta_v), (x, x_v) = (p.split([len(p) - held, held]) for p in pairs)
    per_epoch = math.ceil(len(x) / budget.batch)
    epochs = min(budget.epochs, math.ceil(budget.steps / per_epoch))
    optimizer = torch.optim.Adam(module.parameters(), budget.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    best, best_epoch, weights = -math.inf, 0, copy.deepcopy(module.state_dict())
    for epoch in range(1, epochs + 1):
        module.train()
        for rows in torch.randperm(len(x)).split(budget.batch):
            optimizer.zero_grad()
            (-score(theta[rows], x[rows]).mean()).backward()
            nn.utils.clip_grad_norm_(module.parameters(), budget.clip)
            optimizer.step()
            schedule.step()
        module.eval()
        with torch.no_grad():
            value = float(score(theta_v, x_v).mean())
        if value > best:
            best, best_epoch, weights = value, epoch, copy.deepcopy(module.state_dict())
        if epoch - best_epoch >= budget.patience:
            break
    module.load_state_dict(weights)
    module.eval()
    return epoch


def with_zuko(build: Build, pairs: Pairs, units: Units, budget: Budget) -> Posterior:
    """Fits a flow by a plain loop."""
    theta, x = units.encode(*pairs)
    flow = build(theta.shape[1], x.shape[1])

    def score(theta: Tensor, x: Tensor) -> Tensor:
        return flow(x).log_prob(theta)

    train(score, flow, (theta, x), budget)
    return Posterior(score, lambda n, x: flow(x).sample(Size([n])), units)


def with_lampe(build: Build, pairs: Pairs, units: Units, budget: Budget) -> Posterior:
    """Fits a flow by lampe."""
    from lampe.inference import NPE

    theta, x = units.encode(*pairs)
    npe = NPE(theta.shape[1], x.shape[1], build=build)
    train(npe, npe, (theta, x), budget)
    return Posterior(npe, lambda n, x: npe.flow(x).sample(Size([n])), units)


def with_sbi(build: Build, pairs: Pairs, units: Units, budget: Budget) -> Posterior:
    """Fits a flow by sbi."""
    from sbi.inference import NPE
    from sbi.neural_nets.estimators import ZukoFlow

    def estimator(theta: Tensor, x: Tensor) -> ZukoFlow:
        flow = build(theta.shape[1], x.shape[1])
        return ZukoFlow(flow, nn.Identity(), theta.shape[1:], x.shape[1:])

    trainer = NPE(density_estimator=estimator, show_progress_bars=False)
    fitted = trainer.append_simulations(*units.encode(*pairs)).train(
        training_batch_size=budget.batch,
        learning_rate=budget.lr,
        validation_fraction=budget.validation,
        stop_after_epochs=budget.patience,
        max_num_epochs=budget.epochs,
        clip_max_norm=budget.clip,
    )
    fitted.eval()
    return Posterior(
        lambda theta, x: fitted.log_prob(theta[None], x)[0],
        lambda n, x: fitted.sample(Size([n]), x),
        units,
    )


CLIENTS = {"zuko": with_zuko, "lampe": with_lampe, "sbi": with_sbi}
