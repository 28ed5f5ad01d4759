"""Simulation-based inference with sbi and with lampe, whose flows a Sinusoidal Flow replaces.

Neural posterior estimation (NPE) is run on two tasks, two moons (Greenberg et al., 2019) and SLCP
(Papamakarios et al., 2019), with Sinusoidal Flows and with zuko's spline flow, on the same
simulations. A table gives the mean log-posterior of held-out parameters, and the calibration: the
largest difference between credible levels and how often their regions hold the true parameters.
A picture of the latter, and JSON, are written to a folder.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
import zuko
from torch import Size, Tensor, nn
from tqdm import trange
from training import arguments, print_table
from zuko.lazy import Flow

from pyro_sinflow import SinusoidalFlow

Build = Callable[[int, int], Flow]
Pairs = tuple[Tensor, Tensor]  # parameters, with shape (N, D), and observations, with shape (N, L)


def two_moons(theta: Tensor) -> Tensor:
    """Observes a point on a half circle, whose place two parameters from -1 to 1 decide."""
    angle = math.pi * (torch.rand(len(theta)) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(len(theta))
    moon = torch.stack((radius * angle.cos() + 0.25, radius * angle.sin()), dim=1)
    place = torch.stack((-theta.sum(dim=1).abs(), theta[:, 1] - theta[:, 0]), dim=1)
    return moon + place / 2**0.5


def slcp(theta: Tensor) -> Tensor:
    """Observes four draws from a normal distribution in the plane, from five parameters."""
    mean, scale, rho = theta[:, :2], theta[:, 2:4].square(), theta[:, 4].tanh()
    noise = torch.randn(len(theta), 4, 2)
    second = rho[:, None] * noise[..., 0] + (1 - rho[:, None].square()).sqrt() * noise[..., 1]
    noise = torch.stack((noise[..., 0], second), dim=-1)
    return (mean[:, None] + scale[:, None] * noise).flatten(1)


class Task(NamedTuple):
    """A simulator, and its prior: uniform between plus and minus ``bound``."""

    simulate: Callable[[Tensor], Tensor]
    parameters: int
    bound: float

    def draw(self, n: int) -> Pairs:
        """Draws parameters, in units of their standard deviation, and observations."""
        theta = self.bound * (2 * torch.rand(n, self.parameters) - 1)
        return theta * 3**0.5 / self.bound, self.simulate(theta)


TASKS = {"two moons": Task(two_moons, 2, 1.0), "SLCP": Task(slcp, 5, 3.0)}


class Posterior(NamedTuple):
    """What both clients give, in one form."""

    log_prob: Callable[[Tensor, Tensor], Tensor]  # of (N, D) given (N, L), with shape (N)
    sample: Callable[[int, Tensor], Tensor]  # n times given (N, L), with shape (n, N, D)


def with_lampe(build: Build, pairs: Pairs, args: argparse.Namespace, name: str) -> Posterior:
    """Fits a flow by lampe, which takes its constructor."""
    from lampe.inference import NPE, NPELoss

    theta, x = pairs
    npe = NPE(theta.shape[1], x.shape[1], build=build)
    loss, optimiser = NPELoss(npe), torch.optim.Adam(npe.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, args.steps)
    for _ in trange(args.steps, desc=name):
        rows = torch.randint(len(x), (args.batch,))
        optimiser.zero_grad()
        loss(theta[rows], x[rows]).backward()
        nn.utils.clip_grad_norm_(npe.parameters(), 5.0)
        optimiser.step()
        schedule.step()
    return Posterior(lambda theta, x: npe(theta, x), lambda n, x: npe.flow(x).sample(Size([n])))


def with_sbi(build: Build, pairs: Pairs, args: argparse.Namespace, name: str) -> Posterior:
    """Fits a flow by sbi, whose class for zuko's flows holds any of them."""
    from sbi.inference import NPE
    from sbi.neural_nets.estimators import ZukoFlow

    def estimator(theta: Tensor, x: Tensor) -> ZukoFlow:
        flow = build(theta.shape[1], x.shape[1])
        return ZukoFlow(flow, nn.Identity(), theta.shape[1:], x.shape[1:])

    trainer = NPE(density_estimator=estimator, show_progress_bars=False).append_simulations(*pairs)
    epochs = math.ceil(args.steps * args.batch / len(pairs[0]))
    fitted = trainer.train(
        training_batch_size=args.batch, learning_rate=1e-3, max_num_epochs=epochs
    ).eval()
    return Posterior(
        lambda theta, x: fitted.log_prob(theta[None], x)[0],
        lambda n, x: fitted.sample(Size([n]), x),
    )


