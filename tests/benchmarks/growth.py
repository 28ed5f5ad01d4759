"""How cost grows with the number of features, the size of the batch and the number of blocks.

Flows are trained on patches of photographs first. Figures are printed as tables, and drawn in two
pictures. Times are in units of one log-density, memory is the peak of all tensors that are alive.
"""

import argparse
import sys
from functools import partial
from math import isqrt
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import zuko
from torch.profiler import ProfilerActivity, profile

from pyro_sinflow import SinusoidalFlow, fast_inverse, record_inversions

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from data import Data, patches
from training import Budget, fit, print_table, seconds

FEATURES = (8, 32, 128, 512)
BATCHES = tuple(4**k for k in range(9))  # up to 65,536
BLOCKS = (2, 4, 8, 16, 32)
NETWORK = {"hidden_features": (256, 256)}
BLOCK = {"conditioner": "independent", "linear": False, "tails": False, **NETWORK}
FLOWS = {
    "scale=False": partial(SinusoidalFlow, transforms=8, scale=False, **BLOCK),
    "scale=True": partial(SinusoidalFlow, transforms=8, **BLOCK),
    "default": partial(SinusoidalFlow, transforms=4, **NETWORK),
    "MAF": partial(zuko.flows.MAF, transforms=8, **NETWORK),
}


def trained(name, features, args, **options):
    """Returns a flow, fitted to the first features of patches that have enough, and test rows."""
    data = Data(*(part[..., :features] for part in patches(size=isqrt(features) + 1)))
    said = ", ".join([name, f"{features} features", *(f"{k} {v}" for k, v in options.items())])
    torch.manual_seed(0)
    flow = FLOWS[name](features, **options)
    flow = fit(said, flow, data, Budget(args.steps, lr=1e-3), args.out / f"{said}.pt")
    return flow, data.test


def peak(function):
    """Returns the most bytes that tensors of a function take at any one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        function()
    memory = [e for e in events.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(memory, key=lambda e: e.start_ns())]
    return int(torch.tensor(changes).cumsum(0).max())


@torch.no_grad()
def log_prob(flow, x):
    """Scores rows."""
    return flow().log_prob(x)


@torch.no_grad()
def invert(flow, z):
    """Draws samples, given noise."""
    return flow().transform.inv(z)


def train(flow, x):
    """Makes a training step, but for the optimizer."""
    flow.zero_grad()
    flow().log_prob(x).mean().backward()


def by_features(args):
    """Returns passes and times of inverses for several numbers of features."""
    table = []
    for name in FLOWS:
        for features in FEATURES:
            flow, test = trained(name, features, args)
            ways = {name: flow}
            if name == "MAF":
                ways = {"MAF, by zuko": flow, "MAF, by fast_inverse": fast_inverse(flow)}
            unit = seconds(partial(log_prob, flow, test[:1000]), 5)
            z = torch.randn(1000, features)
            for way, flow in ways.items():
                with record_inversions() as inversions:
                    for few in z[:60].split(3):  # so few that each pass is one of the whole network
                        invert(flow, few)
                passes = [i.iterations for i in inversions if i.problem == "triangular"]
                passes = passes or [features]  # zuko's are not recorded
                table.append(
                    {
                        "flow": way,
                        "features": features,
                        "mean passes": sum(passes) / len(passes),
                        "most passes": max(passes),
                        "time": seconds(partial(invert, flow, z), 5) / unit,
                    }
                )
    return table


def by_size(args):
    """Returns times and memory of three computations for several batches and numbers of blocks."""
    flows = {blocks: trained("scale=False", 63, args, transforms=blocks) for blocks in BLOCKS}
    flow, test = flows[8]
    unit = seconds(partial(log_prob, flow, test[:1024]), 5)
    sizes = [("batch", n, 8) for n in BATCHES] + [("blocks", 1024, blocks) for blocks in BLOCKS]
    table = []
    for axis, n, blocks in sizes:
        flow, _ = flows[blocks]
        x, z = test[torch.arange(n) % len(test)], torch.randn(n, 63)
        functions = {
            "log-density": partial(log_prob, flow, x),
            "training step": partial(train, flow, x),
            "samples": partial(invert, flow, z),
        }
        for name, function in functions.items():
            flow.zero_grad()  # frees gradients, which would count as less than nothing
            table.append(
                {
                    "of": name,
                    "axis": axis,
                    "batch": n,
                    "blocks": blocks,
                    "MiB": peak(function) / 2**20,
                    "time": seconds(function, 5) / unit,
                }
            )
    return table


def draw(axes, table, label, x, y):
    """Draws a line for each value of a column."""
    for name in dict.fromkeys(row[label] for row in table):
        rows = [row for row in table if row[label] == name]
        axes.plot([r[x] for r in rows], [r[y] for r in rows], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)


def draw_features(table, path):
    """Draws passes and time against the number of features."""
    fig, (passes, times) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    draw(passes, table, "flow", "features", "most passes")
    passes.set(title="Passes through each network, at most", ylabel="passes")
    draw(times, table, "flow", "features", "time")
    times.set(title="Time of 1,000 samples", ylabel="log-densities of 1,000 points")
    for ax in (passes, times):
        ax.set_xticks(FEATURES, FEATURES, minor=False)
        ax.minorticks_off()
    passes.legend()
    fig.savefig(path, dpi=100)
    plt.close(fig)


def draw_size(table, path):
    """Draws time and memory against the size of the batch and the number of blocks."""
    fig, axes = plt.subplots(
        2, 2, figsize=(10, 7), sharex="col", sharey="row", layout="constrained"
    )
    for column, axis in zip(axes.T, ("batch", "blocks"), strict=True):
        rows = [row for row in table if row["axis"] == axis]
        for ax, y in zip(column, ("time", "MiB"), strict=True):
            draw(ax, rows, "of", axis, y)
            ax.label_outer()
    axes[0, 0].set(title="8 blocks", ylabel="log-densities of 1,024 points")
    axes[0, 1].set(title="1,024 rows")
    axes[1, 0].set(ylabel="peak memory in MiB")
    axes[1, 1].set_xticks(BLOCKS, BLOCKS)
    axes[1, 1].minorticks_off()
    axes[0, 0].legend()
    fig.savefig(path, dpi=100)
    plt.close(fig)


def show(table):
    """Prints figures in Markdown."""
    rows = ([f"{v:.3g}" if isinstance(v, float) else f"{v}" for v in r.values()] for r in table)
    print_table([*table[0]], rows)


def main():
    """Runs both parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--steps", type=int, default=200, help="of training (default: %(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, measure, draw in (
        ("features", by_features, draw_features),
        ("size", by_size, draw_size),
    ):
        show(table := measure(args))
        draw(table, args.out / f"growth_{name}.png")


if __name__ == "__main__":
    main()
