"""How fast on a GPU: `python tests/benchmarks/gpu.py --data-root FOLDER` prints one table.

All numbers are ratios of medians, and both sides of each ratio were measured by turns in this run.
It is meant to take less than four minutes on a GPU. On a CPU all sizes are small, which shows that
it runs and nothing else.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pyro
import torch
import zuko
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from zuko.flows import MAF, NSF
from zuko.lazy import Flow

from pyro_sinflow import SinusoidalFlow, fast_inverse, kernels

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from steps import adamw, captured, likelihood_step

Row = tuple[str, float | str, str]  # what, the ratio or why there is none, and the aim

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


class Sizes(NamedTuple):
    """How large all is."""

    features: int = 63
    hidden: tuple[int, ...] = (256, 256)
    blocks: int = 12
    autoregressive: int = 5  # transforms of the conditioner, and of zuko's flows
    few: int = 128
    some: int = 1000
    many: int = 32_768
    steps: int = 5000
    rounds: int = 20
    most: float = 2.0  # seconds that the rounds of a ratio take, once there are three


SMALL = Sizes(5, (8, 8), 2, 2, 4, 6, 16, 3, 3, 0.1)


def wait() -> None:
    """Waits for the GPU."""
    if GPU:
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any]) -> float:
    """Returns the time that a call takes, until the GPU is done."""
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def ratio(function: Callable[[], Any], unit: Callable[[], Any], sizes: Sizes) -> float:
    """Returns the median time of a function over that of a unit, measured by turns."""
    for _ in range(4):  # the first calls compile, and capture graphs
        function(), unit()
    times: list[float] = []
    units: list[float] = []
    while len(times) < 3 or (len(times) < sizes.rounds and sum(times + units) < sizes.most):
        times.append(seconds(function))
        units.append(seconds(unit))
    return median(times) / median(units)


def rows_of(root: Path | None, sizes: Sizes) -> Tensor:
    """Returns standardized rows: patches of BSDS300, or where there is no folder, synthetic ones.

    Patches are prepared as Papamakarios et al. (2017) did: with uniform noise on the levels of
    grey, without their mean and their last pixel.
    """
    rng, d = np.random.default_rng(0), sizes.features
    if root is None:
        mixed = rng.standard_normal((20_000, d)) @ rng.standard_normal((d, d))
        rows = mixed + np.sin(3 * mixed)
    else:
        with np.load(root / "bsds300.npz") as file:
            pixels = file["train"] if GPU else file["train"][:20_000]
        pixels = (pixels + rng.random(pixels.shape, dtype=np.float32)) / 256
        rows = (pixels - pixels.mean(axis=1, keepdims=True))[:, :d]
    rows = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    return torch.as_tensor(rows, dtype=torch.float32, device=DEVICE)


def plain_mlps(sizes: Sizes, outputs: int) -> tuple[nn.ModuleList, Callable[[Tensor], Tensor]]:
    """Returns as many MLPs as LDU blocks have networks, of the same size, and their loss."""
    d = sizes.features
    mlps = [zuko.nn.MLP(d, outputs * d, sizes.hidden) for _ in range(2 * sizes.blocks)]

    def loss(x: Tensor) -> Tensor:
        for mlp in mlps:
            y = mlp(x)
            x = x + (y if outputs == 1 else y[..., :d])
        return x.square().mean()

    return nn.ModuleList(mlps).to(DEVICE), loss


def ldu(sizes: Sizes, scale: bool) -> Flow:
    """Returns a flow of LDU blocks."""
    return SinusoidalFlow(
        sizes.features,
        transforms=sizes.blocks,
        conditioner="independent",
        linear=False,
        tails=False,
        scale=scale,
        hidden_features=sizes.hidden,
    ).to(DEVICE)


def gradient(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Returns a function that computes the gradient of a loss."""
    parameters = [*module.parameters()]

    def step() -> Tensor:
        for p in parameters:
            p.grad = None
        value = loss()
        value.backward()
        return value.detach()

    return step


def peak(step: Callable[[], Any], module: nn.Module) -> int:
    """Returns the largest memory that a step allocates, in bytes."""
    step()
    module.zero_grad(set_to_none=True)
    wait()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    wait()
    return torch.cuda.max_memory_allocated() - before


def gradients(scale: bool, sizes: Sizes) -> Iterator[Row]:
    """Yields what the gradient of a log-density costs."""
    few, many = (torch.randn(n, sizes.features, device=DEVICE) for n in (sizes.few, sizes.many))
    flow = ldu(sizes, scale)
    mlps, floor = plain_mlps(sizes, 1 + scale)
    ours, ours_many = (gradient(flow, lambda x=x: -flow().log_prob(x).mean()) for x in (few, many))
    theirs, theirs_many = (gradient(mlps, partial(floor, x)) for x in (few, many))
    name = f"gradient of LDU, {'scale' if scale else 'shift'}"
    over = f"over {2 * sizes.blocks} plain MLPs"
    value: float | str = ratio(ours, theirs, sizes)
    yield f"{name}, {sizes.few:,} rows, eager, {over}", value, "2.5"
    value = ratio(ours_many, ours, sizes)
    yield f"{name}, {sizes.many:,} rows over {sizes.few:,}, eager", value, "1.3"
    value = peak(ours_many, flow) / peak(theirs_many, mlps) if GPU else "needs a GPU"
    yield f"{name}, peak memory at {sizes.many:,} rows, {over}", value, "none"
    value = "needs a GPU"
    if GPU:
        value = ratio(captured(ours), captured(theirs), sizes)
    yield f"{name}, {sizes.few:,} rows, CUDA graphs, {over}", value, "1.3"


