"""Simulation-based inference: Sinusoidal Flows and zuko's spline flow on two tasks of sbibm.

Neural posterior estimation (NPE) is run on two moons (Greenberg et al., 2019) and on SLCP
(Papamakarios et al., 2019), by a plain loop, by lampe or by sbi. All flows have the same
simulations, optimizer and early stopping. A table shows

- the mean log-posterior of held-out parameters, in standard deviations of the prior,
- the calibration: the largest difference between a credible level and the coverage of its region,
- with '--data-root', the classifier two-sample test (C2ST) against the reference posteriors of
  sbibm (Lueckmann et al., 2021): the accuracy of a classifier that tells the flow's samples from
  reference samples, 0.5 at best and 1 at worst, as a mean over observations.

Samples outside the support of the prior are rejected, as in sbi. Pictures, and a JSON file for each
finished fit, are written to the folder '--out'. An interrupted run continues if it is started again
with the same options.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from estimators import CLIENTS, FLOWS, Budget, Posterior, Units
from simulators import OBSERVATIONS, SOURCE, TASKS, Pairs, c2st
from tqdm import tqdm
from training import arguments, positive, print_table, spread

Result = dict[str, Any]


class Cell(NamedTuple):
    """A fit, which the table reports."""

    client: str
    task: str
    simulations: int
    flow: str
    seed: int

    @property
    def row(self) -> str:
        """The row of the table that it belongs to."""
        return f"{self.client}, {self.task}, {self.simulations:,}, {self.flow}"


def budget_of(cell: Cell, args: argparse.Namespace) -> Budget:
    """Returns the options of a fit, which are the same for all flows."""
    batch = args.batch or min(max(cell.simulations // 50, 50), 500)
    return Budget(args.steps, args.epochs, batch, args.lr, args.patience)


def space_of(cell: Cell, args: argparse.Namespace) -> str:
    """Returns the space in which parameters are fitted, which is the same for all flows."""
    return args.space or ("real" if TASKS[cell.task].logits else "box")


def file_of(cell: Cell, args: argparse.Namespace) -> Path:
    """Returns the file of a result. Its name has all options that the result depends on."""
    budget = budget_of(cell, args)
    options = (
        f"{space_of(cell, args)}_steps{budget.steps}_epochs{budget.epochs}_batch{budget.batch}"
    )
    options += f"_lr{budget.lr:g}_patience{budget.patience}_tests{args.tests}"
    if args.data_root is not None:
        options += f"_c2st{args.observations}x{args.draws}"
    return args.out / "cells" / f"{'_'.join(map(str, cell))}_{options}.json"


@torch.no_grad()
def ranks(posterior: Posterior, pairs: Pairs, n: int) -> torch.Tensor:
    """Returns the level of the smallest credible region that holds the true parameters.

    For a calibrated posterior, levels are uniform between 0 and 1 (Hermans et al., 2022).
    """
    theta, x = pairs
    samples = posterior.sample(n, x)
    inside = posterior.inside(samples)
    parts = samples.split(max(10_000 // len(x), 1))
    density = torch.cat(
        [
            posterior.log_prob(part.flatten(0, 1), x.repeat(len(part), 1)).view(-1, len(x))
            for part in parts
        ]
    )
    higher = (density > posterior.log_prob(theta, x)) & inside
    return (higher.sum(dim=0) / inside.sum(dim=0).clamp(min=1)).sort().values


def compare(posterior: Posterior, cell: Cell, args: argparse.Namespace) -> list[float]:
    """Returns the C2ST of each observation."""
    scores = []
    for i in range(1, args.observations + 1):
        reference, x = TASKS[cell.task].reference(args.data_root, i)
        rows = torch.randperm(len(reference))[: args.draws]
        scores.append(c2st(reference[rows], posterior.accepted(args.draws, x)))
    return scores


def run_cell(cell: Cell, args: argparse.Namespace) -> None:
    """Fits a flow, and writes the result."""
    torch.set_num_threads(1)
    task = TASKS[cell.task]
    torch.manual_seed(10_000 + cell.seed)
    test = task.draw(args.tests)
    torch.manual_seed(cell.seed)
    pairs = task.draw(cell.simulations)
    std, mean = torch.std_mean(pairs[1], dim=0)
    units = Units(task.bound, space_of(cell, args) == "real", mean, std)
    begin = time.process_time()
    posterior = CLIENTS[cell.client](FLOWS[cell.flow], pairs, units, budget_of(cell, args))
    spent = time.process_time() - begin
    scores = posterior.log_prob(*test)
    levels = ranks(posterior, test, 256)
    coverage = torch.linspace(0, 1, len(levels))
    result: Result = {
        "score": float(scores.mean()),
        "error": float(scores.std()) / len(scores) ** 0.5,
        "calibration": float((levels - coverage).abs().max()),
        "levels": [round(level, 4) for level in levels.tolist()],
        "seconds": spent,
    }
    if args.data_root is not None:
        result["c2st"] = compare(posterior, cell, args)
    path = file_of(cell, args)
    # Replace the file in one step: an interruption must not leave a partial file.
    (partial := path.with_suffix(".partial")).write_text(json.dumps(result))
    partial.replace(path)


def run_cells(cells: Sequence[Cell], args: argparse.Namespace) -> dict[Cell, Result]:
    """Runs the fits that have no file yet, several at a time, and reads all results."""
    (args.out / "cells").mkdir(parents=True, exist_ok=True)
    left = [cell for cell in cells if not file_of(cell, args).exists()]
    with (
        ProcessPoolExecutor(args.jobs) as pool,
        tqdm(desc="fits", total=len(cells), initial=len(cells) - len(left)) as bar,
    ):
        jobs = {pool.submit(run_cell, cell, args): cell for cell in left}
        for job in as_completed(jobs):
            job.result()
            bar.set_postfix_str(f"{jobs[job].row}, seed {jobs[job].seed}")
            bar.update()
    return {cell: json.loads(file_of(cell, args).read_text()) for cell in cells}


def report(results: dict[Cell, Result], args: argparse.Namespace) -> None:
    """Prints the table."""
    rows: dict[str, list[Result]] = {}
    for cell, result in results.items():
        rows.setdefault(cell.row, []).append(result)
    header = ["client, task, simulations, flow", "log-posterior", "calibration", "seconds"]
    table = []
    for name, seeds in rows.items():
        scores = [r["score"] for r in seeds]
        calibration = max(r["calibration"] for r in seeds)
        row = [
            *(name, "{:.3f} ± {:.3f}".format(*spread(scores, seeds[0]["error"]))),
            *(f"{calibration:.3f}", f"{np.mean([r['seconds'] for r in seeds]):.0f}"),
        ]
        if args.data_root is not None:
            means = [float(np.mean(r["c2st"])) for r in seeds]
            of_one = float(np.std(seeds[0]["c2st"])) / len(seeds[0]["c2st"]) ** 0.5
            row.insert(2, "{:.3f} ± {:.3f}".format(*spread(means, of_one)))
        table.append(row)
    if args.data_root is not None:
        header.insert(2, "C2ST")
    print_table(header, table)


def plot_coverage(ax: plt.Axes, results: dict[Cell, Result], cells: Sequence[Cell]) -> None:
    """Draws the coverage of credible regions, for the most simulations and the first seed."""
    most = max(cell.simulations for cell in cells)
    ax.axline((0, 0), slope=1, color="0.7")
    for cell in cells:
        if cell.simulations == most and cell.seed == 0:
            levels = results[cell]["levels"]
            ax.plot(levels, np.linspace(0, 1, len(levels)), label=cell.flow)
    ax.set(xlabel="credible level", ylabel="coverage")


def plot_c2st(ax: plt.Axes, results: dict[Cell, Result], cells: Sequence[Cell]) -> None:
    """Draws the C2ST against the number of simulations."""
    for flow in dict.fromkeys(cell.flow for cell in cells):
        scores: dict[int, list[float]] = {}
        for cell in cells:
            if cell.flow == flow:
                scores.setdefault(cell.simulations, []).extend(results[cell]["c2st"])
        sizes = sorted(scores)
        ax.semilogx(sizes, [np.mean(scores[n]) for n in sizes], "o-", label=flow)
    ax.set(xlabel="simulations", ylabel="C2ST", ylim=(0.5, 1))


def pictures(results: dict[Cell, Result], args: argparse.Namespace) -> None:
    """Writes a picture of the coverage, and one of the C2ST."""
    plots = {"coverage": plot_coverage}
    if args.data_root is not None:
        plots["c2st"] = plot_c2st
    for name, plot in plots.items():
        rows, columns = len(args.client), len(args.tasks)
        size = (4 * columns, 4 * rows)
        fig, axes = plt.subplots(
            rows,
            columns,
            figsize=size,
            squeeze=False,
            sharex=True,
            sharey=True,
            layout="constrained",
        )
        pairs = product(args.client, args.tasks)
        for ax, (client, task) in zip(axes.flat, pairs, strict=True):
            plot(ax, results, [c for c in results if (c.client, c.task) == (client, task)])
            ax.set_title(f"{client}: {task}")
            ax.label_outer()
        axes[0, 0].legend()
        fig.savefig(args.out / f"{name}.png", dpi=100)
        plt.close(fig)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the arguments."""
    parser = arguments(__doc__)
    parser.epilog = SOURCE
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}

    def choice(name: str, choices: Sequence[str], default: Sequence[str]) -> None:
        quoted = ", ".join(f"'{c}'" for c in choices)
        chosen = "all" if default == choices else ", ".join(default)
        text = f"some of {quoted} (default: {chosen})"
        parser.add_argument(name, choices=choices, default=default, help=text, **several)

    choice("--client", [*CLIENTS], ["zuko"])
    choice("--tasks", [*TASKS], [*TASKS])
    choice("--flows", [*FLOWS], [*FLOWS])

    def number(name: str, default: float, text: str) -> None:
        text += " (default: %(default)s)"
        kind = positive if isinstance(default, int) else float
        parser.add_argument(name, type=kind, default=default, help=text)

    parser.add_argument(
        "--simulations",
        nargs="+",
        type=positive,
        default=[10_000],
        metavar="N",
        help="numbers of simulations of each task, at least 20 (default: 10000)",
    )
    number("--seeds", 1, "how many")
    number("--steps", 5000, "of the optimizer, at most")
    number("--epochs", 100, "passes over the simulations, at most")
    number("--patience", 20, "passes without a better validation score, after which a fit stops")
    number("--lr", 1e-3, "initial learning rate")
    text = "simulations in a step (default: a fiftieth of all, between 50 and 500)"
    parser.add_argument("--batch", type=positive, help=text)
    text = "fit the parameters (box), or their logits, which are unbounded (real; default: box for "
    text += "two moons, real for SLCP)"
    parser.add_argument("--space", choices=("box", "real"), help=text)
    number("--tests", 500, "held-out pairs")
    text = "folder of 'sbibm.npz'; without it, the C2ST is left out"
    parser.add_argument("--data-root", type=Path, help=text)
    number("--draws", 1000, "samples of each kind for the C2ST")
    number("--observations", 5, "of each task for the C2ST, at most 10")
    number("--jobs", 1, "fits at a time")
    args = parser.parse_args(argv)

    for name, minimum in (("tests", 2), ("draws", 10)):
        if (value := getattr(args, name)) < minimum:
            parser.error(f"'--{name}' should be at least {minimum}, got {value}")
    if min(args.simulations) < 20:
        parser.error(f"'--simulations' should be at least 20, got {min(args.simulations)}")
    if args.observations > OBSERVATIONS:
        parser.error(f"'--observations' should be from 1 to 10, got {args.observations}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the fits, and reports the results."""
    args = parse(argv)
    if args.data_root is not None:
        for task in args.tasks:
            TASKS[task].reference(args.data_root, args.observations)  # raises an error if missing
    cells = [
        Cell(*key)
        for key in product(args.client, args.tasks, args.simulations, args.flows, range(args.seeds))
    ]
    results = run_cells(cells, args)
    pictures(results, args)
    report(results, args)
    print("\nWritten to", args.out)


if __name__ == "__main__":
    main()
