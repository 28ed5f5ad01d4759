"""Compares flows on real data, for equal steps or equal time and several seeds.

Each flow is fitted with all learning rates and widths of short lists from the first seed. The other
seeds take those that validate best. All flows have the same batch size, optimizer and early
stopping. For each data set, the script prints the mean test NLL over seeds with its standard error,
in nats of standardized features, and the time of a training step and of samples, in training steps
of MAF.

The tables of the UCI repository and BSDS300 are read from the folder '--data-root'. Finished fits
are kept in the folder '--out' and are not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from contenders import ESTIMATED, FLOWS, TAN, can_resize, resize
from data import TOYS, Data, breast_cancer, digits, patches, toy
from files import SOURCES, UCI, bsds300, uci
from images import prepare
from torch import Tensor
from training import (
    Budget,
    afford,
    arguments,
    count,
    evaluate,
    fit,
    positive,
    print_table,
    restore,
    seconds,
    spread,
    tune,
)
from zuko.lazy import Flow

Fit = dict[str, Any]
Results = dict[tuple[str, str], list[Fit]]  # of each data set and flow, for each seed
Choice = tuple[float, int]  # a learning rate, and the number of units of hidden layers


def flat_digits() -> Data:
    """Returns digits of 8 by 8 pixels as rows, dequantized and mapped to the real line."""
    data, _ = prepare(digits(), levels=17, margin=0.05)
    return data._replace(**{name: getattr(data, name).flatten(1) for name in data._fields[:3]})


REAL: dict[str, Callable[[Path | None], Data]] = {
    "patches": lambda root: patches(),
    "digits": lambda root: flat_digits(),
    "breast cancer": lambda root: breast_cancer(),
}
TABLES: dict[str, Callable[[Path | None], Data]] = {name: partial(uci, name) for name in UCI}
PLANE: dict[str, Callable[[Path | None], Data]] = {
    name: lambda root, name=name: toy(name) for name in TOYS
}
DATA = TABLES | {"BSDS300": bsds300} | REAL | PLANE


@lru_cache(1)
def read(data: str, root: Path | None) -> Data:
    """Reads a data set, and keeps the latest, to which a process fits several flows."""
    return DATA[data](root)


def stem_of(data: str, flow: str, choice: Choice, seed: int, args: argparse.Namespace) -> Path:
    """Returns where the results of a fit are, without the suffix."""
    spent = f"{args.steps} steps" if args.seconds is None else f"{args.seconds:g} s"
    rate, width = choice
    clip = f"clip {args.clip:g}"
    name = f"{data}, {flow}, {width} units, {spent}, {clip}, rate {rate:g}, seed {seed}"
    # A dot would begin the suffix.
    return args.out / "fits" / name.replace(".", "-")


def run(data: str, flow: str, choice: Choice, seed: int, args: argparse.Namespace) -> Fit:
    """Returns the results of a fit, from its file if it exists."""
    stem = stem_of(data, flow, choice, seed, args)
    path, checkpoint = stem.with_suffix(".json"), stem.with_suffix(".pt")
    if path.exists():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    rate, width = choice
    make, rows = resize(flow, width), read(data, args.data_root)
    steps = args.steps
    if args.seconds is not None:
        steps = afford(args.seconds, make, rows, checkpoint)
    budget = Budget(steps, lr=rate, patience=steps / 3, clip=args.clip)
    torch.manual_seed(seed)
    fitted = fit(stem.name, make(rows.train.shape[1]), rows, budget, checkpoint)
    score, error = evaluate(fitted, rows.test)
    result = {
        "rate": rate,
        "units": width,
        "validation": -evaluate(fitted, rows.validation)[0],
        "NLL": -score,
        "error": error,
        "steps": budget.steps,
    }
    path.write_text(json.dumps(result))
    return result


def fit_all(args: argparse.Namespace) -> Results:
    """Fits all flows to all data sets, and returns the fits of the best choices for each seed."""
    pairs = [(data, flow) for data in args.data for flow in args.flows]
    choices = [*product(args.rates, args.widths)]
    job = partial(run, args=args)
    return tune(job, pairs, choices, args.seeds, lambda fit: -fit["validation"], args.jobs)


def step_time(flow: Flow, rows: Tensor, rounds: int = 5) -> float:
    """Returns the time of a training step, but for the optimizer."""

    def step() -> None:
        flow.train().zero_grad()
        flow().log_prob(rows).mean().backward()

    return seconds(step, rounds)


def measure(flow: Flow, data: Data, batch: int = 128) -> Fit:
    """Returns the number of parameters, times and the round-trip error of a fitted flow."""
    rows, noise = data.train[:batch], torch.randn(1000, data.train.shape[1])

    def draw(n: int = 1000) -> Tensor:
        with torch.no_grad():
            return flow.eval()().transform.inv(noise[:n])

    results: Fit = {"parameters": count(flow), "step": step_time(flow, rows)}
    try:
        results |= {"samples": seconds(partial(draw, 10), 1), "drawn": 10}
        if results["samples"] < 1:  # otherwise, 10 samples give a lower bound
            results |= {"samples": seconds(draw), "drawn": 1000}
    except (NotImplementedError, KeyError):  # Pyro's block-autoregressive flow has no inverse
        return results | {"samples": None, "round trip": None}
    x, z = draw(10), noise[:10]
    with torch.no_grad():
        back = (flow().transform(x) - z).abs() / (1 + z.abs() + x.abs())
    return results | {"round trip": float(back.max())}


def costs(data: str, results: Results, args: argparse.Namespace) -> dict[str, Fit]:
    """Measures the time of steps and samples of the flows that were fitted to a data set."""
    rows = read(data, args.data_root)
    found: dict[str, Fit] = {}
    for name in args.flows:
        fits = results[data, name]
        stem = stem_of(data, name, (fits[0]["rate"], fits[0]["units"]), 0, args)
        make = resize(name, fits[0]["units"])
        flow = restore(make(rows.train.shape[1]), stem.with_suffix(".pt"))
        found[name] = measure(flow, rows)
    return found


def show(results: Results, args: argparse.Namespace) -> None:
    """Prints the scores, in bold if they are first or within a standard error of the first."""

    def score_of(data: str, flow: str) -> tuple[float, float]:
        fits = results[data, flow]
        return spread([f["NLL"] for f in fits], fits[0]["error"])

    leads = dict.fromkeys(args.flows, 0)
    scores, steps, rates, widths = [], [], [], []
    for data in args.data:
        best, error = min(score_of(data, flow) for flow in args.flows)
        row = [data]
        for flow in args.flows:
            score, own = score_of(data, flow)
            level = score <= best + (error**2 + own**2) ** 0.5
            leads[flow] += level
            row.append(f"**{score:.2f} ± {own:.2f}**" if level else f"{score:.2f} ± {own:.2f}")
        scores.append(row)
        fits = [results[data, flow] for flow in args.flows]
        steps.append([data, *(f"{mean(f['steps'] for f in seeds):,.0f}" for seeds in fits)])
        rates.append([data, *(f"{seeds[0]['rate']:g}" for seeds in fits)])
        units = (results[data, f][0]["units"] if can_resize(f) else "-" for f in args.flows)
        widths.append([data, *map(str, units)])
    scores.append(["first or level", *(f"{n} of {len(args.data)}" for n in leads.values())])
    for title, table in (
        ("test NLL", scores),
        ("steps", steps),
        ("learning rate", rates),
        ("units", widths),
    ):
        print_table((title, *args.flows), table)


def show_costs(found: dict[str, dict[str, Fit]], args: argparse.Namespace) -> None:
    """Prints sizes, times in steps of MAF, and round-trip errors."""

    def cell(data: str, flow: str) -> list[str]:
        flows = found[data]
        unit = flows.get("MAF", next(iter(flows.values())))["step"]
        r = flows[flow]
        samples, trip = "none", ""
        if r["samples"] is not None:
            samples = ("" if r["drawn"] == 1000 else "> ") + f"{r['samples'] / unit:.1f}"
            trip = f"{r['round trip']:.0e}"
        return [f"{r['parameters']:,}", f"{r['step'] / unit:.1f}", samples, trip]

    titles = ("parameters", "time of a step", "1,000 samples", "round trip")
    for i, title in enumerate(titles):
        rows = [[data, *(cell(data, flow)[i] for flow in args.flows)] for data in args.data]
        print_table((title, *args.flows), rows)
    if estimated := [name for name in args.flows if name in ESTIMATED]:
        print(f"\nThe log-determinant is an estimate for {', '.join(estimated)}.")


def main(argv: Sequence[str] | None = None) -> None:
    """Fits all flows to all data sets."""
    parser = arguments(f"{__doc__}\n{SOURCES}")
    parser.add_argument("--seeds", type=positive, default=3, help="how many (default: %(default)s)")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[2e-3, 6e-3, 1.5e-2], help="learning rates to try"
    )
    parser.add_argument(
        "--widths",
        type=positive,
        nargs="+",
        default=[64],
        help="units of both hidden layers to try; flows of Pyro and normflows have their own",
    )
    parser.add_argument(
        "--steps", type=positive, default=400, help="of each flow, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, help="processor time of each flow, instead of steps"
    )
    parser.add_argument(
        "--clip", type=float, default=10.0, help="largest norm of a gradient (default: %(default)s)"
    )
    parser.add_argument("--data", nargs="+", choices=DATA, default=[*REAL], help="data sets")
    parser.add_argument("--data-root", type=Path, help="folder of 'uci.npz' and 'bsds300.npz'")
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=[*FLOWS], help="flows")
    parser.add_argument("--jobs", type=positive, default=1, help="fits at a time")
    args = parser.parse_args(argv)

    (args.out / "fits").mkdir(parents=True, exist_ok=True)
    if missing := [name for name in args.flows if not available(FLOWS[name])]:
        print(f"Left out, because normflows is not installed: {', '.join(missing)}.")
        args.flows = [name for name in args.flows if name not in missing]
    if args.widths != [64] and (fixed := [name for name in args.flows if not can_resize(name)]):
        parser.error(f"--widths is not an option of {', '.join(fixed)}.")
    results = fit_all(args)
    show(results, args)
    show_costs({data: costs(data, results, args) for data in args.data}, args)
    found = {data: {flow: results[data, flow] for flow in args.flows} for data in args.data}
    (args.out / "comparison.json").write_text(json.dumps(found, indent=2))
    print(f"{TAN}\n\nWritten to {args.out}")


def available(make: Callable[[int], Flow]) -> bool:
    """Whether the package that a flow comes from is installed."""
    try:
        make(4)
    except ModuleNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
