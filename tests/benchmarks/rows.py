"""How many passes through the network the inverse of a row takes, and that of a batch of rows.

A batch that is inverted by passes takes as many as its slowest row. The difference is what could be
saved if rows that have converged left the later passes.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean

import torch
from tqdm import trange

from pyro_sinflow import fast_inverse, record_inversions

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from comparison import DATA
from contenders import FLOWS
from training import Budget, fit, print_table


@torch.no_grad()
def passes_of_rows(flow, rows):
    """Returns the passes that each row takes by itself, with shape (rows, triangular maps)."""
    found = []
    for _ in trange(rows, desc="rows"):
        with record_inversions() as inversions:
            flow().sample((1,))
        found.append([i.iterations for i in inversions if i.problem == "triangular"])
    return torch.tensor(found, dtype=torch.float64)


def main(argv=None):
    """Trains the flows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--data", nargs="+", choices=DATA, default=["patches"], help="data sets")
    parser.add_argument("--data-root", type=Path, help="folder of 'uci.npz'")
    parser.add_argument("--flows", nargs="+", default=["Sinusoidal", "MAF", "RQ-NSF(AR)"])
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--rows", type=int, default=1000, help="of each batch")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    table = []
    for name in args.data:
        data = DATA[name](args.data_root)
        for kind in args.flows:
            torch.manual_seed(0)
            said = f"{name}, {kind}"
            budget = Budget(args.steps, lr=6e-3)
            make = FLOWS[kind]
            flow = fit(said, make(data.train.shape[1]), data, budget, args.out / f"{said}.pt")
            found = passes_of_rows(
                flow if kind.startswith("Sinusoidal") else fast_inverse(flow), args.rows
            )
            batch = found.amax(0)  # of each map
            saved = mean((1 - found.mean(0) / batch).tolist())
            table.append([said, f"{found.mean():.1f}", f"{batch.mean():.1f}", f"{saved:.0%}"])
    print_table(("data, flow", "mean of rows", "slowest row", "could be saved"), table)


if __name__ == "__main__":
    main()
