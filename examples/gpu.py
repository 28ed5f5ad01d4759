"""Trains a flow with the whole training step captured in a CUDA graph.

Few rows leave a GPU waiting for Python, which launches kernels one by one. A graph launches all
kernels of a step at once: log-density, gradient, clipping and optimizer. With
'--compile', torch.compile fuses log-density and gradient besides, and captures these two by itself;
that takes minutes before the first step. At the end, captured and eager steps are timed by turns.
Without a GPU the steps are eager ones.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from statistics import median

import pyro
import torch
from data import Data, patches
from torch import Tensor
from tqdm import trange
from training import arguments, captured, evaluate, likelihood_step, print_table

from pyro_sinflow import SinusoidalFlow


def train(
    step: Callable[[], Tensor], data: Data, batch: Tensor, rate: Tensor, lr: float, steps: int
) -> None:
    """Takes steps, each with other rows and a learning rate that falls along a cosine.

    Args:
        step: The step.
        data: The rows, on the device of the flow.
        batch: The tensor in which the step finds its rows.
        rate: The tensor in which it finds the learning rate.
        lr: The learning rate at first.
        steps: The number of steps.
    """
    with trange(steps, desc="training") as bar:
        for i in bar:
            # Drawn where the rows are: from the CPU, each step would wait for a copy.
            rows = torch.randint(len(data.train), (len(batch),), device=batch.device)
            batch.copy_(data.train[rows])  # into the memory that the graph reads
            rate.fill_(lr * 0.5 * (1 + math.cos(math.pi * i / steps)))
            loss = step()
            if i % 100 == 0:  # seldom, as the host waits for the value
                bar.set_postfix(loss=f"{float(loss):.2f}", refresh=False)


def gain(eager: Callable[[], Tensor], step: Callable[[], Tensor], rounds: int = 30) -> float:
    """Returns how many times faster than an eager step another one is, measured by turns."""
    times: dict[Callable[[], Tensor], list[float]] = {eager: [], step: []}
    for _ in range(rounds):
        for function, taken in times.items():
            start = time.perf_counter()
            float(function())  # whose value is there when the step is done
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # with the optimizer as well
            taken.append(time.perf_counter() - start)
    return median(times[eager]) / median(times[step])


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the flow, scores it, and says what the graph gained."""
    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5000, help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=128, help="in a batch (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=12, help="of LDU (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="at first (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="by torch.compile")
    args = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    data = Data(*(part.to(device) for part in patches(args.seed)))
    flow = SinusoidalFlow(
        data.train.shape[1],
        transforms=args.blocks,
        conditioner="independent",
        hidden_features=(256, 256),
    ).to(device)
    # What a graph reads and writes stays where it is: a batch is copied into this tensor.
    batch = data.train[: args.rows].clone()
    rate = torch.tensor(args.lr, device=device)

    pyro.enable_validation(False)  # its checks read values, for which a capture cannot wait

    def loss() -> Tensor:
        return -flow().log_prob(batch).mean()

    eager = step = likelihood_step(flow, loss, rate)
    kind = "eager"
    if args.compile:
        # zuko asserts that a tuple is not empty, which the compiler takes for a tensor.
        torch._dynamo.config.rewrite_assert_with_torch_assert = False
        compiled = torch.compile(loss, mode="reduce-overhead")
        step, kind = likelihood_step(flow, compiled, rate), "compiled"
    elif device.type == "cuda":
        step, kind = captured(eager), "captured"  # and three steps for the warm-up

    train(step, data, batch, rate, args.lr, args.steps)
    score, error = evaluate(flow, data.test)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.save(flow.state_dict(), args.out / "gpu.pt")  # before steps are taken to time them
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
