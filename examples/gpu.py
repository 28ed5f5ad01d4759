"""Trains a flow with the whole training step captured in a CUDA graph.

With few rows, a GPU waits for Python, which launches kernels one by one. A graph launches all
kernels of a step at once: log-density, gradient, clipping and optimizer. With '--compile',
torch.compile also fuses the kernels of log-density and gradient, and captures them itself; it takes
minutes before the first step. At the end, captured and eager steps are timed in turns. Without a
GPU, steps are eager.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from statistics import median

import pyro
import torch
from data import Data, patches
from steps import adamw, captured, likelihood_step
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from tqdm import trange
from training import arguments, evaluate, positive, print_table

from pyro_sinflow import SinusoidalFlow


def train(
    step: Callable[[], Tensor], data: Data, batch: Tensor, schedule: LRScheduler, steps: int
) -> None:
    """Takes steps with random rows.

    Args:
        step: The step.
        data: The rows, on the device of the flow.
        batch: The tensor from which the step reads its rows.
        schedule: The schedule of the learning rate.
        steps: The number of steps.
    """
    with trange(steps, desc="training") as bar:
        for i in bar:
            # On the device of the rows: indices from the CPU would have to be copied.
            rows = torch.randint(len(data.train), (len(batch),), device=batch.device)
            batch.copy_(data.train[rows])  # into the memory that the graph reads
            loss = step()
            schedule.step()
            if i % 100 == 0:  # not in each step, because the host waits for the value
                bar.set_postfix(loss=f"{float(loss):.2f}", refresh=False)


def gain(eager: Callable[[], Tensor], step: Callable[[], Tensor], rounds: int = 30) -> float:
    """Returns the time of an eager step over that of another step, measured in turns."""
    times: dict[Callable[[], Tensor], list[float]] = {eager: [], step: []}
    for _ in range(rounds):
        for function, taken in times.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return median(times[eager]) / median(times[step])


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the flow, scores it, and prints the speed-up by the graph."""
    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=5000, help="(default: %(default)s)")
    parser.add_argument(
        "--rows", type=positive, default=128, help="rows of a step (default: %(default)s)"
    )
    parser.add_argument(
        "--blocks", type=positive, default=12, help="LDU blocks (default: %(default)s)"
    )
    parser.add_argument(
        "--lr", type=float, default=1e-3, help="initial learning rate (default: %(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    args = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    data = patches(args.seed).to(device)
    flow = SinusoidalFlow(
        data.train.shape[1],
        transforms=args.blocks,
        conditioner="independent",
        hidden_features=(256, 256),
    ).to(device)
    # A graph always reads the same memory, so each batch is copied into this tensor.
    batch = data.train[: args.rows].clone()
    optimizer = adamw(flow.parameters(), args.lr)
    schedule = CosineAnnealingLR(optimizer, args.steps)

    pyro.enable_validation(False)  # its checks read values, which is not possible in a capture

    def loss() -> Tensor:
        return -flow().log_prob(batch).mean()

    eager = step = likelihood_step(optimizer, loss)
    kind = "eager"
    if args.compile:
        # The compiler would rewrite an assertion of zuko about a tuple as one about a tensor.
        torch._dynamo.config.rewrite_assert_with_torch_assert = False
        compiled = torch.compile(loss, mode="reduce-overhead")
        step, kind = likelihood_step(optimizer, compiled), "compiled"
    elif device.type == "cuda":
        step, kind = captured(eager), "captured"

    train(step, data, batch, schedule, args.steps)
    score, error = evaluate(flow, data.test)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.save(flow.state_dict(), args.out / "gpu.pt")  # before the further steps that are timed
    faster = 1.0 if step is eager else gain(eager, step)
    result = {"steps": kind, "log-likelihood": score, "error": error, "faster than eager": faster}
    (args.out / "gpu.json").write_text(json.dumps(result, indent=2))
    print_table(
        ("steps", "test log-likelihood", "faster than eager"),
        [(kind, f"{score:.2f} ± {error:.2f}", f"{faster:.2f}")],
    )
    if step is eager:
        print("\nThere is no CUDA device: nothing was captured.")
    print("\nWritten to", args.out)


if __name__ == "__main__":
    main()
