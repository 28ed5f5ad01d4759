"""A variational autoencoder of digits, with a normal prior and with flows as priors.

The encoder and decoder are small networks, and the guide is normal. For held-out digits, the script
prints the ELBO and an estimate of the log-evidence by importance sampling. JSON and a picture of
samples are written to the folder '--out'.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from data import digits
from images import sheet
from pyro.distributions.transforms import affine_autoregressive, iterated
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from training import arguments, infer, positive, print_table

from pyro_sinflow import ldu

BRIGHTEST, PIXELS, CODES = 16, 64, 8


def noise() -> dist.Distribution:
    """Returns the normal distribution of codes."""
    return dist.Normal(torch.zeros(CODES), 1.0).to_event(1)


def network(inputs: int, outputs: int) -> nn.Module:
    """Returns a network with two hidden layers."""
    layers = (nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(128, outputs))


class VAE(nn.Module):
    """A variational autoencoder of images with brightness from 0 to 16.

    Args:
        flow: Blocks from code to noise, if the prior is a flow. A prior scores codes, so this
            direction should be explicit.
    """

    def __init__(self, flow: Any = None) -> None:
        super().__init__()
        self.encoder, self.decoder = network(PIXELS, 2 * CODES), network(CODES, PIXELS)
        self.flow = flow

    def prior(self) -> dist.Distribution:
        """Returns the distribution of codes."""
        if self.flow is None:
            return noise()
        return dist.TransformedDistribution(noise(), [self.flow.inv])

    def encode(self, images: Tensor) -> dist.Distribution:
        """Returns the guide's distribution of codes, given pixels."""
        loc, log_scale = self.encoder(images / BRIGHTEST).chunk(2, dim=-1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def decode(self, code: Tensor) -> dist.Distribution:
        """Returns the distribution of pixels, given codes."""
        return dist.Binomial(BRIGHTEST, logits=self.decoder(code)).to_event(1)

    def model(self, images: Tensor) -> None:
        """Samples codes, and pixels given codes."""
        pyro.module("vae", self)
        with pyro.plate("images", len(images), dim=-1):
            code = pyro.sample("code", self.prior())
            pyro.sample("pixels", self.decode(code), obs=images)

    def guide(self, images: Tensor) -> None:
        """Draws codes, given pixels."""
        pyro.module("vae", self)
        with pyro.plate("images", len(images), dim=-1):
            pyro.sample("code", self.encode(images))

    @torch.no_grad()
    def weights(self, images: Tensor, draws: int) -> Tensor:
        """Returns the log-weights of codes drawn for each image, with shape (draws, N)."""
        guide = self.encode(images)
        code = guide.sample((draws,))
        joint = self.prior().log_prob(code) + self.decode(code).log_prob(images)
        return joint - guide.log_prob(code)

    @torch.no_grad()
    def draw(self, n: int) -> Tensor:
        """Draws images, and returns the expected brightness of their pixels."""
        return self.decoder(self.prior().sample((n,))).sigmoid()


PRIORS: dict[str, Callable[[], Any]] = {
    "normal": lambda: None,
    "affine autoregressive": lambda: iterated(3, affine_autoregressive, CODES, [64, 64]),
    "LDU blocks": lambda: iterated(3, ldu, CODES, scale=False, hidden_features=(64, 64)),
    "LDU blocks, scale": lambda: iterated(3, ldu, CODES, hidden_features=(64, 64)),
}


def picture(sheets: dict[str, Tensor], path: Path) -> None:
    """Draws a sheet of images for each prior."""
    fig, axes = plt.subplots(1, len(sheets), figsize=(3.2 * len(sheets), 3.5), layout="constrained")
    for ax, (name, images) in zip(axes, sheets.items(), strict=True):
        tiles = sheet(images.reshape(-1, 1, 8, 8), columns=8, border=0.0)
        ax.imshow(tiles, cmap="gray_r", vmin=0, vmax=1)
        ax.set(title=name, xticks=[], yticks=[])
    fig.savefig(path, dpi=100)
    plt.close(fig)


def main(argv: Sequence[str] | None = None) -> None:
    """Fits an autoencoder with each prior."""
    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--steps", type=positive, default=6000, help="of SVI (default: %(default)s)"
    )
    parser.add_argument(
        "--draws", type=positive, default=500, help="codes for each score (default: %(default)s)"
    )
    args = parser.parse_args(argv)

    args.out.mkdir(parents=True, exist_ok=True)
    train, _, test = (torch.as_tensor(part, dtype=torch.float32).flatten(1) for part in digits())

    def batch() -> list[Tensor]:
        return [train[torch.randint(len(train), (128,))]]

    sheets = {"data": test[:64] / BRIGHTEST}
    results: dict[str, dict[str, float]] = {}
    normal = torch.zeros(len(test))
    for name, make in PRIORS.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        vae = VAE(make())
        infer(name, vae.model, vae.guide, Trace_ELBO(), 2e-3, args.steps, batch)
        weights = vae.weights(test, args.draws)
        evidence = weights.logsumexp(dim=0) - math.log(args.draws)
        normal = evidence if name == "normal" else normal
        gain = evidence - normal
        results[name] = {
            "elbo": float(weights.mean()),
            "evidence": float(evidence.mean()),
            "gain": float(gain.mean()),
            "error": float(gain.std()) / len(test) ** 0.5,
        }
        sheets[name] = vae.draw(64)
    picture(sheets, args.out / "vae.png")
    (args.out / "vae.json").write_text(json.dumps(results, indent=2))
    print_table(
        ("prior", "ELBO", "log-evidence", "gain on the normal"),
        [
            [
                name,
                f"{r['elbo']:.2f}",
                f"{r['evidence']:.2f}",
                f"{r['gain']:+.2f} ± {r['error']:.2f}",
            ]
            for name, r in results.items()
        ],
    )
    print("\nWritten to", args.out)


if __name__ == "__main__":
    main()