CLIENTS = {"lampe": with_lampe, "sbi": with_sbi}
SIZES: dict[str, Any] = {"hidden_features": (64, 64)}
FLOWS: dict[str, Build] = {
    "Sinusoidal, autoregressive": partial(
        SinusoidalFlow, transforms=3, conditioner="autoregressive", **SIZES
    ),
    "Sinusoidal, scale": partial(SinusoidalFlow, transforms=6, **SIZES),
    "NSF": partial(zuko.flows.NSF, transforms=3, **SIZES),
}


@torch.no_grad()
def ranks(posterior: Posterior, pairs: Pairs, n: int) -> Tensor:
    """Returns the credible level at which each posterior's region reaches the true parameters.

    They are uniform between 0 and 1 if the posterior is calibrated (Hermans et al., 2022).
    """
    theta, x = pairs
    samples = posterior.sample(n, x)
    density = torch.stack([posterior.log_prob(row, x) for row in samples])
    return (density > posterior.log_prob(theta, x)).float().mean(dim=0).sort().values


def main(argv: Sequence[str] | None = None) -> None:
    """Runs both tasks with the clients that are asked for."""
    parser = arguments(__doc__)
    parser.add_argument("--client", nargs="+", choices=CLIENTS, default=[*CLIENTS], help="clients")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--simulations", type=int, default=10_000, help="of each task (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=1500, help="of the optimiser (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=128, help="rows (default: %(default)s)")
    parser.add_argument("--tests", type=int, default=500, help="pairs (default: %(default)s)")
    args = parser.parse_args(argv)

    args.out.mkdir(parents=True, exist_ok=True)
    fig, axes = plt.subplots(
        len(args.client),
        len(TASKS),
        figsize=(8, 4 * len(args.client)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    results: dict[str, dict[str, float]] = {}
    for row, client in zip(axes, args.client, strict=True):
        for ax, (task_name, task) in zip(row, TASKS.items(), strict=True):
            torch.manual_seed(args.seed)
            theta, x = task.draw(args.simulations + args.tests)
            std, mean = torch.std_mean(x[args.tests :], dim=0)
            x = (x - mean) / std
            test, pairs = (
                (theta[: args.tests], x[: args.tests]),
                (theta[args.tests :], x[args.tests :]),
            )
            ax.axline((0, 0), slope=1, color="0.7")
            for flow, build in FLOWS.items():
                name = f"{client}, {task_name}, {flow}"
                torch.manual_seed(args.seed)
                posterior = CLIENTS[client](build, pairs, args, name)
                with torch.no_grad():
                    scores = posterior.log_prob(*test)
                levels = ranks(posterior, test, 256)
                coverage = torch.linspace(0, 1, len(levels))
                results[name] = {
                    "score": float(scores.mean()),
                    "error": float(scores.std()) / len(scores) ** 0.5,
                    "calibration": float((levels - coverage).abs().max()),
                }
                ax.plot(levels, coverage, label=flow)
            ax.set(title=f"{client}: {task_name}", xlabel="credible level", ylabel="coverage")
            ax.label_outer()
    axes[0, 0].legend()
    fig.savefig(args.out / "coverage.png", dpi=100)
    plt.close(fig)
    (args.out / "simulation.json").write_text(json.dumps(results, indent=2))
    print_table(
        ("client, task, flow", "log-posterior", "calibration"),
        [
            [name, f"{r['score']:.2f} ± {r['error']:.2f}", f"{r['calibration']:.3f}"]
            for name, r in results.items()
        ],
    )
    print("\nWritten to", args.out)


if __name__ == "__main__":
    main()
