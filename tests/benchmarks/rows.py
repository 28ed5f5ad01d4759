"""How many passes through the network the inverse of a row takes, and that of a batch of rows.

A batch that is inverted by passes takes as many as its slowest row. The difference is what could be
saved if rows that have converged left the later passes.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean

import torch

from pyro_sinflow import fast_inverse

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from comparison import DATA
from contenders import FLOWS
from training import Budget, fit, passes, print_table


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
            flow = flow if kind.startswith("Sinusoidal") else fast_inverse(flow)
            taken = passes(said, flow, batches=args.rows, size=1)
            found = torch.tensor(taken).double().view(args.rows, -1)  # for each map
            batch = found.amax(0)  # of each map
            saved = mean((1 - found.mean(0) / batch).tolist())
            table.append([said, f"{found.mean():.1f}", f"{batch.mean():.1f}", f"{saved:.0%}"])
    print_table(("data, flow", "mean of rows", "slowest row", "could be saved"), table)


if __name__ == "__main__":
    main()
