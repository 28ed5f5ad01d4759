"""NeuTra on a funnel: effective sample sizes per gradient, compared with plain NUTS.

In Neal's funnel, the logarithm of a variance is normal with standard deviation 3, and nine numbers
are normal with that variance. NUTS runs on the funnel, or in the noise space of a fitted guide
(Hoffman et al., 2019). Gradients of the model are counted after the warm-up. The table is printed.
JSON and a picture are written to the folder '--out'.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import iterated
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormalizingFlow,
)
from pyro.infer.reparam import NeuTraReparam
from pyro.ops.stats import effective_sample_size
from torch import Tensor
from training import arguments, infer, positive, print_table, walk

from pyro_sinflow import ldu

SCALE, WIDTH = 3.0, 9


def funnel() -> None:
    """Samples the logarithm of a variance, and numbers with that variance."""
    v = pyro.sample("v", dist.Normal(0.0, SCALE))
    scale = (v / 2).exp().unsqueeze(-1)
    pyro.sample("x", dist.Normal(torch.zeros(WIDTH), scale).to_event(1))


GUIDES: dict[str, Callable[[], AutoContinuous]] = {
    "NeuTra, LDU blocks, scale": lambda: AutoNormalizingFlow(
        funnel, partial(iterated, 3, ldu, hidden_features=(32, 32))
    ),
    "NeuTra, AutoIAFNormal": lambda: AutoIAFNormal(funnel, hidden_dim=[32, 32], num_transforms=3),
    "NeuTra, AutoMultivariateNormal": lambda: AutoMultivariateNormal(funnel),
}


def fit_guide(name: str, guide: AutoContinuous, args: argparse.Namespace) -> AutoContinuous:
    """Fits a guide by SVI."""
    loss = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=0)
    infer(name, funnel, guide, loss, 1e-2, args.steps)
    return guide.requires_grad_(False)


def picture(draws: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Plots one of the numbers against the logarithm of the variance."""
    fig, axes = plt.subplots(
        1, len(draws), figsize=(13, 3.5), sharex=True, sharey=True, layout="constrained"
    )
    for ax, (name, samples) in zip(axes, draws.items(), strict=True):
        ax.plot(samples["x"][:, 0], samples["v"], ".", markersize=2)
        ax.axhspan(-2 * SCALE, 2 * SCALE, color="0.95")
        ax.set(title=name, xlabel="x", xlim=(-25, 25), ylim=(-10, 10))
    axes[0].set_ylabel("v, and 95 % of its distribution")
    fig.savefig(path, dpi=100)
    plt.close(fig)


def main(argv: Sequence[str] | None = None) -> None:
    """Samples from the funnel with and without guides."""
    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--steps", type=positive, default=2000, help="of SVI (default: %(default)s)"
    )
    parser.add_argument(
        "--draws",
        type=positive,
        default=500,
        help="draws of NUTS, after half as many of warm-up (default: %(default)s)",
    )
    args = parser.parse_args(argv)

    args.out.mkdir(parents=True, exist_ok=True)
    draws: dict[str, dict[str, Tensor]] = {}
    results: dict[str, dict[str, float]] = {}
    for name in ("NUTS", *GUIDES):
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        if name == "NUTS":
            start = time.perf_counter()
            samples, gradients = walk(funnel, args.draws)
        else:
            guide = fit_guide(name, GUIDES[name](), args)
            neutra = NeuTraReparam(guide)
            start = time.perf_counter()
            noise, gradients = walk(
                pyro.poutine.reparam(funnel, {"v": neutra, "x": neutra}), args.draws
            )
            samples = neutra.transform_sample(noise["v_shared_latent"])
        seconds = time.perf_counter() - start
        draws[name] = {site: value.detach() for site, value in samples.items()}
        sizes = [effective_sample_size(value.unsqueeze(0)).min() for value in draws[name].values()]
        results[name] = {
            "gradients": gradients,
            "size": float(min(sizes)),
            "std": float(draws[name]["v"].std()),
            "seconds": seconds,
        }
    picture(draws, args.out / "funnel.png")
    (args.out / "funnel.json").write_text(json.dumps(results, indent=2))
    unit = results["NUTS"]["size"] / results["NUTS"]["seconds"]
    print_table(
        (
            "method",
            "deviation of v",
            "gradients",
            "effective sample size",
            "per 1,000 gradients",
            "per second, NUTS = 1",
        ),
        [
            [
                name,
                f"{r['std']:.2f}",
                f"{r['gradients']:,.0f}",
                f"{r['size']:.0f}",
                f"{1000 * r['size'] / r['gradients']:.1f}",
                f"{r['size'] / r['seconds'] / unit:.2f}",
            ]
            for name, r in results.items()
        ],
    )
    print("\nWritten to", args.out)


if __name__ == "__main__":
    main()
