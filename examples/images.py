"""Table 4 of the paper (Wei, 2021): bits per dimension of images, and samples.

Flows whose conditioners are small PixelCNNs are fitted to the 8 × 8 digits of scikit-learn, to
MNIST or to CIFAR-10. The latter two are read from their original files in the folder '--data-root'.
The table is printed. JSON, a picture and checkpoints are written to the folder '--out'. An
interrupted run continues if it is started again with the same options.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from data import Data, digits
from files import cifar10, mnist
from torch import Tensor, nn
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Distribution,
    SigmoidTransform,
    Transform,
)
from training import Budget, arguments, count, fit, positive, print_table
from zuko.lazy import Flow

from pyro_sinflow import PixelCNN, SinusoidalFlow, record_inversions


class Preset(NamedTuple):
    """A data set, its preparation, and the options of the flows."""

    read: Callable[[Path | None], list[np.ndarray]]
    levels: int  # of brightness
    margin: float  # kept from 0 and 1 before the logit
    blocks: int
    budget: Budget


# The last two are the paper's, except that its learning rate on CIFAR-10 falls by a tenth whenever
# validation has not improved for two epochs.
PRESETS = {
    "digits": Preset(lambda root: digits(), 17, 0.05, 4, Budget(2000, 64, 2e-3, 1e-2)),
    "mnist": Preset(mnist, 256, 1e-6, 12, Budget(200_000, 128, 1e-3, 1e-2, every=1000)),
    "cifar10": Preset(cifar10, 256, 0.05, 12, Budget(140_000, 128, 5e-4, 1e-1, every=1000)),
}


# 16 maps and 2 residual blocks, as in the paper.
PAPER: dict[str, Any] = {"conditioner": "independent", "tails": False}
CNN: dict[str, Any] = {
    **PAPER,
    "network": PixelCNN,
    "hidden_features": (16, 16),
    "residual": True,
}
FLOWS: dict[str, Callable[..., Flow]] = {
    "PixelCNN": partial(SinusoidalFlow, scale=False, **CNN),
    "PixelCNN, scale": partial(SinusoidalFlow, scale=True, activation=nn.Tanh, **CNN),
    "masked MLP": partial(SinusoidalFlow, scale=False, **PAPER),
}


def prepare(
    parts: Sequence[np.ndarray], levels: int, margin: float, seed: int = 0
) -> tuple[Data, Transform]:
    """Maps levels of brightness to real numbers, as Papamakarios et al. (2017) do.

    Uniform noise is added to each level. The sum is mapped to the interval from ``margin`` to
    1 - ``margin``, and from there to the real line by the logit. All pixels are standardized by one
    mean and standard deviation.

    Args:
        parts: Images for training, validation and test, with shape :math:`(N, C, H, W)` and
            integers from 0 to ``levels`` - 1.
        levels: The number of levels.
        margin: The margin.
        seed: The seed of the noise.

    Returns:
        The data, and the map from data to numbers between 0 and ``levels``.
    """
    rng = np.random.default_rng(seed)
    inside = AffineTransform(margin, (1 - 2 * margin) / levels)
    logit = ComposeTransform([inside, SigmoidTransform().inv])
    train, *others = (logit(torch.as_tensor(x + rng.random(x.shape))) for x in parts)
    std, mean = torch.std_mean(train)
    rows = ((x - mean) / std for x in (train, *others))
    data = Data(*(x.float() for x in (*rows, mean, std)))
    return data, ComposeTransform([AffineTransform(data.mean, data.std), logit.inv])


def bits_per_dimension(d: Distribution, x: Tensor, brightness: Transform) -> Tensor:
    """Returns the negative log-density of images in bits for each pixel and channel.

    Args:
        d: The density.
        x: Prepared images, with shape :math:`(N, C, H, W)`.
        brightness: The map from them to numbers between 0 and the number of levels.
    """
    ladj = brightness.log_abs_det_jacobian(x, brightness(x)).flatten(1)
    return (ladj.sum(dim=1) - d.log_prob(x)) / (ladj.shape[1] * math.log(2))


def sheet(images: Tensor, columns: int = 10, border: float = 0.5) -> Tensor:
    """Arranges images with values from 0 to 1 in rows, with shape (height, width, C)."""
    images = nn.functional.pad(images.clamp(0, 1), (1, 1, 1, 1), value=border)
    rows = [torch.cat([*row], dim=2) for row in images.split(columns)]
    return torch.cat(rows, dim=1).movedim(0, 2)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of data, flow and training."""
    parser.add_argument(
        "--data", choices=PRESETS, default="digits", help="data set (default: %(default)s)"
    )
    parser.add_argument("--data-root", type=Path, help="folder with its original files")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--steps", type=positive, help="steps of each fit (default: the preset's)")
    parser.add_argument("--batch", type=positive, help="images of a step (default: the preset's)")
    parser.add_argument(
        "--blocks", type=positive, help="blocks of each flow (default: the preset's)"
    )


def preset_of(args: argparse.Namespace) -> Preset:
    """Returns the preset of a data set with the options of the command line."""
    preset = PRESETS[args.data]
    given = {name: getattr(args, name) for name in ("steps", "batch") if getattr(args, name)}
    return preset._replace(
        budget=replace(preset.budget, **given), blocks=args.blocks or preset.blocks
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Fits the flows, prints the table and draws the samples."""
    parser = arguments(__doc__, "folder for picture, results and checkpoints")
    add_options(parser)
    parser.add_argument(
        "--flows", nargs="+", choices=FLOWS, default=[*FLOWS], help="(default: all)"
    )
    args = parser.parse_args(argv)

    preset = preset_of(args)
    parts = preset.read(args.data_root)
    data, brightness = prepare(parts, preset.levels, preset.margin, args.seed)
    shape = data.train.shape[1:]

    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    panels = {"held-out": data.test[:100]}
    for name in args.flows:
        torch.manual_seed(args.seed)
        file = args.out / f"{args.data}, {name}, seed {args.seed}.pt"
        made = FLOWS[name](shape, transforms=preset.blocks)
        flow = fit(f"{args.data}, {name}", made, data, preset.budget, file)
        with torch.no_grad(), record_inversions() as inversions:
            panels[name] = flow().sample((100,))
        passes = [i.iterations for i in inversions if i.problem == "triangular"]
        with torch.no_grad():
            bits = torch.cat(
                [bits_per_dimension(flow(), x, brightness) for x in data.test.split(500)]
            )
        results[name] = {
            "bits": float(bits.mean()),
            "error": float(bits.std()) / len(bits) ** 0.5,
            "parameters": count(flow),
            "passes": max(passes),
        }

    fig, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.8), layout="constrained")
    for ax, (name, x) in zip(axes, panels.items(), strict=True):
        ax.imshow(sheet(brightness(x) / preset.levels), cmap="gray", interpolation="nearest")
        ax.set_title(f"{name}: {results[name]['bits']:.2f} bits" if name in results else name)
        ax.axis("off")
    fig.savefig(args.out / f"{args.data}.png", dpi=100)
    plt.close(fig)
    (args.out / f"{args.data}.json").write_text(json.dumps(results, indent=2))
    print_table(
        (args.data, "bits per dimension", "parameters", "most passes"),
        [
            [
                name,
                f"{r['bits']:.3f} ± {r['error']:.3f}",
                f"{r['parameters']:,}",
                f"{r['passes']} of {shape.numel()}",
            ]
            for name, r in results.items()
        ],
    )
    print("\nWritten to", args.out)


if __name__ == "__main__":
    main()
