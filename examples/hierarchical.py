"""A hierarchical regression on real data, with guides from Pyro's AutoNormalizingFlow and others.

The progress of diabetes in 442 patients is regressed on their body mass index. Intercept and slope
vary by sex and age, in ten groups, around common values. Guides are fitted by SVI and compared with
draws of NUTS by the largest error of a mean, in standard deviations, and of a standard deviation.
The table is printed. JSON and a picture are written to the folder '--out'.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import iterated
from pyro.infer import MCMC, NUTS, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuide,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormalizingFlow,
)
from pyro.infer.importance import vectorized_importance_weights
from sklearn.datasets import load_diabetes
from torch import Tensor
from training import arguments, infer, positive, print_table

from pyro_sinflow import ldu

GROUPS = 10
Draws = dict[str, Tensor]


def read() -> tuple[Tensor, Tensor, Tensor]:
    """Returns group, body mass index and progress of each patient, the last two standardized."""
    rows, progress = load_diabetes(return_X_y=True)
    age, sex, bmi = rows[:, 0], rows[:, 1] > 0, rows[:, 2]
    fifth = np.searchsorted(np.quantile(age, [0.2, 0.4, 0.6, 0.8]), age)
    numbers = torch.as_tensor(np.stack((bmi, progress)), dtype=torch.float32)
    std, mean = torch.std_mean(numbers, dim=1, keepdim=True)
    return torch.as_tensor(5 * sex + fifth), *((numbers - mean) / std)


def model(group: Tensor, bmi: Tensor, progress: Tensor) -> None:
    """Regresses progress on the body mass index.

    If a spread of intercepts or slopes is small, ten numbers are nearly equal. The posterior is
    therefore a funnel.
    """
    center = pyro.sample("center", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(torch.ones(2)).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("groups", GROUPS, dim=-1):
        line = pyro.sample("line", dist.Normal(center, spread).to_event(1))
    with pyro.plate("patients", len(bmi), dim=-1):
        level, slope = line[..., group, :].unbind(-1)
        pyro.sample("progress", dist.Normal(level + slope * bmi, noise), obs=progress)


Data = tuple[Tensor, Tensor, Tensor]
GUIDES: dict[str, Callable[[], AutoGuide]] = {
    "LDU blocks, scale": lambda: AutoNormalizingFlow(
        model, partial(iterated, 3, ldu, hidden_features=(64, 64))
    ),
    "AutoIAFNormal": lambda: AutoIAFNormal(model, hidden_dim=[64, 64], num_transforms=3),
    "AutoMultivariateNormal": lambda: AutoMultivariateNormal(model),
    "AutoDiagonalNormal": lambda: AutoDiagonalNormal(model),
}


def fit_guide(
    name: str, guide: AutoGuide, data: Data, args: argparse.Namespace
) -> tuple[Draws, tuple[float, float]]:
    """Fits a guide by SVI, and returns draws and the ELBO with its standard error."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    loss = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    infer(name, model, guide, loss, 5e-3, args.steps, lambda: data)
    with torch.no_grad():
        weights, trace, _ = vectorized_importance_weights(
            model, guide, *data, num_samples=args.draws, max_plate_nesting=1, normalized=False
        )
    draws = {site: trace.nodes[site]["value"] for site in ("center", "spread", "noise", "line")}
    return draws, (float(weights.mean()), float(weights.std()) / len(weights) ** 0.5)


def run_nuts(data: Data, args: argparse.Namespace) -> Draws:
    """Samples from the posterior by NUTS."""
    pyro.set_rng_seed(args.seed)
    kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True, max_tree_depth=8)
    mcmc = MCMC(kernel, num_samples=args.nuts, warmup_steps=args.nuts // 2)
    mcmc.run(*data)
    return mcmc.get_samples()


def flatten(draws: Draws) -> Tensor:
    """Returns all parameters of the draws as rows, with logarithms of the positive ones."""
    parts = {k: v.log() if k in ("spread", "noise") else v for k, v in draws.items()}
    return torch.cat([parts[k].reshape(len(parts[k]), -1) for k in sorted(parts)], dim=1)


def picture(posteriors: dict[str, Draws], path: Path) -> None:
    """Plots the slope of a group against the logarithm of the spread of slopes."""
    fig, axes = plt.subplots(
        1, len(posteriors), figsize=(13, 3.2), sharex=True, sharey=True, layout="constrained"
    )
    for ax, (name, draws) in zip(axes, posteriors.items(), strict=True):
        spread = draws["spread"].reshape(-1, 2)[:, 1].log()
        slope = draws["line"].reshape(-1, GROUPS, 2)[:, 0, 1]
        ax.plot(spread[:1000], slope[:1000], ".", markersize=2)
        ax.set(title=name, xlabel="log spread of slopes", xlim=(-6, 1), ylim=(-0.5, 1.5))
    axes[0].set_ylabel("slope of the first group")
    fig.savefig(path, dpi=100)
    plt.close(fig)


def main(argv: Sequence[str] | None = None) -> None:
    """Fits all guides, and compares them with NUTS."""
    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--steps", type=positive, default=3000, help="of SVI (default: %(default)s)"
    )
    parser.add_argument(
        "--draws", type=positive, default=10_000, help="of each guide (default: %(default)s)"
    )
    parser.add_argument(
        "--nuts", type=positive, default=1000, help="draws by NUTS (default: %(default)s)"
    )
    args = parser.parse_args(argv)

    args.out.mkdir(parents=True, exist_ok=True)
    data = read()
    posteriors = {"NUTS": run_nuts(data, args)}
    std, mean = torch.std_mean(flatten(posteriors["NUTS"]), dim=0)
    results: dict[str, dict[str, Any]] = {}
    for name, make in GUIDES.items():
        posteriors[name], (elbo, error) = fit_guide(name, make(), data, args)
        s, m = torch.std_mean(flatten(posteriors[name]), dim=0)
        results[name] = {
            "elbo": elbo,
            "error": error,
            "mean": float(((m - mean) / std).abs().max()),
            "std": float((s / std - 1).abs().max()),
        }
    picture(posteriors, args.out / "hierarchical.png")
    (args.out / "hierarchical.json").write_text(json.dumps(results, indent=2))
    print_table(
        ("guide", "ELBO", "means off by up to", "deviations off by up to"),
        [
            [name, f"{r['elbo']:.2f} ± {r['error']:.2f}", f"{r['mean']:.2f}", f"{r['std']:.0%}"]
            for name, r in results.items()
        ],
    )
    print("\nWritten to", args.out)


if __name__ == "__main__":
    main()
