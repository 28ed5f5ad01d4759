"""Table 3 of the paper (Wei, 2021): flows on the five data sets of Papamakarios et al. (2017).

POWER, GAS, HEPMASS, MINIBOONE and BSDS300 are read from 'data.tar.gz' of Zenodo record 1161203, in
the folder '--data-root', where '--download' puts it. "BSDS300, rebuilt" is read from 'bsds300.npz'
in that folder: patches that were cut anew from the same photographs. "patches" and "breast cancer"
are data that scikit-learn ships. Each flow is fitted for some steps, or for some processor time. On
a GPU, each step is a CUDA graph. Scores are log-likelihoods of the test rows, in nats, in the units
of the published preprocessing. Passes are those of the inverse of one triangular map, for ten
samples at a time. An interrupted run continues from its last validation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
import zuko
from archive import Archive, Parts, bsds300, download, gas, hepmass, miniboone, power
from data import Data, breast_cancer, patches, standardize
from files import SOURCES
from files import bsds300 as rebuilt
from torch import Tensor
from training import (
    Budget,
    afford,
    arguments,
    count,
    evaluate,
    fit,
    passes,
    positive,
    print_table,
    spent,
)
from zuko.lazy import Flow

from pyro_sinflow import SinusoidalFlow


class Preset(NamedTuple):
    """A data set, its published shape, and the paper's options for it."""

    read: Callable[[Archive], Parts]
    features: int
    rows: tuple[int, int, int]
    hidden: int
    dropout: float
    budget: Budget

    def load(self, archive: Archive) -> Parts:
        """Reads the data set, and checks its shape.

        Raises:
            ValueError: If the shape is not the published one.
        """
        parts = self.read(archive)
        given = [part.shape for part in parts]
        expected = [(n, self.features) for n in self.rows]
        if given != expected:
            raise ValueError(f"The data should have shapes {expected}, got {given}.")
        return parts


# Every learning rate falls along a cosine here; the paper's falls exponentially for GAS and
# HEPMASS.
PRESETS = {
    "POWER": Preset(
        power, 6, (1_659_917, 184_435, 204_928), 256, 0.0, Budget(1_200_000, 512, 5e-4, every=5000)
    ),
    "GAS": Preset(
        gas, 8, (852_174, 94_685, 105_206), 256, 0.0, Budget(2_000_000, 128, 1e-3, 1e-5, every=5000)
    ),
    "HEPMASS": Preset(
        hepmass,
        21,
        (315_123, 35_013, 174_987),
        512,
        0.0,
        Budget(1_000_000, 128, 1e-3, 5e-4, every=5000),
    ),
    "MINIBOONE": Preset(
        miniboone, 43, (29_556, 3_284, 3_648), 256, 0.3, Budget(125_000, 128, 5e-4, 1e-3, every=500)
    ),
    "BSDS300": Preset(
        bsds300, 63, (1_000_000, 50_000, 250_000), 512, 0.1, Budget(400_000, 512, 5e-4, every=5000)
    ),
}
OTHERS: dict[str, Callable[[Path], Data]] = {
    "BSDS300, rebuilt": rebuilt,
    "patches": lambda root: patches(),
    "breast cancer": lambda root: breast_cancer(),
}

BLOCKS = partial(SinusoidalFlow, transforms=12, conditioner="independent")
FLOWS: dict[str, Callable[..., Flow]] = {
    "Sinusoidal": partial(SinusoidalFlow, transforms=5),
    "Sinusoidal, LDU blocks": BLOCKS,
    "the paper's LDU blocks": partial(BLOCKS, scale=False, linear=False, tails=False),
    "MAF": partial(zuko.flows.MAF, transforms=10),
    "RQ-NSF(AR)": partial(zuko.flows.NSF, transforms=5),
}

PUBLISHED = """
Published for BSDS300 (Papamakarios et al., 2017; Durkan et al., 2019; Wei, 2021): normal 96.67,
RealNVP 153.28, MADE MoG 153.71, Glow 155.07, MAF(10) 154.93 to 155.69, Sinusoidal 156.75,
RQ-NSF(AR) 157.31, B-NAF 157.36, FFJORD 157.40, SOS 157.48, RQ-NSF(C) 157.54, NAF 157.73,
UMNN-MAF 157.98, TAN 159.80. The rebuilt patches are not the published ones."""


