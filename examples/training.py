"""Functions that several examples use: fits, scores, times, tables and arguments."""

from __future__ import annotations

import argparse
import copy
import math
import time
import timeit
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from data import Data
from pyro.infer import ELBO, MCMC, NUTS, SVI
from pyro.optim import ClippedAdam
from steps import adamw, captured, likelihood_step, use_device
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm, trange
from zuko.lazy import Flow

from pyro_sinflow import record_inversions


@dataclass(frozen=True)
class Budget:
    """The options of a fit of a flow.

    Args:
        steps: The number of steps of the optimizer, AdamW.
        batch: The number of rows of each step.
        lr: The initial learning rate. It falls to zero along a cosine.
        weight_decay: The weight decay.
        every: The number of steps from one validation to the next.
        patience: The number of steps without a better validation score after which the fit stops.
        clip: The largest norm of a gradient; longer ones are scaled down to it.
        average: The decay of an exponential moving average of the weights, which then takes their
            place in validation and in the result, or zero for none.
    """

    steps: int
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.0
    every: int = 50
    patience: float = math.inf
    clip: float = 10.0
    average: float = 0.0


def fit(
    name: str,
    flow: Flow,
    data: Data,
    budget: Budget,
    checkpoint: Path | None = None,
    parameters: Iterable[Any] | None = None,
) -> Flow:
    """Fits a flow by maximum likelihood, and leaves it with the weights that validated best.

    With a checkpoint, an interrupted fit continues from its last validation and, on a CPU, reaches
    the same result as one without interruption. The result of a finished fit is read from the file.
    On a GPU, each step is a CUDA graph.

    Args:
        name: The text of the progress bar.
        flow: The flow.
        data: The data set, on the device of the flow.
        budget: The options of the fit.
        checkpoint: The file to write, and to resume from if it exists.
        parameters: The parameters, or groups of them, to optimize. If :py:`None`, all parameters.

    Returns:
        The flow, in evaluation mode.

    Raises:
        ValueError: If the checkpoint has another budget.
        RuntimeError: If the checkpoint is of another flow.
    """
    optimizer = adamw(
        flow.parameters() if parameters is None else parameters, budget.lr, budget.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps)
    validation = data.validation[:: max(len(data.validation) // 2000, 1)]
    parts = {"flow": flow, "optimizer": optimizer, "schedule": schedule}
    result = flow
    if budget.average:
        averaged = AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(budget.average))
        parts["averaged"], result = averaged, averaged.module
    step, best, best_step, weights = 0, -math.inf, 0, copy.deepcopy(result.state_dict())
    begin = time.process_time()
    if checkpoint is not None and checkpoint.exists():
        saved = read(checkpoint)
        if saved["budget"] != asdict(budget):
            raise ValueError(
                f"'{checkpoint}' should have the budget {asdict(budget)}, got {saved['budget']}: "
                "delete it, or write to another folder."
            )
        for key, part in parts.items():
            part.load_state_dict(saved[key])
        use_device(optimizer)
        step, best, best_step, weights = saved["progress"]
        torch.set_rng_state(saved["random"])
        begin -= saved["seconds"]

    batch = data.train.new_empty(budget.batch, *data.train.shape[1:])
    take = likelihood_step(optimizer, lambda: -flow().log_prob(batch).mean(), budget.clip)
    if batch.is_cuda:
        take = captured(take)
    patience = max(budget.patience, budget.every)  # at least one validation
    with tqdm(desc=name, total=budget.steps, initial=step) as bar:
        while step < budget.steps and step - best_step < patience:
            rows = torch.randint(len(data.train), (budget.batch,))
            batch.copy_(data.train[rows.to(batch.device)])
            flow.train()
            try:
                take()
            except ValueError:  # torch.distributions raises it for values that are not finite
                if step == 0:
                    raise
                break  # the fit has diverged
            if budget.average:
                averaged.update_parameters(flow)
            schedule.step()
            step += 1
            bar.update()
            if step % budget.every and step < budget.steps:
                continue
            score, _ = evaluate(result, validation)
            if score > best:
                best, best_step, weights = score, step, copy.deepcopy(result.state_dict())
            bar.set_postfix(validation=f"{score:.2f}")
            if checkpoint is not None:
                saved = {key: part.state_dict() for key, part in parts.items()}
                saved |= {"budget": asdict(budget), "random": torch.get_rng_state()}
                saved |= {"progress": (step, best, best_step, weights)}
                saved |= {"seconds": time.process_time() - begin}
                # Replace the file in one step: an interruption must not leave a partial file.
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
    """Returns the number of steps that fit into some processor time, by the time of 30 steps.

    If there is a checkpoint, its number of steps is returned.
    """
    if checkpoint.exists():
        return read(checkpoint)["budget"]["steps"]
    flow, trial = make(data.train.shape[1]), replace(budget, steps=30, every=30)
    # The shortest of several processor times, so that other jobs affect it less.
    times = timeit.repeat(
        lambda: fit("pace", flow, data, trial), timer=time.process_time, number=1, repeat=4
    )
    return max(int(trial.steps * seconds / min(times)), 1)


def tune(
    run: Callable[..., dict[str, Any]],
    keys: Sequence[tuple[Hashable, ...]],
    choices: Sequence[Any],
    seeds: int,
    score: Callable[[dict[str, Any]], float],
    jobs: int = 1,
) -> dict[Any, list[dict[str, Any]]]:
    """Chooses a learning rate, or other options, by the first seed, for the other seeds.

    Args:
        run: A function that runs a fit and returns its results, given the entries of a key, one of
            the choices and a seed.
        keys: What to fit.
        choices: What to choose from, such as learning rates.
        seeds: The number of seeds.
        score: The score of the results of a fit. The choice with the highest one is taken.
        jobs: The number of fits at a time.

    Returns:
        The results for each key, in the order of the seeds.
    """
    with ProcessPoolExecutor(jobs) as pool:
        first = [(k, choice, pool.submit(run, *k, choice, 0)) for k in keys for choice in choices]
        best: dict[Any, tuple[Any, dict[str, Any]]] = {}
        for key, choice, job in tqdm(first, "first seed"):
            if key not in best or score(job.result()) > score(best[key][1]):
                best[key] = choice, job.result()
        results = {key: [result] for key, (_, result) in best.items()}
        others = [
            (key, pool.submit(run, *key, best[key][0], seed))
            for seed in range(1, seeds)
            for key in keys
        ]
        for key, job in tqdm(others, "other seeds"):
            results[key].append(job.result())
    return results


def read(checkpoint: Path) -> dict[str, Any]:
    """Reads a checkpoint, which may come from another device."""
    return torch.load(checkpoint, map_location="cpu", weights_only=True)


def restore(flow: Flow, checkpoint: Path) -> Flow:
    """Loads the weights that validated best from a checkpoint into a flow."""
    *_, weights = read(checkpoint)["progress"]
    flow.load_state_dict(weights)
    return flow


def spent(checkpoint: Path) -> float:
    """Returns the total processor time of the fit of a checkpoint."""
    return read(checkpoint)["seconds"]


def passes(name: str, flow: Flow, batches: int, size: int) -> list[int]:
    """Returns the number of passes of each triangular map, for several batches of samples."""
    with torch.no_grad(), record_inversions() as inversions:
        for _ in trange(batches, desc=name):
            flow().sample((size,))
    return [i.iterations for i in inversions if i.problem == "triangular"]


def evaluate(flow: Flow, rows: Tensor) -> tuple[float, float]:
    """Returns the mean log-likelihood of rows, in nats, and its standard error."""
    flow.eval()
    with torch.no_grad():
        try:
            scores = torch.cat([flow().log_prob(part) for part in rows.split(2000)])
        except ValueError:  # torch.distributions raises it for values that are not finite
            return -math.inf, math.nan
    return float(scores.mean()), float(scores.std()) / len(scores) ** 0.5


def spread(values: Sequence[float], error: float) -> tuple[float, float]:
    """Returns the mean over seeds and its standard error. For one seed, the error is as given."""
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
        name: The text of the progress bar.
        model: The model.
        guide: The guide.
        loss: The loss.
        lr: The initial learning rate.
        steps: The number of steps of the optimizer, ClippedAdam.
        batch: A function that returns the arguments of model and guide for a step.
        last: The final learning rate, as a fraction of the initial one.
    """
    svi = SVI(model, guide, ClippedAdam({"lr": lr, "lrd": last ** (1 / steps)}), loss)
    with trange(steps, desc=name) as bar:
        for _ in bar:
            value = svi.step(*batch())
            bar.set_postfix(elbo=f"{-value:.2f}", refresh=False)


def walk(model: Callable[[], None], draws: int) -> tuple[dict[str, Tensor], int]:
    """Runs NUTS. Returns the draws, and the number of gradients after the warm-up."""
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
    """Returns the shortest time of several calls. After 3 seconds there are no further calls."""
    times: list[float] = []
    while len(times) < rounds and sum(times) < 3:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def positive(text: str) -> int:
    """Reads an option that is an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise ArgumentTypeError(f"should be an integer of at least 1, got {text}")
    return value


def arguments(description: str | None, out: str = "folder for the results") -> ArgumentParser:
    """Returns a parser of arguments with the option '--out', which all scripts have."""
    parser = ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help=out)
    return parser