def trained(flow: Flow, rows: Tensor, sizes: Sizes) -> Flow:
    """Trains a flow, in a CUDA graph where there is a GPU."""
    batch, optimizer = rows[: sizes.few].clone(), adamw(flow.parameters(), 1e-3)
    schedule = CosineAnnealingLR(optimizer, sizes.steps)
    step = likelihood_step(optimizer, lambda: -flow().log_prob(batch).mean())
    step = captured(step) if GPU else step
    for _ in range(sizes.steps):
        chosen = torch.randint(len(rows), (sizes.few,), device=DEVICE)
        batch.copy_(rows[chosen])
        step()
        schedule.step()
    return flow.eval()


def inverse(flow: Flow, z: Tensor) -> Tensor:
    """Returns the samples of a flow that belong to noise."""
    return flow().transform.inv(z)


def by_passes(flow: Flow, z: Tensor) -> Tensor:
    """Returns the same by passes through the networks, as without the kernel on a GPU."""
    with patch("pyro_sinflow.autoregressive.substitution_kernel", return_value=None):
        return inverse(flow, z)


def sampling(name: str, rows: Tensor, sizes: Sizes) -> Iterator[Row]:
    """Yields what samples cost, in log-densities."""
    if name == "autoregressive":
        flow = SinusoidalFlow(
            sizes.features,
            transforms=sizes.autoregressive,
            hidden_features=sizes.hidden,
        ).to(DEVICE)
    else:
        flow = ldu(sizes, scale=name == "scale")
    flow = trained(flow, rows, sizes)
    for n in (sizes.some, sizes.many):
        z, x = torch.randn(n, sizes.features, device=DEVICE), rows[torch.arange(n) % len(rows)]
        with torch.no_grad():
            value = ratio(partial(inverse, flow, z), lambda x=x: flow().log_prob(x), sizes)
            yield f"{n:,} samples of {name} over their log-densities", value, "3"
            value = ratio(partial(by_passes, flow, z), partial(inverse, flow, z), sizes)
            yield f"{n:,} samples of {name}: passes over forward substitution", value, "none"


def zukos(make: Callable[..., Flow], rows: Tensor, sizes: Sizes) -> Iterator[Row]:
    """Yields how many times faster than zuko's own inverse the fast one is."""
    flow = make(sizes.features, transforms=sizes.autoregressive, hidden_features=sizes.hidden).to(
        DEVICE
    )
    flow = trained(flow, rows, sizes)
    fast = fast_inverse(flow)
    for n in (sizes.some, sizes.many):
        z = torch.randn(n, sizes.features, device=DEVICE)
        with torch.no_grad():
            value: float | str = ratio(partial(inverse, flow, z), partial(inverse, fast, z), sizes)
        what = f"{n:,} samples of {make.__name__}: zuko's inverse over fast_inverse"
        yield what, value, "at least 10"
        value = "needs a GPU"
        if GPU:
            with torch.no_grad():
                both = (captured(partial(inverse, f, z)) for f in (flow, fast))
                value = ratio(*both, sizes)
        yield f"{what}, both in CUDA graphs", value, "none"


def table(rows: Tensor, sizes: Sizes) -> Iterator[Row]:
    """Yields all rows of the table; what fails leaves out its group, and says why."""
    names = ("shift", "scale", "autoregressive")
    groups = {
        **{f"gradient of LDU, {n}": gradients(n == "scale", sizes) for n in names[:2]},
        **{f"samples of {n}": sampling(n, rows, sizes) for n in names},
        **{f"samples of {m.__name__}": zukos(m, rows, sizes) for m in (MAF, NSF)},
    }
    for name, group in groups.items():
        try:
            yield from group
        except Exception as error:  # such as a GPU that has too little memory
            yield name, f"failed: {str(error).splitlines()[0]}", "none"


def setting(root: Path | None, sizes: Sizes) -> str:
    """Returns on what the table was measured."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    device = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    device_of_all = torch.empty(0, device=DEVICE).device
    names = ("triton", "substitution")
    used = [n for n in names if GPU and kernels.load(n, device_of_all) is not None]
    data = "synthetic rows" if root is None else "patches of BSDS300"
    return (
        f"{device}; torch {torch.__version__}, triton {triton}, kernels that are used: "
        f"{', '.join(used) or 'none'}; {sizes.features} features, hidden units "
        f"{sizes.hidden}; flows trained for {sizes.steps:,} steps on {data}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, help="folder of bsds300.npz (default: made up)")
    parser.add_argument("--steps", type=int, help="of training (default: 5,000 on a GPU)")
    parser.add_argument("--quick", action="store_true", help="small sizes on a GPU as well")
    args = parser.parse_args(argv)

    sizes = Sizes() if GPU and not args.quick else SMALL
    sizes = sizes._replace(steps=args.steps or sizes.steps)
    start = time.perf_counter()
    pyro.set_rng_seed(0)
    rows = rows_of(args.data_root, sizes)
    print(setting(args.data_root, sizes), "\n\n| what | measured | aim |\n|---|---|---|")
    for what, value, aim in table(rows, sizes):
        shown = value if isinstance(value, str) else f"{value:.2f}"
        print(f"| {what} | {shown} | {aim} |", flush=True)
    print(f"\nThis took {time.perf_counter() - start:.0f} seconds.")


if __name__ == "__main__":
    main()
