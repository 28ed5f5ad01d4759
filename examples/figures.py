"""Figures 2, 3 and 4 of the paper (Wei, 2021).

Figure 2 is one sinusoid. Figure 3 fits sinusoids, and affine maps, to a mixture of seven normal
distributions. Figure 4 fits flows to eight densities in the plane. Tables are printed. JSON,
pictures and checkpoints are written to the folder '--out'. An interrupted run continues if it is
started again with the same options.
"""

from __future__ import annotations

import argparse
import json
import timeit
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.distributions as dist
import zuko
from data import TOYS, Data, standardize, toy
from torch import Tensor, nn
from training import Budget, arguments, count, evaluate, fit, positive, print_table
from zuko.lazy import Flow

from pyro_sinflow import SinusoidalFlow, SinusoidalTransform

Results = dict[str, Any]
Flows = dict[str, Callable[[], Flow]]


def train(
    name: str, make: Callable[[], Flow], data: Data, budget: Budget, args: argparse.Namespace
) -> Flow:
    """Fits a flow from the same random state, whichever flows were fitted before."""
    torch.manual_seed(args.seed)
    return fit(name, make(), data, budget, args.out / f"{name}, seed {args.seed}.pt")


# Figure 2


def staircase(args: argparse.Namespace) -> Results:
    """Draws τ(x) = x - 0.8 [0.5 sin(2x + 1) + 0.3 sin(-0.1x) + 0.2 sin(0.7x - 3)]."""
    # A component with weight w contributes w / 2a times sin(2ax + 2b), and sin(-0.1x) is the sine
    # of 0.1x + π.
    a, b = torch.tensor([1.0, 0.05, 0.35]), torch.tensor([0.5, torch.pi / 2, -1.5])
    weight = 2 * a * torch.tensor([0.5, 0.3, 0.2])
    residual = torch.atanh(0.8 * weight.sum() / (1 - 1e-3))
    t = SinusoidalTransform(a.expm1().log(), b, weight.log(), residual, torch.zeros(()))
    x = torch.linspace(-10, 10, 1001)
    y, ladj = t.call_and_ladj(x)
    slope = ladj.exp()

    fig, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    axes[0].plot(x, x, color="0.7", label="the diagonal")
    axes[0].plot(x, y, label="τ(x)")
    axes[1].axhline(0, color="0.7")
    axes[1].plot(x, slope, color="C1", label="τ′(x)")
    for ax in axes:
        ax.set_xlabel("x")
        ax.legend(loc="upper left")
    fig.suptitle("A sinusoid and its slope, which is positive everywhere")
    fig.savefig(args.out / "staircase.png", dpi=100)
    plt.close(fig)
    return {"least slope": float(slope.min()), "greatest slope": float(slope.max())}


# Figure 3

LINES: Flows = {
    # With one feature, L and U shift by a constant.
    "D-scales": lambda: SinusoidalFlow(
        1, transforms=1, conditioner="independent", linear=False, tails=False, sinusoids=32
    ),
    "MAF": lambda: zuko.flows.MAF(1),
}


def mixture(args: argparse.Namespace) -> Results:
    """Fits sinusoids, and affine maps, to seven well separated normal distributions."""
    torch.manual_seed(args.seed)
    modes = dist.Normal(torch.linspace(-3, 3, 7), torch.full((7,), 0.125))
    truth = dist.MixtureSameFamily(dist.Categorical(torch.ones(7)), modes)
    rows = truth.sample((100_000, 1)).numpy()
    data = standardize(rows[:60_000], rows[60_000:80_000], rows[80_000:])

    x = torch.linspace(-4, 4, 2001)
    p = modes.cdf(x[:, None]).mean(dim=1)
    z = dist.Normal(0.0, 1.0).icdf(p.where((p > 1e-3) & (p < 1 - 1e-3), torch.nan))
    unit = float(data.std.log())  # log-determinant of the standardization
    scores = truth.log_prob(data.restore(data.test)) + unit
    error = float(scores.std()) / len(scores) ** 0.5
    results = {"truth": {"score": float(scores.mean()), "error": error}}

    budget = Budget(2 * args.steps, args.batch, lr=1e-2)
    fig, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    for column, (name, make) in zip(axes.T, LINES.items(), strict=True):
        flow = train(f"mixture, {name}", make, data, budget, args)
        score, error = evaluate(flow, data.test)
        results[name] = {"score": score, "error": error}
        with torch.no_grad():
            u = (x[:, None] - data.mean) / data.std
            density, image = (flow().log_prob(u) - unit).exp(), flow().transform(u)
        column[0].plot(x, truth.log_prob(x).exp(), color="0.75", lw=5, label="truth")
        column[0].plot(x, density, label=name)
        column[0].set(title=f"{name}: {score:.2f} nats", ylabel="density", ylim=(0, 0.55))
        column[1].plot(x, z, color="0.75", lw=5, label="truth")
        column[1].plot(x, image, label=name)
        column[1].set(xlabel="x", ylabel="image under the map", ylim=(-4, 4))
        for ax in column:
            ax.legend(loc="upper left")
    fig.suptitle("Seven modes. Between them the true map is flat; an affine map has one slope")
    fig.savefig(args.out / "mixture.png", dpi=100)
    plt.close(fig)
    print_table(
        ("mixture", "test log-likelihood"),
        ([name, f"{r['score']:.3f} ± {r['error']:.3f}"] for name, r in results.items()),
    )
    return results


