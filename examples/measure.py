"""The accuracy of inverses, and the number of iterations that they take, in three parts.

Part 1 measures round trips through single blocks and whole flows, before and after training on
patches of photographs. Part 2 counts iterations for single sinusoids. Part 3 counts the passes that
flows trained on patches take to draw samples. Tables are printed. JSON and a picture of the passes
are written to the folder '--out'.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import torch
from data import Data, patches
from torch import Tensor, nn
from torch.distributions import Transform
from tqdm import tqdm
from training import Budget, arguments, fit, passes, positive, print_table

from pyro_sinflow import InversionError, SinusoidalFlow, SinusoidalTransform, record_inversions

CONDITIONERS: dict[str, dict[str, Any]] = {
    "default": {},
    "independent": {"conditioner": "independent"},
    "scale=False": {"conditioner": "independent", "scale": False},
}
BLOCKS = 8
AT_ONCE = 10  # samples: larger batches are inverted by forward substitution
# The largest error that is aimed at, for each dtype.
COMPOSED_AIM = {"float32": 1e-5, "float64": 1e-11}
SINUSOID_AIM = {"float32": 5e-6, "float64": 1e-13}

Rows = list[dict[str, Any]]  # of a table: cells by the names of their columns


def errors(transform: Transform, y: Tensor) -> Tensor:
    """Returns |f(x) - y| / (1 + |x| + |y|) for x = f⁻¹(y), and infinity for rows that overflow."""
    with torch.no_grad():
        try:
            x = transform.inv(y)
            return (transform(x) - y).abs() / (1 + x.abs() + y.abs())
        except (InversionError, ValueError):  # x or f(x) is not finite
            if len(y) == 1:
                return torch.full_like(y, math.inf)
            return torch.cat([errors(transform, part) for part in y.chunk(2)])


def trained(flow: SinusoidalFlow, features: int, steps: int) -> SinusoidalFlow:
    """Returns a copy of a flow, fitted to the first features of patches that have enough."""
    parts = patches(size=math.isqrt(features) + 1)
    data = Data(*(part[..., :features] for part in parts))
    return fit(f"D = {features}", copy.deepcopy(flow), data, Budget(steps))


def round_trips(sizes: Sequence[int], steps: int, n: int, **options: Any) -> Rows:
    """Part 1: the largest error of n rows of normal noise, and the number that miss the aim."""
    columns = [*product(COMPOSED_AIM, ("untrained", "trained"))]
    aims = {f"{dtype}, {state}": COMPOSED_AIM[dtype] for dtype, state in columns}
    table: Rows = [{"conditioner": "aim", "blocks": "", "D": "", **aims}]
    for conditioner, blocks, features in product(CONDITIONERS, (1, BLOCKS), sizes):
        flow = SinusoidalFlow(features, transforms=blocks, **CONDITIONERS[conditioner], **options)
        flows = {"untrained": flow, "trained": trained(flow, features, steps)}
        y = torch.randn(n, features)
        row = {"conditioner": conditioner, "blocks": blocks, "D": features}
        for dtype, state in columns:
            to = getattr(torch, dtype)
            transform = flows[state].to(to)().transform
            if blocks == 1:  # without the maps at both ends
                transform = transform.transforms[-2]
            e = errors(transform, y.to(to)).amax(dim=-1)
            missed = int((~(e <= COMPOSED_AIM[dtype])).sum())
            row[f"{dtype}, {state}"] = float(e.max()), missed
        table.append(row)
    return table


def ordinary(n: int) -> Tensor:
    """Samples parameters and values from a standard normal distribution."""
    return torch.randn(n, 12)


def saturated(n: int) -> Tensor:
    """Samples parameters of up to 30, at which softplus, softmax and tanh saturate.

    Values have either sign, and magnitudes from 1e-4 to 1e4.
    """
    parameters = 60 * torch.rand(n, 11) - 30
    value = (2 * torch.randint(2, (n, 1)) - 1) * 10 ** (8 * torch.rand(n, 1) - 4)
    return torch.cat((parameters, value), dim=1)


def newton(n: int) -> Rows:
    """Part 2: the iterations and errors of n inverses of a sinusoid of 3 components."""
    table: Rows = []
    for draw, (dtype, aim) in product((ordinary, saturated), SINUSOID_AIM.items()):
        worst = []
        with record_inversions() as inversions:
            for row in tqdm(draw(n).to(getattr(torch, dtype)), desc=f"{draw.__name__}, {dtype}"):
                t = SinusoidalTransform(row[:3], row[3:6], row[6:9], row[9], row[10])
                worst.append(float(errors(t, row[11:])))
        iterations = sorted(i.iterations for i in inversions)
        table.append(
            {
                "parameters": draw.__name__,
                "dtype": dtype,
                "median": iterations[n // 2],
                "99 %": iterations[n * 99 // 100],
                "maximum": iterations[-1],
                "largest error": max(worst),
                "aim": aim,
            }
        )
    return table


def histogram(features: int, steps: int, batches: int, **options: Any) -> Rows:
    """Part 3: the frequency of each number of passes of a triangular map."""
    counts = {}
    for name, conditioner in CONDITIONERS.items():
        flow = SinusoidalFlow(features, transforms=BLOCKS, **conditioner, **options)
        flow = trained(flow, features, steps)
        counts[name] = Counter(passes(name, flow, batches, AT_ONCE))
    seen = sorted(set().union(*counts.values()))
    return [{"passes": k} | {name: count[k] for name, count in counts.items()} for k in seen]


def draw_passes(table: Rows, features: int, path: Path) -> None:
    """Draws the histograms below each other, with the number of passes that zuko takes."""
    fig, axes = plt.subplots(
        len(CONDITIONERS), 1, figsize=(8, 6), sharex=True, sharey=True, layout="constrained"
    )
    for ax, name in zip(axes, CONDITIONERS, strict=True):
        count = [row[name] for row in table]
        ax.bar(
            [row["passes"] for row in table],
            [100 * k / sum(count) for k in count],
            label=f"{AT_ONCE} samples at once",
        )
        ax.axvline(
            features,
            color="C3",
            linestyle="--",
            label=f"one for each of {features} features, as in zuko",
        )
        ax.set_title(name, loc="left")
        ax.yaxis.set_major_formatter("{x:.0f} %")
    axes[0].legend(loc="center", bbox_to_anchor=(0.55, 0.5))
    axes[-1].set(xlabel="passes", xlim=(0, features + 2))
    fig.supylabel("share of the inverses")
    fig.suptitle("How many passes does it take to invert a triangular map?")
    fig.savefig(path, dpi=100)
    plt.close(fig)


def cell(value: Any) -> str:
    """Formats a number, or the largest error and the number of rows that miss the aim."""
    if isinstance(value, tuple):
        error, missed = value
        return cell(error) + (f" ({missed})" if missed else "")
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the three parts."""
    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--activation", help="of the networks, such as Tanh (default: that of the flow)"
    )
    parser.add_argument("--parts", nargs="+", type=int, default=[1, 2, 3], help="default: all")
    parser.add_argument(
        "--steps", type=positive, default=300, help="of training (default: %(default)s)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a run of seconds to test the script; its figures mean nothing",
    )
    args = parser.parse_args(argv)
    sizes, features, steps, rows, draws, batches = (1, 2, 16, 64), 63, args.steps, 1000, 10_000, 20
    if args.quick:
        sizes, features, steps, rows, draws, batches = (1, 3), 8, 2, 10, 20, 1

    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    options = {"activation": getattr(nn, args.activation)} if args.activation else {}
    parts: dict[str, Callable[[], Rows]] = {
        "Errors of round trips": lambda: round_trips(sizes, steps, rows, **options),
        "Newton iterations for one sinusoid": lambda: newton(draws),
        "Inverses of triangular maps, by passes": lambda: histogram(
            features, steps, batches, **options
        ),
    }
    tables = {}
    for number, (title, part) in enumerate(parts.items(), 1):
        if number not in args.parts:
            continue
        table = tables[title] = part()
        print(f"\n{title}", flush=True)
        print_table([*table[0]], ([*map(cell, row.values())] for row in table))
    figures, picture = args.out / "measure.json", args.out / "passes.png"
    figures.write_text(json.dumps(tables, indent=2))
    if 3 in args.parts:
        draw_passes(table, features, picture)
    print("\nWritten to", args.out)


if __name__ == "__main__":
    main()
