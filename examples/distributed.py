"""Training and sampling in several processes, on one machine or more.

torchrun starts the processes, and restarts all of them when one fails:

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/distributed.py --out out

Each process takes its share of every batch, and gradients are averaged, so that the result does not
depend on the number of processes. After a restart, training continues from the last checkpoint and
reaches the same result as without interruption. Then each process draws its share of the samples,
with its own seed. Without torchrun, there is one process.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from data import patches
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from training import arguments, positive
from zuko.lazy import Flow

from pyro_sinflow import SinusoidalFlow


class NegativeLogLikelihood(nn.Module):
    """The loss as a module, which DistributedDataParallel needs."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        """Returns the mean negative log-likelihood of rows."""
        return -self.flow().log_prob(x).mean()


def batch(step: int, rows: int, size: int, seed: int) -> Tensor:
    """Returns the row indices of a step. They depend on its number only, also after a restart."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randint(rows, (size,), generator=generator)


def train(flow: Flow, x: Tensor, args: argparse.Namespace) -> list[float]:
    """Fits the flow, from the last checkpoint if it exists, and returns the losses."""
    rank, world = dist.get_rank(), dist.get_world_size()
    loss = DistributedDataParallel(NegativeLogLikelihood(flow))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    losses: list[float] = []
    checkpoint = args.out / "distributed.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        flow.load_state_dict(saved["flow"])
        optimizer.load_state_dict(saved["optimizer"])
        losses = saved["losses"]

    with tqdm(total=args.steps, initial=len(losses), disable=rank > 0) as bar:
        for step in range(len(losses), args.steps):
            first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
            if step == args.fail_at and first and rank == world - 1:
                os.kill(os.getpid(), 9)
            share = batch(step, len(x), args.batch, args.seed)[rank::world]
            optimizer.zero_grad()
            value = loss(x[share])
            value.backward()
            optimizer.step()
            dist.all_reduce(value := value.detach())
            losses.append(float(value) / world)
            bar.update()
            if rank == 0 and (step + 1) % args.every == 0:
                saved = {"flow": flow.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(saved | {"losses": losses}, partial := checkpoint.with_suffix(".part"))
                partial.replace(checkpoint)  # in one step, so that a failure leaves no partial file
    return losses


def draw(flow: Flow, args: argparse.Namespace) -> Tensor | None:
    """Draws samples in all processes, and returns them in the first one."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed * 1_000_003 + rank)
    share = args.samples // world + (rank < args.samples % world)
    with torch.no_grad():
        samples = flow().sample((share,))
    gathered: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(samples, gathered)
    return torch.cat(gathered) if gathered is not None else None


def main(argv: Sequence[str] | None = None) -> None:
    """Fits a flow to patches of photographs, and draws samples."""
    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=300, help="steps (default: %(default)s)")
    parser.add_argument(
        "--batch", type=positive, default=256, help="rows, of all processes together (%(default)s)"
    )
    parser.add_argument("--every", type=positive, default=50, help="steps between two checkpoints")
    parser.add_argument(
        "--samples", type=positive, default=1000, help="to draw (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=600, help="seconds to wait for each other (%(default)s)"
    )
    parser.add_argument("--fail-at", type=int, help="the step at which to fail once, to try it")
    args = parser.parse_args(argv)

    if dist.is_torchelastic_launched():
        # If a process does not respond for this long, all are restarted.
        dist.init_process_group("gloo", timeout=timedelta(seconds=args.timeout))
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if args.batch % dist.get_world_size():
        parser.error(f"--batch should be a multiple of {dist.get_world_size()}, got {args.batch}")

    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    flow = SinusoidalFlow(63, transforms=4)
    losses = train(flow, patches().train, args)
    samples = draw(flow, args)
    if samples is not None:
        torch.save(samples, args.out / "samples.pt")
        (args.out / "losses.json").write_text(json.dumps(losses))
        print(f"Loss {losses[0]:.3f} to {losses[-1]:.3f}; samples: {tuple(samples.shape)}")
        print("Written to", args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
