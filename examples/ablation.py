"""An ablation of Sinusoidal Flows on real data: one change at a time.

For each conditioner, the script fits the default and variants with one change, from several seeds.
It prints the validation NLL of the default in nats, and the difference of each variant to it with
its standard error over seeds. Negative differences are improvements. The last column is the time of
a gradient, in gradients of the default. An interrupted run continues from its last validation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from comparison import DATA, REAL, step_time
from contenders import density
from data import Data
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from training import Budget, arguments, evaluate, fit, positive, print_table
from zuko.lazy import Flow, LazyComposedTransform, LazyTransform, UnconditionalTransform
from zuko.transforms import AdditiveTransform, ComposedTransform, MonotonicAffineTransform

from pyro_sinflow import LazyTriangular, MaskedNetwork, SinusoidalFlow
from pyro_sinflow.element_wise import Asinh
from pyro_sinflow.lazy import LazyAffine, LazySinusoids
from pyro_sinflow.linear import Linear

Scores = dict[str, list[float]]  # of each data set, for each seed


class Equation15(Transform):
    """A sinusoid by Eq. 13 and 15 of the paper, without an inverse."""

    domain = codomain = constraints.real
    bijective = True

    def __init__(self, a: Tensor, b: Tensor, w: Tensor, alpha: Tensor, d: Tensor) -> None:
        super().__init__()
        self.parameters = a, b, w, alpha, d

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns value and log-slope."""
        a, b, w, alpha, d = self.parameters
        t = 2 * a * x.unsqueeze(-1) + 2 * b
        wave = (w / (2 * a) * t.sin()).sum(dim=-1)
        constant = (w / (2 * a) * (2 * b).sin()).sum(dim=-1)
        slope = 1 - alpha * (w * t.cos()).sum(dim=-1)
        return x - alpha * wave + constant + d, slope.log()


class LiteralBlock(LazyTransform):
    """An LDU block by Eq. 17 of the paper, with parameters drawn from normal distributions."""

    def __init__(self, features: int, sinusoids: int = 4, components: int = 4) -> None:
        super().__init__()
        order = torch.arange(features)
        self.upper, self.lower = (
            LazyTriangular(
                MaskedNetwork(features, order=rank),
                features,
                AdditiveTransform,
                [()],
            )
            for rank in (order.flip(0), order)
        )
        self.vectors = nn.Parameter(torch.randn(sinusoids, 3, features, components))
        self.scalars = nn.Parameter(torch.zeros(sinusoids, 2, features))

    def forward(self, c: Tensor | None = None) -> Transform:
        """Returns the block."""
        sinusoids = [
            Equation15(nn.functional.softplus(a), b, w.softmax(dim=-1), residual.tanh(), d)
            for (a, b, w), (residual, d) in zip(self.vectors, self.scalars, strict=True)
        ]
        return ComposedTransform(self.upper(), *sinusoids, self.lower())


def literal(features: int) -> Flow:
    """Returns a flow of three of the paper's blocks."""
    return density(LazyComposedTransform(*(LiteralBlock(features) for _ in range(3))), features)


def hybrid(features: int, transforms: int = 5) -> Flow:
    """Returns the default with networks for affine maps only, and free sinusoids after each."""
    parts: list[nn.Module] = [UnconditionalTransform(Asinh, torch.zeros(features))]
    order = torch.arange(features)
    for _ in range(transforms):
        network = MaskedNetwork(features, outputs=2, order=order)
        parts += [
            UnconditionalTransform(Linear, torch.zeros(features, features)),
            LazyTriangular(network, features, MonotonicAffineTransform, [(), ()]),
            LazySinusoids(torch.Size([features])),
        ]
        order = order.flip(0)
    parts.append(LazyAffine(torch.zeros(features, 2), 0, (), None))
    return density(LazyComposedTransform(*parts), features)


def starts(flow: Flow) -> Iterator[Tensor]:
    """Yields the initial parameters of all sinusoids: free ones, and biases of networks."""
    for module in flow.modules():
        if isinstance(module, LazySinusoids):
            yield module.parameter.data
        elif isinstance(module, LazyTriangular) and len(module.shapes) == 3:
            bias = module.network.bias.data.unflatten(0, (-1, module.outputs))
            yield bias[:, 2:].unflatten(1, module.shapes[2])