def load(name: str, archive: Archive | None, root: Path) -> tuple[Data, Preset, Tensor]:
    """Returns the data, the preset, and the log-determinant of the standardization."""
    if archive is not None and name in PRESETS:
        data = standardize(*PRESETS[name].load(archive))
        return data, PRESETS[name], data.std.log().sum()
    # Other data sets take the options of BSDS300, with fewer steps.
    preset = PRESETS["BSDS300"]._replace(dropout=0.0, budget=Budget(1000, 128, 1e-3))
    data = OTHERS[name](root)
    return data, preset, data.std.log().sum()


def main(argv: Sequence[str] | None = None) -> None:
    """Fits the flows, and prints the table."""
    parser = arguments(f"{__doc__}\n{SOURCES}")
    parser.add_argument(
        "--data", nargs="+", choices=[*PRESETS, *OTHERS], default=[*PRESETS], help="data sets"
    )
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of the files")
    parser.add_argument("--download", action="store_true", help="download the archive first")
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=["Sinusoidal"], help="flows")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--steps", type=positive, help="of the optimizer (default: the paper's)")
    parser.add_argument("--seconds", type=float, help="processor time, instead of steps")
    parser.add_argument("--batch", type=positive, help="rows of a step (default: the paper's)")
    parser.add_argument("--lr", type=float, help="initial learning rate (default: the paper's)")
    parser.add_argument(
        "--hidden", type=positive, help="units of each layer (default: the paper's)"
    )
    parser.add_argument(
        "--device",
        type=torch.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device of flows and data (default here: %(default)s)",
    )
    args = parser.parse_args(argv)

    archive = None
    if any(name in PRESETS for name in args.data):
        path = args.data_root / "data.tar.gz"
        if args.download:
            download(path)
        archive = Archive(path)
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for name in args.data:
        data, preset, unit = load(name, archive, args.data_root)
        data = data.to(args.device)
        for flow in args.flows:
            results[f"{name}, {flow}"] = run(f"{name}, {flow}", FLOWS[flow], data, preset, args)
            results[f"{name}, {flow}"]["score"] -= float(unit)
            (args.out / "tabular.json").write_text(json.dumps(results, indent=2))
    print_table(
        (
            *("data, flow", "test log-likelihood", "parameters", "steps"),
            *("minutes of the processor", "passes for 10 samples"),
        ),
        [
            [
                name,
                f"{r['score']:.2f} ± {r['error']:.2f}",
                f"{r['parameters']:,}",
                f"{r['steps']:,}",
                f"{r['seconds'] / 60:.0f}",
                f"{mean(r['passes']):.1f}, at most {max(r['passes'])}" if r["passes"] else "-",
            ]
            for name, r in results.items()
        ],
    )
    print(f"{PUBLISHED}\n\nWritten to {args.out}")


def run(name: str, make: Callable[..., Flow], data: Data, preset: Preset, args: Any) -> Any:
    """Fits a flow, and returns its score, in nats of standardized rows, and its cost."""
    hidden = args.hidden or preset.hidden
    options: dict[str, Any] = {"hidden_features": (hidden, hidden)}
    if issubclass(getattr(make, "func", object), SinusoidalFlow):  # zuko's flows have no dropout
        options["dropout"] = preset.dropout

    def flow(features: int) -> Flow:
        return make(features, **options).to(args.device)

    budget = preset.budget
    budget = replace(budget, batch=args.batch or budget.batch, lr=args.lr or budget.lr)
    checkpoint = args.out / f"{name}, seed {args.seed}.pt"
    if args.seconds is not None:
        budget = replace(budget, steps=afford(args.seconds, flow, data, checkpoint, budget))
    elif args.steps is not None:
        budget = replace(budget, steps=args.steps)
    torch.manual_seed(args.seed)
    fitted = fit(name, flow(data.train.shape[1]), data, budget, checkpoint)
    score, error = evaluate(fitted, data.test)
    found = {"parameters": count(fitted), "steps": budget.steps, "seconds": spent(checkpoint)}
    torch.manual_seed(0)
    taken = passes(f"{name}, samples", fitted, batches=20, size=10)
    return {"score": score, "error": error, **found, "passes": taken}


if __name__ == "__main__":
    main()
