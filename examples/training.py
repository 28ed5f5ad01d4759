"""What the examples share: fits of flows and guides, scores, times, tables and arguments."""

from __future__ import annotations

import argparse
import copy
import math
import time
import timeit
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from data import Data
from pyro.infer import ELBO, MCMC, NUTS, SVI
from pyro.optim import ClippedAdam
from torch import Tensor, nn
from tqdm import tqdm, trange
from zuko.lazy import Flow

from pyro_sinflow import record_inversions


@dataclass(frozen=True)
class Budget:
    """What the fit of a flow may spend, and how.

    Args:
        steps: The number of steps of the optimizer, AdamW.
        batch: The number of rows in each.
        lr: The learning rate at first. It falls to zero along a cosine.
        weight_decay: The weight decay.
        every: The number of steps from one validation to the next.
        patience: The number of steps without a better validation after which the fit stops.
        clip: The norm to which longer gradients are cut.
    """

    steps: int
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.0
    every: int = 50
    patience: float = math.inf
    clip: float = 10.0


def fit(
    name: str,
    flow: Flow,
    data: Data,
    budget: Budget,
    checkpoint: Path | None = None,
    parameters: Iterable[Any] | None = None,
) -> Flow:
    """Fits a flow by maximum likelihood, and leaves it with the weights that validated best.

    With a checkpoint, a fit that was interrupted goes on from its last validation to the result
    that it would have reached uninterrupted, and a finished one is read from the file.

    Args:
        name: What the progress bar says.
        flow: The flow.
        data: The rows to fit, and those to validate.
        budget: What to spend.
        checkpoint: The file to resume from, where it exists, and to write.
        parameters: What the optimizer moves, perhaps in groups. If :py:`None`, all parameters.

    Returns:
        The flow, in evaluation mode.

    Raises:
        ValueError: If the checkpoint is that of another budget.
        RuntimeError: If the checkpoint is that of another flow.
    """
    optimizer = torch.optim.AdamW(
        flow.parameters() if parameters is None else parameters,
        lr=budget.lr,
        weight_decay=budget.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps)
    validation = data.validation[:: max(len(data.validation) // 2000, 1)]
    parts = {"flow": flow, "optimizer": optimizer, "schedule": schedule}
    step, best, best_step, weights = 0, -math.inf, 0, copy.deepcopy(flow.state_dict())
    begin = time.process_time()
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["budget"] != asdict(budget):
            raise ValueError(
                f"'{checkpoint}' should be of {asdict(budget)}, got one of {saved['budget']}: "
                "delete it, or write to another folder."
            )
        for key, part in parts.items():
            part.load_state_dict(saved[key])
        step, best, best_step, weights = saved["progress"]
        torch.set_rng_state(saved["random"])
        begin -= saved["seconds"]

    patience = max(budget.patience, budget.every)  # what has not been validated is not given up
    with tqdm(desc=name, total=budget.steps, initial=step) as bar:
        while step < budget.steps and step - best_step < patience:
            rows = torch.randint(len(data.train), (budget.batch,))
            loss = -flow.train()().log_prob(data.train[rows]).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(flow.parameters(), budget.clip)
            optimizer.step()
            schedule.step()
            step += 1
            bar.update()
            if step % budget.every and step < budget.steps:
                continue
            score, _ = evaluate(flow, validation)
            if score > best:
                best, best_step, weights = score, step, copy.deepcopy(flow.state_dict())
            bar.set_postfix(validation=f"{score:.2f}")
            if checkpoint is not None:
                saved = {key: part.state_dict() for key, part in parts.items()}
                saved |= {"budget": asdict(budget), "random": torch.get_rng_state()}
                saved |= {"progress": (step, best, best_step, weights)}
                saved |= {"seconds": time.process_time() - begin}
                # In one step, so that an interruption leaves no partial file.
                torch.save(saved, partial := checkpoint.with_suffix(".partial"))
                partial.replace(checkpoint)

    flow.load_state_dict(weights)
    return flow.eval()


def afford(
    seconds: float,
    make: Callable[[int], Flow],
    data: Data,
    checkpoint: Path,
    budget: Budget = Budget(30),
) -> int:
    """Returns how many steps some seconds of the processor afford, given what 30 steps take.

    A checkpoint keeps the number of steps that it was begun with.
    """
    if checkpoint.exists():
        return torch.load(checkpoint, weights_only=True)["budget"]["steps"]
    flow, trial = make(data.train.shape[1]), replace(budget, steps=30, every=30)
    # Processor time, and the shortest of several, so that other jobs do not slow one flow more.
    times = timeit.repeat(
        lambda: fit("pace", flow, data, trial), timer=time.process_time, number=1, repeat=4
    )
    return max(int(trial.steps * seconds / min(times)), 1)


def restore(flow: Flow, checkpoint: Path) -> Flow:
    """Gives a flow the weights that validated best in the fit of a checkpoint."""
    *_, weights = torch.load(checkpoint, weights_only=True)["progress"]
    flow.load_state_dict(weights)
    return flow


def spent(checkpoint: Path) -> float:
    """Returns the processor time of the fit of a checkpoint, with all its interruptions."""
    return torch.load(checkpoint, weights_only=True)["seconds"]


def passes(name: str, flow: Flow, batches: int, size: int) -> list[int]:
    """Returns how many passes each triangular map took to draw some samples at a time."""
    with torch.no_grad(), record_inversions() as inversions:
        for _ in trange(batches, desc=name):
            flow().sample((size,))
    return [i.iterations for i in inversions if i.problem == "triangular"]


def likelihood_step(
    flow: Flow, loss: Callable[[], Tensor], rate: Tensor, clip: float = 10.0
) -> Callable[[], Tensor]:
    """Returns a step of maximum likelihood, by AdamW, that a CUDA graph can capture.

    Args:
        flow: The flow.
        loss: Returns the loss of the present batch, which it finds in the same tensor each time.
        rate: The learning rate, with shape (), for the caller to overwrite.
        clip: The norm to which longer gradients are cut.

    Returns:
        A function that takes a step, and returns the loss before it.
    """
    # A graph repeats what it did to the same addresses: the optimizer has to count its steps on
    # the GPU, and a learning rate that was a number would stay what it was.
    parameters = [*flow.parameters()]
    capturable = parameters[0].is_cuda
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0, capturable=capturable)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)  # so that the graph writes gradients, and adds none
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, clip)  # which reads no values, but for its errors
        optimizer.step()
        return value.detach()  # nodes of autograd that outlive a step remember its stream

    return step


