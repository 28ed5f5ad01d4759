"""The package at work on real data, in two parts.

Part 1 fits guides to the eight-schools model by stochastic variational inference and compares their
posteriors with that of NUTS. Part 2 fits flows to patches of photographs under one budget and
compares their held-out log-likelihoods. The pictures are written to a folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
import zuko
from data import Data, patches
from pyro.infer import MCMC, NUTS, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal
from pyro.infer.importance import vectorized_importance_weights
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor, nn
from training import Budget, arguments, count, evaluate, fit, infer, positive, print_table
from zuko.lazy import Flow

from pyro_sinflow import AutoLDU, SinusoidalFlow

# Part 1: a guide

# Rubin (1981): the effect of coaching on test scores in eight schools, and its standard error.
EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


class Posterior(NamedTuple):
    """Draws from a posterior of the eight schools."""

    mu: Tensor
    tau: Tensor
    theta: Tensor  # with shape (N, 8)
    elbo: tuple[float, float] | None = None  # mean and standard error

    def row(self) -> list[str]:
        """Formats means and standard deviations, and the evidence lower bound."""
        columns = (self.mu, self.tau, self.tau.log(), self.theta[:, 0], self.theta[:, 2])
        moments = [f"{x.mean():.1f} ± {x.std():.1f}" for x in columns]
        return [*moments, "{:.3f} ± {:.3f}".format(*self.elbo) if self.elbo else ""]


def schools() -> None:
    """The centered model.

    Where tau is small, all theta are close to mu. The posterior is therefore a funnel, far from any
    normal distribution.
    """
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, ERROR), obs=EFFECT)


def log_evidence() -> float:
    """Returns the log-evidence: mu and theta are integrated in closed form, tau by quadrature."""
    log_tau = torch.linspace(-12, 8, 20_001)
    tau = log_tau.exp()
    covariance = torch.diag_embed(ERROR**2 + tau[:, None] ** 2) + 5.0**2
    likelihood = dist.MultivariateNormal(torch.zeros(8), covariance).log_prob(EFFECT)
    integrand = likelihood + dist.HalfCauchy(5.0).log_prob(tau) + log_tau
    return float(integrand.logsumexp(dim=0) + (log_tau[1] - log_tau[0]).log())


def fit_guide(name: str, guide: AutoGuide, lr: float, steps: int, draws: int = 20_000) -> Posterior:
    """Fits a guide by SVI, and draws from it."""
    pyro.clear_param_store()
    loss = Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=1)
    infer(name, schools, guide, loss, lr, steps, last=0.05)
    with torch.no_grad():
        # The mean log-weight is the evidence lower bound.
        weights, trace, _ = vectorized_importance_weights(
            schools, guide, num_samples=draws, max_plate_nesting=1, normalized=False
        )
    mu, tau, theta = (trace.nodes[site]["value"].squeeze() for site in ("mu", "tau", "theta"))
    return Posterior(mu, tau, theta, (float(weights.mean()), float(weights.std()) / draws**0.5))


def run_nuts(warmup: int, draws: int) -> Posterior:
    """Draws from the posterior by NUTS.

    The model is non-centered, theta = mu + tau * eta, because NUTS gets stuck in a funnel.
    """
    model = pyro.poutine.reparam(schools, config={"theta": LocScaleReparam(0.0)})
    kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True)
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=warmup)
    mcmc.run()
    samples = mcmc.get_samples()
    mu, tau, eta = (samples[site] for site in ("mu", "tau", "theta_decentered"))
    return Posterior(mu, tau, mu[:, None] + tau[:, None] * eta)


def draw_funnel(posteriors: dict[str, Posterior], path: Path) -> None:
    """Draws the effect in school A against log(tau), one panel for each posterior."""
    fig, axes = plt.subplots(
        1, len(posteriors), figsize=(11, 4.2), sharex=True, sharey=True, layout="constrained"
    )
    reference = posteriors["NUTS"]
    for ax, (name, p) in zip(axes, posteriors.items(), strict=True):
        if p is not reference:
            ax.scatter(reference.theta[:, 0], reference.tau.log(), s=4, color="0.75", label="NUTS")
        ax.scatter(p.theta[:1000, 0], p.tau[:1000].log(), s=4, alpha=0.6, color="C0", label=name)
        elbo = f"\nELBO {p.elbo[0]:.2f}" if p.elbo else "\nreference"
        ax.set(title=name + elbo, xlabel="effect in school A", xlim=(-25, 40), ylim=(-4, 4))
        ax.legend(loc="lower right", markerscale=3)
    axes[0].set_ylabel("log of the spread between schools, log τ")
    fig.suptitle("Eight schools: does the guide find the funnel of the posterior?")
    fig.savefig(path, dpi=100)
    plt.close(fig)


def guides(steps: int, draws: int, out: Path) -> Path:
    """Part 1: fits guides to the eight schools, prints the table, and draws the picture."""
    print("\nPart 1: the posterior of the eight schools", flush=True)
    normal = AutoMultivariateNormal(schools, init_scale=1.0)
    posteriors = {
        "NUTS": run_nuts(draws // 3, draws),
        "LDU guide": fit_guide("LDU guide", AutoLDU(schools), 2e-2, steps),
        # Its steps take a third of the time, so it gets three times as many.
        "Normal guide": fit_guide("Normal guide", normal, 1e-1, 3 * steps),
    }
    print_table(
        ("posterior", "mu", "tau", "log tau", "theta A", "theta C", "ELBO"),
        ([name, *p.row()] for name, p in posteriors.items()),
    )
    print(f"\nThe ELBO of the exact posterior, the log-evidence, is {log_evidence():.3f}.")
    path = out / "eight_schools.png"
    draw_funnel(posteriors, path)
    return path


# Part 2: a density


class Fit(NamedTuple):
    """The results of a fitted flow."""

    score: float  # mean log-likelihood of the test rows, in nats
    error: float  # its standard error
    parameters: int
    cost: float  # time of samples over that of as many log-densities
    samples: Tensor

    def row(self) -> list[str]:
        """Formats the numbers."""
        return [f"{self.score:.2f} ± {self.error:.2f}", f"{self.parameters:,}", f"{self.cost:.1f}"]


def duration(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Times a function."""
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def fit_flow(name: str, flow: Flow, data: Data, steps: int) -> Fit:
    """Fits a flow, scores it, and times its samples."""
    fit(name, flow, data, Budget(steps))
    with torch.no_grad():
        scoring, _ = duration(lambda: flow().log_prob(data.test[:1000]))
        sampling, samples = duration(lambda: flow().sample((1000,)))
    return Fit(*evaluate(flow, data.test), count(flow), sampling / scoring, samples)


