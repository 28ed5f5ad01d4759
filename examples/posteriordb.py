"""Compares guides on nine posteriors of posteriordb, for equal steps and equal processor time.

Each guide is fitted by SVI with all learning rates of a short list from the first seed. The other
seeds take the rate with the best ELBO. For each posterior and guide, the script prints means over
seeds of

- the ELBO,
- the largest and the mean error of a mean, in standard deviations of the reference,
- the largest and the mean error of the logarithm of a standard deviation,
- the Pareto k of importance sampling, which is reliable below 0.7, and its effective samples per
  second,
- the time of a step over that of AutoIAFNormal.

NUTS is run on two of the posteriors, with and without NeuTra. Finished fits are kept in the folder
'--out' and are not repeated.

The folder '--data-root' is a copy of stan-dev/posteriordb, or has its data as JSON and its draws as
arrays.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from posteriors import MODELS, Posterior, read
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
)
from pyro.infer.importance import psis_diagnostic, vectorized_importance_weights
from pyro.infer.reparam import NeuTraReparam
from pyro.ops.stats import effective_sample_size
from pyro.optim import ClippedAdam
from torch import Tensor
from training import arguments, positive, print_table, spread, tune, walk

from pyro_sinflow import AutoLDU

Model = Callable[[], None]
Fit = dict[str, Any]
Results = dict[tuple[str, str, str], list[Fit]]  # of posterior, guide and budget, for each seed
GUIDES: dict[str, Callable[[Model], AutoContinuous]] = {
    "AutoLDU": AutoLDU,
    "AutoIAFNormal": partial(AutoIAFNormal, hidden_dim=[64, 64], num_transforms=2),
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoDiagonalNormal": AutoDiagonalNormal,
    "AutoLaplaceApproximation": AutoLaplaceApproximation,
}
HARDEST = ("eight_schools-eight_schools_noncentered", "kidiq-kidscore_interaction")
SHOWN = ("AutoLDU", "AutoIAFNormal", "AutoMultivariateNormal")
LAST = 0.01  # the final learning rate, as a fraction of the initial one


def fit(
    model: Model, guide: AutoContinuous, lr: float, *, steps: int = 0, seconds: float = 0.0
) -> tuple[int, float]:
    """Fits a guide that has not been called yet by SVI, for some steps or some processor time.

    The time includes that of the first call. The learning rate falls exponentially.

    Returns:
        The number of steps, and their time without the first call.
    """
    loss = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, optimizer := ClippedAdam({"lr": lr}), loss)
    begin = time.process_time()
    guide()
    start, step, share = time.process_time(), 0, 0.0
    while share < 1:
        svi.step()
        step += 1
        now = time.process_time()
        share = step / steps if steps else (now - begin) / seconds
        for inner in optimizer.optim_objs.values():
            inner.param_groups[0]["lr"] = lr * LAST**share
    return step, now - start


def flatten(draws: dict[str, Tensor], sites: Sequence[str]) -> Tensor:
    """Returns the draws of some sites as rows."""
    return torch.cat([draws[site].reshape(len(draws[site]), -1) for site in sites], dim=1).double()


def score(posterior: Posterior, guide: AutoContinuous, draws: int) -> tuple[Fit, Tensor]:
    """Compares a fitted guide with the reference, and returns the results and its draws."""
    with torch.no_grad():
        k = float(psis_diagnostic(posterior.model, guide, num_particles=draws, max_plate_nesting=0))
        start = time.process_time()
        log_weights, trace, _ = vectorized_importance_weights(
            posterior.model, guide, num_samples=draws, max_plate_nesting=0, normalized=False
        )
    spent = time.process_time() - start
    log_weights = log_weights.double()
    weights = (log_weights - log_weights.max()).exp()
    sites = common_sites(posterior, trace.nodes)
    samples = flatten({site: trace.nodes[site]["value"] for site in sites}, sites)
    reference = flatten(posterior.draws, sites)
    std, mean = torch.std_mean(reference, dim=0)
    means = ((samples.mean(0) - mean) / std).abs()
    log_stds = (samples.std(0) / std).log().abs()
    result = {
        "elbo": float(log_weights.mean()),
        "error": float(log_weights.std()) / draws**0.5,
        "means": [float(means.max()), float(means.mean())],
        "log stds": [float(log_stds.max()), float(log_stds.mean())],
        "k": k,
        "effective per second": float(weights.sum().square() / weights.square().sum()) / spent,
    }
    return result, samples[:2000]


def common_sites(posterior: Posterior, sites: Any) -> list[str]:
    """Returns the sites of the reference that are in the model, too."""
    return [site for site in posterior.draws if site in sites]


def run_fit(
    name: str, guide: str, mode: str, rate: float, seed: int, args: argparse.Namespace
) -> Fit:
    """Returns the results of a fit, from its file if it exists."""
    stem = file_of(name, guide, mode, rate, seed, args)
    path = stem.with_suffix(".json")
    if path.exists():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    posterior = read(args.data_root, name)
    q = GUIDES[guide](posterior.model)
    budget = {mode: getattr(args, mode)}
    try:
        steps, spent = fit(posterior.model, q, rate, **budget)
        if isinstance(q, AutoLaplaceApproximation):  # so far, it has searched the mode
            q = q.laplace_approximation()
        result, samples = score(posterior, q, args.draws)
        if math.isnan(result["elbo"]):
            raise ValueError("The ELBO is NaN.")
    except (ValueError, torch.linalg.LinAlgError) as error:  # of a guide that has diverged
        result, samples = {"failed": str(error).partition("\n")[0]}, torch.empty(0)
    else:
        result |= {"steps": steps, "seconds": spent}
    result["rate"] = rate
    np.save(stem.with_suffix(".npy"), samples.float().numpy())
    path.write_text(json.dumps(result))
    return result


def file_of(
    name: str, guide: str, mode: str, rate: float, seed: int, args: argparse.Namespace
) -> Path:
    """Returns where the results of a fit are, without the suffix."""
    options = f"{mode}{getattr(args, mode):g}_lr{rate:g}_draws{args.draws}"
    # A dot would begin the suffix.
    return args.out / "fits" / f"{name}_{guide}_{options}_{seed}".replace(".", "-")


def fit_all(args: argparse.Namespace) -> Results:
    """Fits all guides to all posteriors, and returns the fits of the best rates for each seed."""
    keys = [(n, g, m) for n in args.only for g in args.guides for m in ("steps", "seconds")]
    return tune(partial(run_fit, args=args), keys, args.rates, args.seeds, elbo_of, args.jobs)


def elbo_of(fit: Fit) -> float:
    """Returns the ELBO of a fit, minus infinity if it has failed."""
    return fit.get("elbo", -math.inf)


def run_nuts(name: str, results: Results, args: argparse.Namespace) -> None:
    """Runs NUTS on a posterior, and in the noise space of fitted guides."""
    posterior = read(args.data_root, name)
    sites = list(posterior.draws)
    reference = flatten(posterior.draws, sites)
    std, mean = torch.std_mean(reference, dim=0)
    found = {}
    for method in ("NUTS", *(f"NeuTra, {guide}" for guide in neutra_guides(args))):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        if method == "NUTS":
            draws, gradients = walk(posterior.model, args.nuts)
        else:
            kind = method.removeprefix("NeuTra, ")
            guide = GUIDES[kind](posterior.model)
            rate = results[name, kind, "seconds"][0]["rate"]
            fit(posterior.model, guide, rate, seconds=args.seconds)
            neutra = NeuTraReparam(guide.requires_grad_(False))
            model = poutine.reparam(posterior.model, config=lambda _, n=neutra: n)
            noise, gradients = walk(model, args.nuts)
            (latent,) = noise.values()
            draws = {k: v.detach() for k, v in neutra.transform_sample(latent).items()}
        rows = flatten(draws, sites)
        found[method] = {
            "effective": float(effective_sample_size(rows.unsqueeze(0)).min()),
            "gradients": gradients,
            "means": float(((rows.mean(0) - mean) / std).abs().max()),
        }
    nuts_file(name, args).write_text(json.dumps(found))


def neutra_guides(args: argparse.Namespace) -> list[str]:
    """Returns the chosen guides that are flows, in whose noise space NUTS runs."""
    return [guide for guide in ("AutoLDU", "AutoIAFNormal") if guide in args.guides]


def nuts_file(name: str, args: argparse.Namespace) -> Path:
    """Returns the file of the results of NUTS."""
    rates = "_".join(f"{rate:g}" for rate in args.rates).replace(".", "-")
    options = [f"nuts{args.nuts}", f"seconds{args.seconds:g}", f"lr{rates}", *neutra_guides(args)]
    return args.out / "fits" / f"{name}_{'_'.join(options)}.json"


def margin(rows: Tensor) -> tuple[int, int]:
    """Returns the two columns with the strongest rank correlation of values or spreads."""
    ranks = rows.argsort(0).argsort(0).double()
    spreads = (ranks - ranks.mean(0)).abs()
    size = rows.shape[1]
    correlation = torch.cat((ranks, spreads), dim=1).T.corrcoef()[:size].abs()
    values, funnels = correlation.split(size, dim=1)
    dependence = torch.maximum(values, funnels).fill_diagonal_(0)
    return divmod(int(dependence.argmax()), size)


def picture(results: Results, args: argparse.Namespace) -> None:
    """Draws the hardest margin of each posterior, for the reference and guides of equal time."""
    names = [*dict.fromkeys(name for name, _, _ in results)]
    fig, axes = plt.subplots(
        len(names), len(SHOWN) + 1, figsize=(11, 2.2 * len(names)), layout="constrained"
    )
    for row, name in zip(np.atleast_2d(axes), names, strict=True):
        posterior = read(args.data_root, name)
        sites = common_sites(posterior, poutine.trace(posterior.model).get_trace().nodes)
        reference = flatten(posterior.draws, sites)
        labels = [
            f"{site}[{i}]" if posterior.draws[site].ndim > 1 else site
            for site in sites
            for i in range(posterior.draws[site][0].numel())
        ]
        positive = reference.min(0).values > 0
        i, j = margin(reference)
        clouds = {"reference": reference[:: max(len(reference) // 2000, 1)]}
        for guide in SHOWN:
            rate = results[name, guide, "seconds"][0]["rate"]
            clouds[guide] = torch.as_tensor(
                np.load(file_of(name, guide, "seconds", rate, 0, args).with_suffix(".npy"))
            )
        for ax, (title, cloud) in zip(row, clouds.items(), strict=True):
            if len(cloud):
                ax.plot(cloud[:, i], cloud[:, j], ".", markersize=1.5)
            for k, scale, limit in (
                (i, ax.set_xscale, ax.set_xlim),
                (j, ax.set_yscale, ax.set_ylim),
            ):
                low, high = reference[:, k].quantile(torch.tensor([0.001, 0.999]).double()).tolist()
                if positive[k] and high > 10 * low:
                    scale("log")
                    limit(low / 1.5, high * 1.5)
                else:
                    limit(low - 0.1 * (high - low), high + 0.1 * (high - low))
            ax.set_xlabel(labels[i])
            if name == names[0]:
                ax.set_title(title)
        row[0].set_ylabel(f"{posterior.name}\n{labels[j]}")
    fig.savefig(args.out / "posteriordb.png", dpi=80)
    plt.close(fig)


def mean_of(fits: list[Fit], key: str, at: int | None = None) -> float:
    """Returns the mean over seeds, and the worst value if a fit has failed."""
    if any("failed" in f for f in fits):
        return -math.inf if key == "elbo" else math.inf
    return float(np.mean([f[key] if at is None else f[key][at] for f in fits]))


def cells(fits: list[Fit]) -> list[str]:
    """Returns the cells of a table for the fits of one guide to one posterior."""
    if failed := [f for f in fits if "failed" in f]:
        return [f"{len(failed)} of {len(fits)} failed"] + 4 * ["-"]
    elbo, error = spread([f["elbo"] for f in fits], fits[0]["error"])
    return [
        f"{elbo:.2f} ± {error:.2f}",
        f"{mean_of(fits, 'means', 0):.2f} ({mean_of(fits, 'means', 1):.2f})",
        f"{mean_of(fits, 'log stds', 0):.2f} ({mean_of(fits, 'log stds', 1):.2f})",
        f"{mean_of(fits, 'k'):.2f}",
        f"{mean_of(fits, 'effective per second'):,.0f}",
    ]


def report(results: Results, args: argparse.Namespace) -> None:
    """Prints a table for each budget, and one that counts how often the aims are reached."""
    names = [*dict.fromkeys(name for name, _, _ in results)]
    unit = "AutoIAFNormal" if "AutoIAFNormal" in args.guides else args.guides[0]

    def per_step(name: str, guide: str, mode: str) -> float:
        fits = [f for f in results[name, guide, mode] if "failed" not in f]
        return min((f["seconds"] / f["steps"] for f in fits), default=math.inf)

    for mode in ("steps", "seconds"):
        rows, summary = [], []
        for name in names:
            for guide in args.guides:
                ratio = per_step(name, guide, mode) / per_step(name, unit, mode)
                fits = results[name, guide, mode]
                rate = f"{fits[0]['rate']:g}"
                rows.append([MODELS[name][0], guide, *cells(fits), f"{ratio:.2f}", rate])
        print(f"\nEqual {mode}: {getattr(args, mode):g}")
        print_table(
            (
                *("posterior", "guide", "ELBO", "means off", "log stds off", "k"),
                *("effective samples per second", "time per step", "learning rate"),
            ),
            rows,
        )
        for guide in args.guides:
            by_name = {name: results[name, guide, mode] for name in names}
            best = sum(
                mean_of(f, "elbo") == max(mean_of(results[n, g, mode], "elbo") for g in args.guides)
                for n, f in by_name.items()
            )
            close = sum(
                mean_of(f, "means", 0) < 0.1 and mean_of(f, "log stds", 0) < 0.1
                for f in by_name.values()
            )
            k = sum(mean_of(f, "k") < 0.7 for f in by_name.values())
            summary.append([guide, *(f"{n} of {len(names)}" for n in (best, close, k))])
        print_table(("guide", "best ELBO", "means and log stds within 0.1", "k < 0.7"), summary)


def main(argv: Sequence[str] | None = None) -> None:
    """Fits the guides, and prints tables."""
    parser = arguments(__doc__)
    parser.add_argument("--data-root", type=Path, required=True, help="folder with the data")
    parser.add_argument(
        "--only",
        nargs="*",
        default=list(MODELS),
        choices=list(MODELS),
        metavar="NAME",
        help="posteriors (default: all nine)",
    )
    parser.add_argument(
        "--guides",
        nargs="+",
        default=SHOWN,
        choices=GUIDES,
        help="guides (default: the first three)",
    )
    parser.add_argument("--seeds", type=positive, default=3, help="how many (default: %(default)s)")
    parser.add_argument(
        "--steps", type=positive, default=1000, help="of SVI (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="processor time of each fit (default: %(default)s)",
    )
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[1e-2, 3e-2, 1e-1],
        help="learning rates to try (default: 0.01 0.03 0.1)",
    )
    parser.add_argument(
        "--draws", type=positive, default=10_000, help="of each guide (default: %(default)s)"
    )
    parser.add_argument(
        "--nuts", type=int, default=400, help="draws by NUTS (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        default=1,
        help="fits at a time; times are comparable with one (default: %(default)s)",
    )
    args = parser.parse_args(argv)

    (args.out / "fits").mkdir(parents=True, exist_ok=True)
    results = fit_all(args)
    report(results, args)
    if set(SHOWN) <= set(args.guides):
        picture(results, args)
    report_nuts(results, args)
    print("\nWritten to", args.out)


def report_nuts(results: Results, args: argparse.Namespace) -> None:
    """Runs NUTS on the hardest posteriors, and prints its table."""
    rows = []
    for name in (n for n in HARDEST if n in args.only and args.nuts):
        if not nuts_file(name, args).exists():
            run_nuts(name, results, args)
        for method, r in json.loads(nuts_file(name, args).read_text()).items():
            per = 1000 * r["effective"] / r["gradients"]
            counts = [f"{r['gradients']:,}", f"{r['effective']:.0f}", f"{per:.1f}"]
            rows.append([MODELS[name][0], method, *counts, f"{r['means']:.2f}"])
    if rows:
        print_table(
            (
                *("posterior", "method", "gradients", "effective samples, worst parameter"),
                *("per 1,000 gradients", "means off"),
            ),
            rows,
        )


if __name__ == "__main__":
    main()