def captured(step: Callable[[], Tensor], warm_up: int = 3) -> Callable[[], Tensor]:
    """Captures a step in a CUDA graph, which launches all of its kernels at once.

    Nothing in the step may read values, so that validation has to be off, and no tensor that it
    uses may move.

    Args:
        step: The step, which returns a tensor.
        warm_up: The number of steps that are taken before, at least one.

    Returns:
        A function that replays the step, and returns the same tensor each time, with a new value.
    """
    # A capture takes another stream than the default one, of which no node may be left over: the
    # warm-up takes that stream, too. It compiles Triton's kernels, makes workspaces of cuBLAS and
    # the state of the optimizer, none of which may happen in a capture.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = step()  # which records the kernels, and runs none

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def evaluate(flow: Flow, rows: Tensor) -> tuple[float, float]:
    """Returns the mean log-likelihood of rows, in nats, and its standard error."""
    flow.eval()
    with torch.no_grad():
        try:
            scores = torch.cat([flow().log_prob(part) for part in rows.split(2000)])
        except ValueError:  # by torch.distributions, of images that are not finite
            return -math.inf, math.nan
    return float(scores.mean()), float(scores.std()) / len(scores) ** 0.5


def spread(values: Sequence[float], error: float) -> tuple[float, float]:
    """Returns the mean over seeds and its standard error; of one seed, the given error."""
    if len(values) > 1:
        error = stdev(values) / len(values) ** 0.5
    return mean(values), error


def count(flow: Flow) -> int:
    """Returns the number of parameters."""
    return sum(p.numel() for p in flow.parameters())


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table in Markdown."""
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    print("\n" + "\n".join(lines), flush=True)


def infer(
    name: str,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    loss: ELBO,
    lr: float,
    steps: int,
    batch: Callable[[], Sequence[Any]] = tuple,
    last: float = 0.02,
) -> None:
    """Fits a guide by stochastic variational inference.

    Args:
        name: What the progress bar says.
        model: The model.
        guide: The guide.
        loss: The loss.
        lr: The learning rate at first.
        steps: The number of steps of the optimizer, ClippedAdam.
        batch: Returns the arguments of model and guide for a step.
        last: The share of the learning rate that is left at the end.
    """
    svi = SVI(model, guide, ClippedAdam({"lr": lr, "lrd": last ** (1 / steps)}), loss)
    with trange(steps, desc=name) as bar:
        for _ in bar:
            value = svi.step(*batch())
            bar.set_postfix(elbo=f"{-value:.2f}", refresh=False)


def walk(model: Callable[[], None], draws: int) -> tuple[dict[str, Tensor], int]:
    """Draws by NUTS, and returns the draws and the number of gradients after the warm-up."""
    count = begin = 0

    def counted() -> None:
        nonlocal count
        count += 1
        model()

    def note(kernel: NUTS, samples: Any, stage: str, i: int) -> None:
        nonlocal begin
        if stage == "Warmup":
            begin = count

    kernel = NUTS(counted, max_tree_depth=8)
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=draws // 2, hook_fn=note)
    mcmc.run()
    return mcmc.get_samples(), count - begin


def seconds(function: Callable[[], Any], rounds: int = 5) -> float:
    """Returns the time of the shortest round; what takes long has but one."""
    times: list[float] = []
    while len(times) < rounds and sum(times) < 3:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def arguments(description: str | None, out: str = "folder for the results") -> ArgumentParser:
    """Returns a parser of a script's arguments, with the folder that all scripts ask for."""
    parser = ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help=out)
    return parser