def wave(flow: Flow, factor: float) -> Flow:
    """Multiplies the initial frequencies of sinusoids."""
    for parameter in starts(flow):
        frequency = parameter[..., : parameter.shape[-1] // 3]
        frequency.copy_((factor * nn.functional.softplus(frequency)).expm1().log())
    return flow


def normal(flow: Flow, what: str) -> Flow:
    """Draws initial frequencies and phases, or alpha, from normal distributions."""
    for parameter in starts(flow):
        k = parameter.shape[-1] // 3
        part = slice(2 * k) if what == "waves" else slice(3 * k, 3 * k + 1)
        parameter[..., part] = torch.randn_like(parameter[..., part])
    return flow


def without_affine(flow: Flow, features: int) -> Flow:
    """Removes the affine map next to the noise."""
    return density(LazyComposedTransform(*flow.transform.transforms[:-1]), features)


def groups(flow: Flow, kind: type[nn.Module], rate: float, factor: float) -> list[dict[str, Any]]:
    """Returns groups of parameters with another learning rate for a type of modules."""
    modules = (module for module in flow.modules() if isinstance(module, kind))
    own = [p for module in modules for p in module.parameters(recurse=False)]
    others = [p for p in flow.parameters() if all(p is not q for q in own)]
    return [{"params": others}, {"params": own, "lr": factor * rate}]


class Case(NamedTuple):
    """A flow and the options of its fit."""

    make: Callable[[int], Flow]
    budget: Budget
    groups: Callable[[Flow], Any] = lambda flow: flow.parameters()


BLOCKS = partial(SinusoidalFlow, conditioner="independent")
DEFAULTS: dict[str, Callable[..., Flow]] = {
    "default": SinusoidalFlow,
    "LDU blocks": BLOCKS,
    "the paper's LDU blocks": partial(BLOCKS, scale=False, linear=False, tails=False),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "no linear maps": {"linear": False},
    "no asinh": {"tails": False},
    "random order": {"randperm": True},
    "ELU": {"activation": nn.ELU},
    "GELU": {"activation": nn.GELU},
    "SiLU": {"activation": nn.SiLU},
    "residual networks": {"residual": True},
    "networks twice as wide": {"hidden_features": (128, 128)},
    "networks of three layers": {"hidden_features": (64, 64, 64)},
    "two transforms": {"transforms": 2},
    "six transforms": {"transforms": 6},
    "one sinusoid": {"sinusoids": 1},
    "eight sinusoids": {"sinusoids": 8},
    "two components": {"components": 2},
    "four sinusoids of two components": {"sinusoids": 4, "components": 2},
    "six sinusoids of one component": {"sinusoids": 6, "components": 1},
    "eight components": {"components": 8},
    "least slope 0.05": {"min_slope": 0.05},
    "scales from 0.1 to 10": {"max_scale": 10.0},
}
BUDGETS: dict[str, Callable[[Budget], Budget]] = {
    "half the learning rate": lambda budget: replace(budget, lr=budget.lr / 2),
    "twice the learning rate": lambda budget: replace(budget, lr=budget.lr * 2),
    "no clipping of gradients": lambda budget: replace(budget, clip=math.inf),
    "weight decay 0.1": lambda budget: replace(budget, weight_decay=0.1),
    "averaged weights": lambda budget: replace(budget, average=0.99),
}


def cases(conditioner: str, budget: Budget) -> dict[str, Case]:
    """Returns the flow without a change, and with each change."""
    make = DEFAULTS[conditioner]
    found = {"no change": Case(make, budget)}
    found |= {name: Case(partial(make, **options), budget) for name, options in OPTIONS.items()}
    found |= {name: Case(make, change(budget)) for name, change in BUDGETS.items()}
    for name, factor in (("half the frequencies", 0.5), ("twice the frequencies", 2.0)):
        found[name] = Case(lambda features, factor=factor: wave(make(features), factor), budget)
    for name, what in (
        ("normal initial frequencies and phases", "waves"),
        ("normal initial residual weights", "alpha"),
    ):
        found[name] = Case(lambda features, what=what: normal(make(features), what), budget)
    if conditioner == "default":
        return found | {"five affine maps, with free sinusoids": Case(hybrid, budget)}
    found["no affine map"] = Case(lambda features: without_affine(make(features), features), budget)
    for name, kind, factor in (
        ("sinusoids learn 5 times faster", LazySinusoids, 5.0),
        ("affine map learns 10 times slower", LazyAffine, 0.1),
    ):
        grouped = partial(groups, kind=kind, rate=budget.lr, factor=factor)
        found[name] = Case(make, budget, grouped)
    if conditioner == "the paper's LDU blocks":
        for name in ("scales from 0.1 to 10", "no linear maps", "no asinh"):  # the flow has none
            del found[name]
        found["scales in L and U"] = Case(partial(make, scale=True), budget)
        found["the paper, literally"] = Case(literal, budget)
    return found


def slowdown(make: Callable[[int], Flow], default: Callable[[int], Flow], data: Data) -> float:
    """Returns the time of a gradient of a flow, in gradients of the default."""
    rows = data.train[:128]
    flow, unit = make(rows.shape[1]), default(rows.shape[1])
    return step_time(flow, rows, 10) / step_time(unit, rows, 10)


def show(conditioner: str, scores: dict[str, Scores], times: dict[str, float]) -> None:
    """Prints the table of a conditioner."""

    def cell(change: str, name: str) -> str:
        default, changed = scores["no change"][name], scores[change][name]
        if change == "no change":
            return f"{mean(default):.2f}"
        differences = [b - a for a, b in zip(default, changed, strict=True)]
        if len(differences) == 1:
            return f"{differences[0]:+.2f}"
        return f"{mean(differences):+.2f} ± {stdev(differences) / len(differences) ** 0.5:.2f}"

    names = [*scores["no change"]]
    rows = [
        [change, *(cell(change, n) for n in names), f"{times[change]:.2f}"] for change in scores
    ]
    print_table((conditioner, *names, "time"), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Fits all flows to all data sets, from all seeds."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--seeds", type=positive, default=3, help="seeds of each fit (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=positive, default=400, help="of each flow (default: %(default)s)"
    )
    parser.add_argument(
        "--lr", type=float, default=6e-3, help="learning rate (default: %(default)s)"
    )
    parser.add_argument(
        "--clip", type=float, default=10.0, help="largest norm of a gradient (default: %(default)s)"
    )
    parser.add_argument("--data", nargs="+", choices=DATA, default=[*REAL], help="data sets")
    parser.add_argument("--data-root", type=Path, help="folder of 'uci.npz' and 'bsds300.npz'")
    parser.add_argument(
        "--conditioners",
        nargs="+",
        choices=DEFAULTS,
        default=[*DEFAULTS],
        help="conditioners (default: all)",
    )
    parser.add_argument("--changes", nargs="+", help="changes (default: all)")
    args = parser.parse_args(argv)

    args.out.mkdir(parents=True, exist_ok=True)
    sets = {name: DATA[name](args.data_root) for name in args.data}
    budget = Budget(args.steps, lr=args.lr, clip=args.clip, patience=args.steps / 3)
    results: dict[str, dict[str, Scores]] = {}
    for conditioner in args.conditioners:
        results[conditioner], times = {}, {}
        for change, case in cases(conditioner, budget).items():
            if args.changes and change not in ("no change", *args.changes):
                continue
            scores: Scores = {name: [] for name in sets}
            results[conditioner][change] = scores
            for name, data in sets.items():
                for seed in range(args.seeds):
                    torch.manual_seed(seed)
                    flow = case.make(data.train.shape[1])
                    said = f"{name}, {conditioner}, {change}, seed {seed}"
                    path = args.out / f"{said}.pt"
                    fit(said, flow, data, case.budget, path, case.groups(flow))
                    scores[name].append(-evaluate(flow, data.validation)[0])
            times[change] = mean(
                slowdown(case.make, DEFAULTS[conditioner], d) for d in sets.values()
            )
        show(conditioner, results[conditioner], times)
        (args.out / "ablation.json").write_text(json.dumps(results, indent=2))
    print(f"\nWritten to {args.out}")


if __name__ == "__main__":
    main()