# Figure 4

BLOCKS: dict[str, Any] = {
    "transforms": 8,
    "conditioner": "independent",
    "hidden_features": (100,),
}
PAPER: dict[str, Any] = {**BLOCKS, "linear": False, "tails": False}
PLANES: Flows = {
    "the paper's LDU blocks": lambda: SinusoidalFlow(2, scale=False, **PAPER),
    "LDU blocks": lambda: SinusoidalFlow(2, activation=nn.Tanh, **BLOCKS),
    "default": lambda: SinusoidalFlow(2, transforms=4),
    "NSF": lambda: zuko.flows.NSF(2, transforms=4),
}


def step_times(rows: Tensor, rounds: int = 10) -> dict[str, float]:
    """Times a step of training of each flow, relative to NSF's."""

    def timer(flow: Flow) -> timeit.Timer:
        return timeit.Timer(lambda: flow().log_prob(rows).mean().backward())

    timers = {kind: timer(make()) for kind, make in PLANES.items()}
    # In turns, so that other jobs slow all flows alike.
    times = [{kind: t.timeit(1) for kind, t in timers.items()} for _ in range(rounds)]
    best = {kind: min(time[kind] for time in times) for kind in PLANES}
    return {kind: best[kind] / best["NSF"] for kind in PLANES}


def planes(args: argparse.Namespace) -> Results:
    """Fits flows to densities in the plane."""
    edge = 2.6  # of the square that is drawn, in standard deviations
    axis = torch.linspace(-edge, edge, 200)
    grid = torch.cartesian_prod(axis, axis)
    shape = (1 + 2 * len(PLANES), len(args.data))
    size = (1.3 * shape[1] + 0.6, 1.3 * shape[0] + 0.6)
    fig, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")

    budget = Budget(args.steps, args.batch, lr=5e-3)
    results: Results = {}
    for name, (top, *column) in zip(args.data, axes.T, strict=True):
        data = toy(name, seed=args.seed)
        rows = toy(name, n=1_000_000, seed=args.seed).train
        square = [(-edge, edge)] * 2
        histogram, *_ = top.hist2d(*rows.T.numpy(), bins=100, range=square, density=True)
        top.set_title(name)
        results[name] = {}
        for kind, density, samples in zip(PLANES, column[::2], column[1::2], strict=True):
            flow = train(f"{name}, {kind}", PLANES[kind], data, budget, args)
            score, error = evaluate(flow, data.test)
            results[name][kind] = {"score": score, "error": error}
            with torch.no_grad():
                values = flow().log_prob(grid).exp().reshape(200, 200)
                x, y = flow().sample((3000,)).T
            # The color scale of the true density: a narrow peak would hide the rest.
            density.pcolormesh(axis, axis, values.T, vmin=0, vmax=histogram.max())
            samples.scatter(x, y, s=0.5, lw=0, color="k")
            samples.set(xlim=(-edge, edge), ylim=(-edge, edge))
    kinds = [kind.replace(" LDU", "\nLDU") for kind in PLANES]
    labels = ["truth", *(f"{kind}\n{what}" for kind in kinds for what in ("density", "samples"))]
    for label, row in zip(labels, axes, strict=True):
        row[0].set_ylabel(label)
        for ax in row:
            ax.set(xticks=[], yticks=[], aspect="equal")
    fig.savefig(args.out / "planes.png", dpi=80)
    plt.close(fig)

    results["parameters"] = {kind: count(make()) for kind, make in PLANES.items()}
    results["time of a step"] = step_times(data.train[: args.batch])
    print_table(
        ("test log-likelihood", *PLANES),
        [
            *(
                [name, *("{score:.3f} ± {error:.3f}".format(**results[name][k]) for k in PLANES)]
                for name in args.data
            ),
            ["parameters", *(f"{n:,}" for n in results["parameters"].values())],
            ["time of a step", *(f"{t:.1f}" for t in results["time of a step"].values())],
        ],
    )
    return results


FIGURES = {"2": staircase, "3": mixture, "4": planes}


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the figures."""
    parser = arguments(__doc__, "folder for pictures, results and checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--figures", nargs="+", choices=FIGURES, default=[*FIGURES], help="figures (default: all)"
    )
    parser.add_argument(
        "--data", nargs="+", choices=TOYS, default=[*TOYS], help="data of figure 4 (default: all)"
    )
    parser.add_argument(
        "--steps",
        type=positive,
        default=1000,
        help="steps of each flow; twice as many in figure 3 (default: %(default)s)",
    )
    parser.add_argument(
        "--batch", type=positive, default=256, help="rows of a step (default: %(default)s)"
    )
    args = parser.parse_args(argv)

    args.out.mkdir(parents=True, exist_ok=True)
    results: Results = {"options": {k: v for k, v in vars(args).items() if k != "out"}}
    for figure in args.figures:
        results[figure] = FIGURES[figure](args)
    (args.out / "figures.json").write_text(json.dumps(results, indent=2))
    print("\nWritten to", args.out)


if __name__ == "__main__":
    main()