def mosaic(x: Tensor, rows: int = 8) -> Tensor:
    """Arranges patches of 63 pixels in a square, and scales each to the same contrast."""
    x = x[: rows * rows]
    x = torch.cat((x, -x.sum(dim=1, keepdim=True)), dim=1)  # the mean of a patch is zero
    x = x / (2 * x.std(dim=1, keepdim=True))
    x = nn.functional.pad(x.reshape(rows, rows, 8, 8), (1, 1, 1, 1), value=1.0)
    return x.transpose(1, 2).reshape(rows * 10, rows * 10)


def draw_patches(data: Data, fits: dict[str, Fit], path: Path) -> None:
    """Draws held-out patches and samples of the flows."""
    panels = {"Held-out photograph": data.test[torch.randperm(len(data.test))]}
    panels |= {f"{name}\n{fit.score:.1f} nats": fit.samples for name, fit in fits.items()}
    fig, axes = plt.subplots(1, len(panels), figsize=(3 * len(panels), 3.8), layout="constrained")
    for ax, (title, rows) in zip(axes, panels.items(), strict=True):
        ax.imshow(mosaic(data.restore(rows)), cmap="gray", vmin=-1, vmax=1)
        ax.set_title(title)
        ax.axis("off")
    fig.suptitle("8 × 8 patches of photographs, and samples of the flows that learned them")
    fig.savefig(path, dpi=100)
    plt.close(fig)


def densities(steps: int, out: Path) -> Path:
    """Part 2: fits flows to patches, prints the table, and draws the picture."""
    print("\nPart 2: the density of patches of photographs", flush=True)
    data = patches()
    features = data.train.shape[1]
    options = {"hidden_features": (64, 64), "activation": nn.ELU}
    flows: dict[str, Callable[[], Flow]] = {
        "SinusoidalFlow": lambda: SinusoidalFlow(features, **options),
        "SinusoidalFlow, LDU blocks": lambda: SinusoidalFlow(
            features, conditioner="independent", **options
        ),
        "NSF": lambda: zuko.flows.NSF(features, transforms=3, **options),
        "MAF": lambda: zuko.flows.MAF(features, transforms=6, **options),
    }
    fits = {name: fit_flow(name, make(), data, steps) for name, make in flows.items()}
    print_table(
        ("flow", "test log-likelihood", "parameters", "sampling cost"),
        ([name, *fit.row()] for name, fit in fits.items()),
    )
    print(
        "\nLog-likelihood in nats, of standardized features. The cost of 1,000 samples, in "
        "evaluations\nof the density of as many rows."
    )
    path = out / "patches.png"
    draw_patches(data, fits, path)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Runs both parts."""
    parser = arguments(__doc__, "folder for the pictures")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--guide-steps", type=positive, default=1000, help="SVI steps (default: %(default)s)"
    )
    parser.add_argument(
        "--draws", type=positive, default=900, help="draws of NUTS (default: %(default)s)"
    )
    parser.add_argument(
        "--flow-steps", type=positive, default=500, help="steps of each flow (default: %(default)s)"
    )
    args = parser.parse_args(argv)

    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    pictures = [
        guides(args.guide_steps, args.draws, args.out),
        densities(args.flow_steps, args.out),
    ]
    print("\nWritten:", *pictures)


if __name__ == "__main__":
    main()
