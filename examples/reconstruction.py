"""Figure 5 and Appendix C of the paper (Wei, 2021): time and accuracy of inverses.

A flow is fitted to images as in images.py. Images are generated, and held-out images are
reconstructed from their noise, with several tolerances and numbers of iterations, by the paper's
Algorithm 1 and by the default solver. The unit of time is one log-density of the same images. The
table is printed. JSON and pictures are written to the folder '--out'. If that folder has the
checkpoint of an interrupted run, or of images.py with the same options, the fit continues from it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from images import FLOWS, add_options, prepare, preset_of, sheet
from torch import Tensor
from training import arguments, fit, positive, print_table, seconds

from pyro_sinflow import InversionWarning, Solver

METHODS = {"Algorithm 1": "banach", "default": "default"}
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
ITERATIONS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)

WHAT = {"generation": "{:.1f}", "reconstruction": "{:.1f}", "distance": "{:.1e}"}


def curves(results: dict[str, Any], path: Path) -> None:
    """Draws times against tolerances, and distances against numbers of iterations."""
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for name, found in results.items():
        for ax, what in zip(axes, ("generation", "reconstruction"), strict=False):
            rows = found["tolerance"]
            ax.semilogx([r["tolerance"] for r in rows], [r[what] for r in rows], ".-", label=name)
            ax.set(title=what, xlabel="tolerance", ylabel="time, in log-densities")
        rows = found["iterations"]
        axes[2].loglog(
            [r["iterations"] for r in rows], [r["distance"] for r in rows], ".-", label=name
        )
    for ax in axes[:2]:
        ax.invert_xaxis()
        ax.set_ylim(bottom=0)
    axes[2].set(title="error", xlabel="most iterations", ylabel="distance to the original")
    axes[0].legend()
    fig.savefig(path, dpi=100)
    plt.close(fig)


def faces(rows: dict[str, Tensor], path: Path, columns: int = 20) -> None:
    """Draws images in labelled rows."""
    fig, axes = plt.subplots(len(rows), 1, figsize=(9, 0.75 * len(rows)), layout="constrained")
    for ax, (name, images) in zip(axes, rows.items(), strict=True):
        ax.imshow(sheet(images[:columns], columns), cmap="gray", interpolation="nearest")
        ax.set_title(name, fontsize=9)
        ax.axis("off")
    fig.savefig(path, dpi=100)
    plt.close(fig)


def main(argv: Sequence[str] | None = None) -> None:
    """Fits the flow, and inverts it with several solvers and options."""
    parser = arguments(__doc__)
    add_options(parser)
    parser.add_argument(
        "--images", type=positive, default=100, help="number (default: %(default)s)"
    )
    args = parser.parse_args(argv)

    args.out.mkdir(parents=True, exist_ok=True)
    preset = preset_of(args)
    parts = preset.read(args.data_root)
    data, brightness = prepare(parts, preset.levels, preset.margin, args.seed)
    shape = data.train.shape[1:]
    make = partial(FLOWS["PixelCNN"], shape, transforms=preset.blocks)
    torch.manual_seed(args.seed)
    checkpoint = args.out / f"{args.data}, PixelCNN, seed {args.seed}.pt"
    fitted = fit(f"{args.data}, PixelCNN", make(), data, preset.budget, checkpoint)
    x, noise = data.test[: args.images], torch.randn(args.images, *shape)

    def inverse(method: str, z: Tensor, **options: Any) -> Callable[[], Tensor]:
        """Returns a function that computes the inverse at z, without warnings of the solver."""
        flow = make(solver=Solver(METHODS[method], **options)).eval()
        flow.load_state_dict(fitted.state_dict())

        def run() -> Tensor:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", InversionWarning)
                return flow().transform.inv(z)

        return run

    def distance(y: Tensor) -> float:
        """Returns the root mean square distance of images to the originals."""
        return float((y - x).flatten(1).square().sum(dim=1).mean().sqrt())

    with torch.no_grad():
        unit = seconds(lambda: fitted().log_prob(x), 3)
        z = fitted().transform(x)
    results: dict[str, Any] = {}
    for name in METHODS:
        results[name] = {"tolerance": [], "iterations": []}
        for tolerance in TOLERANCES:
            options = {"tolerance": tolerance, "max_iter": max(ITERATIONS)}
            reconstruct = inverse(name, z, **options)
            results[name]["tolerance"].append(
                {
                    "tolerance": tolerance,
                    "generation": seconds(inverse(name, noise, **options), 3) / unit,
                    "reconstruction": seconds(reconstruct, 3) / unit,
                    "distance": distance(reconstruct()),
                }
            )
        for n in ITERATIONS:
            found = distance(inverse(name, z, max_iter=n)())
            results[name]["iterations"].append({"iterations": n, "distance": found})

    (args.out / "reconstruction.json").write_text(json.dumps(results, indent=2))
    curves(results, args.out / "reconstruction.png")
    rows = {
        "originals": x,
        **{
            f"Algorithm 1, at most {n} iterations": inverse("Algorithm 1", z, max_iter=n)()
            for n in (2, 5, 20)
        },
        "default": inverse("default", z)(),
    }
    faces(
        {name: brightness(image) / preset.levels for name, image in rows.items()},
        args.out / "reconstructed.png",
    )
    print_table(
        ("tolerance", *(f"{what}, {name}" for name in METHODS for what in WHAT)),
        [
            [
                f"{tolerance:.0e}",
                *(
                    WHAT[what].format(results[m]["tolerance"][i][what])
                    for m in METHODS
                    for what in WHAT
                ),
            ]
            for i, tolerance in enumerate(TOLERANCES)
        ],
    )
    print("\nWritten to", args.out)


if __name__ == "__main__":
    main()
