"""Flows side by side: those that Tables 1 and 3 of the paper (Wei, 2021) name, on real data.

Each flow gets the same steps, or the same time, and the same batches, optimiser and early stopping
on validation. For each data set a table is printed; all are written to comparison.json. A run that
was interrupted goes on from there, if it is started again with the same options.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import process_time
from timeit import timeit
from typing import Any

import torch
import zuko
from data import TOYS, Data, breast_cancer, digits, patches, toy
from images import prepare
from pyro.distributions.transforms import Permute, block_autoregressive
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from training import Budget, arguments, count, evaluate, fit, print_table, seconds
from zuko.distributions import DiagNormal
from zuko.lazy import Flow, LazyTransform, UnconditionalDistribution
from zuko.transforms import ComposedTransform

from pyro_sinflow import SinusoidalFlow


class Foreign(LazyTransform):
    """Transforms of other packages, made from modules, as one lazy transform of zuko's."""

    def __init__(self, modules: Sequence[Any], wrap: Callable[[Any], Transform]) -> None:
        super().__init__()
        self.parts = [wrap(module) for module in modules]
        self.owners = nn.ModuleList(m for m in modules if isinstance(m, nn.Module))

    def forward(self, c: Tensor | None = None) -> Transform:
        """Returns the transform; there is no context."""
        for part in self.parts:  # what Pyro caches belongs to a graph that may be gone
            part.clear_cache()
        return ComposedTransform(*self.parts)


class Normflow(Transform):
    """A flow of normflows, which goes from noise to data, as the transform from data to noise."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, flow: Any) -> None:
        super().__init__()
        self.flow = flow

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns value and log-determinant, which may be an estimate."""
        import normflows as nf

        if self.flow.training:  # the norms of residual blocks follow their weights
            nf.utils.update_lipschitz(self.flow, 5)
        return self.flow.inverse(x)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the log-determinant, which may be an estimate."""
        return self.call_and_ladj(x)[1]

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.flow(y)[0]


def density(transform: LazyTransform, features: int) -> Flow:
    """Makes a flow of a transform and a standard normal base."""
    moments = {"loc": torch.zeros(features), "scale": torch.ones(features)}
    return Flow(transform, UnconditionalDistribution(DiagNormal, **moments, buffer=True))


def bnaf(features: int) -> Flow:
    """Two block-autoregressive flows of Pyro's, the second in the reversed order."""
    make = partial(block_autoregressive, features, hidden_factors=[8])
    reverse = Permute(torch.arange(features).flip(0))
    return density(Foreign([make(), reverse, make()], lambda transform: transform), features)


def glow(features: int) -> Flow:
    """Steps of Glow for vectors: activation norm, a linear map, an affine coupling."""
    import normflows as nf

    half = features // 2

    def step() -> list[nn.Module]:
        net = nf.nets.MLP([half + features % 2, 64, 64, 2 * half], init_zeros=True)
        return [
            nf.flows.AffineCouplingBlock(net),
            nf.flows.LULinearPermute(features),
            nf.flows.ActNorm(features),
        ]

    return density(Foreign([m for _ in range(8) for m in step()], Normflow), features)


def iresnet(features: int) -> Flow:
    """Residual blocks with Lipschitz networks, whose log-determinant is estimated."""
    import normflows as nf

    def block() -> nn.Module:
        net = nf.nets.LipschitzMLP(
            [features, 64, 64, features], init_zeros=True, lipschitz_const=0.9
        )
        return nf.flows.Residual(net, reduce_memory=False)

    return density(Foreign([block() for _ in range(8)], Normflow), features)


SIZES: dict[str, Any] = {"hidden_features": (64, 64)}
ORDER: dict[str, Any] = {**SIZES, "randperm": True}
SMOOTH: dict[str, Any] = {**ORDER, "activation": nn.SiLU}
FLOWS: dict[str, Callable[[int], Flow]] = {
    "Sinusoidal, LDU blocks": partial(SinusoidalFlow, transforms=3, scale=False, **ORDER),
    "Sinusoidal, scale": partial(SinusoidalFlow, transforms=3, **ORDER),
    # What the documentation advises where rows are few, and where they are many.
    "Sinusoidal, scale, few rows": partial(SinusoidalFlow, transforms=2, sinusoids=8, **SMOOTH),
    "Sinusoidal, scale, many rows": partial(SinusoidalFlow, transforms=3, shortcut=8.0, **ORDER),
    "Sinusoidal, autoregressive": partial(
        SinusoidalFlow, transforms=3, conditioner="autoregressive", **ORDER
    ),
    "MAF": partial(zuko.flows.MAF, transforms=5, **ORDER),
    "MAF, SiLU": partial(zuko.flows.MAF, transforms=5, **SMOOTH),
    "RQ-NSF(AR)": partial(zuko.flows.NSF, transforms=3, **ORDER),
    "RQ-NSF(AR), SiLU": partial(zuko.flows.NSF, transforms=3, **SMOOTH),
    "RQ-NSF(C)": partial(zuko.flows.NSF, transforms=5, passes=2, **ORDER),
    "RealNVP": partial(zuko.flows.RealNVP, transforms=8, randmask=True, **SIZES),
    "NAF": partial(zuko.flows.NAF, transforms=2, **ORDER),
    "NAF, SiLU": partial(zuko.flows.NAF, transforms=2, **SMOOTH),
    "UMNN-MAF": partial(
        zuko.flows.UNAF, transforms=1, network={"hidden_features": (32, 32)}, **SIZES
    ),
    "SOS": partial(zuko.flows.SOSPF, transforms=3, **ORDER),
    "FFJORD": partial(zuko.flows.CNF, exact=False, **SIZES),
    "B-NAF": bnaf,
    "Glow": glow,
    "i-ResNet": iresnet,
}
ESTIMATED = ("FFJORD", "i-ResNet")

TAN = """
TAN (Oliva et al., 2018) has no implementation that is kept. The paper quotes its test NLL of other
data: POWER -0.60, GAS -12.06, HEPMASS 13.78, MINIBOONE 11.01, BSDS300 -159.80."""


def flat_digits() -> Data:
    """Returns digits of 8 by 8 pixels as rows, dequantised and mapped to the real line."""
    data, _ = prepare(digits(), levels=17, margin=0.05)
    return data._replace(**{name: getattr(data, name).flatten(1) for name in data._fields[:3]})


REAL: dict[str, Callable[[], Data]] = {
    "patches": patches,
    "digits": flat_digits,
    "breast cancer": breast_cancer,
}
DATA = REAL | {name: partial(toy, name) for name in TOYS}


def afford(seconds: float, make: Callable[[int], Flow], data: Data, checkpoint: Path) -> Budget:
    """Returns a budget of as many steps as some seconds afford, given what the first 50 take.

    A checkpoint keeps the number of steps that it was begun with.
    """
    if checkpoint.exists():
        return Budget(**torch.load(checkpoint, weights_only=True)["budget"])
    flow, trial = make(data.train.shape[1]), Budget(50)
    fit("warm-up", flow, data, Budget(1))  # the first step of all takes longer
    # Processor time, so that other jobs do not slow one flow more than another.
    spent = timeit(lambda: fit("pace", flow, data, trial), timer=process_time, number=1)
    steps = int(trial.steps * seconds / spent)
    return Budget(max(steps, 1), patience=steps / 3)


def measure(flow: Flow, data: Data, batch: int) -> dict[str, Any]:
    """Returns score, number of parameters, times and round-trip error of a fitted flow."""
    score, error = evaluate(flow, data.test)
    rows, noise = data.train[:batch], torch.randn(1000, data.train.shape[1])

    def step() -> None:
        flow.train().zero_grad()
        flow().log_prob(rows).mean().backward()

    def draw(n: int = 1000) -> Tensor:
        with torch.no_grad():
            return flow.eval()().transform.inv(noise[:n])

    results = {"NLL": -score, "error": error, "parameters": count(flow), "step": seconds(step)}
    try:
        results |= {"samples": seconds(partial(draw, 10), 1), "drawn": 10}
        if results["samples"] < 1:  # or else this has to do, as a lower bound
            results |= {"samples": seconds(draw), "drawn": 1000}
    except (NotImplementedError, KeyError):  # Pyro's block-autoregressive flow has no inverse
        return results | {"samples": None, "round trip": None}
    x, z = draw(10), noise[:10]
    with torch.no_grad():
        back = (flow().transform(x) - z).abs() / (1 + z.abs() + x.abs())
    return results | {"round trip": float(back.max())}


def show(name: str, results: dict[str, dict[str, Any]]) -> None:
    """Prints the table of a data set; times are in training steps of MAF, or the first flow."""
    unit = results.get("MAF", next(iter(results.values())))["step"]
    rows = [
        [
            flow,
            f"{r['NLL']:.2f} ± {r['error']:.2f}",
            f"{r['steps']:,}",
            f"{r['parameters']:,}",
            f"{r['step'] / unit:.1f}",
            "none"
            if r["samples"] is None
            else ("" if r["drawn"] == 1000 else "> ") + f"{r['samples'] / unit:.1f}",
            "" if r["round trip"] is None else f"{r['round trip']:.0e}",
            "estimated" if flow in ESTIMATED else "exact",
        ]
        for flow, r in results.items()
    ]
    columns = ("test NLL", "steps", "parameters", "time of a step", "1,000 samples", "round trip")
    print_table((name, *columns, "log-determinant"), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Fits all flows to all data sets."""
    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=400, help="of each flow, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, help="of processor time for each flow, in place of steps"
    )
    parser.add_argument("--data", nargs="+", choices=DATA, default=[*REAL], help="data sets")
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=[*FLOWS], help="flows")
    args = parser.parse_args(argv)

    args.out.mkdir(parents=True, exist_ok=True)
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    for name in args.data:
        data = DATA[name]()
        tables[name] = {}
        for flow_name in args.flows:
            said, make = f"{name}, {flow_name}", FLOWS[flow_name]
            spent = f"{args.steps} steps" if args.seconds is None else f"{args.seconds:g} s"
            checkpoint = args.out / f"{said}, {spent}, seed {args.seed}.pt"
            try:
                budget = (
                    Budget(args.steps, patience=args.steps / 3)
                    if args.seconds is None
                    else afford(args.seconds, make, data, checkpoint)
                )
                torch.manual_seed(args.seed)
                flow = make(data.train.shape[1])
            except ModuleNotFoundError as error:
                print(f"{flow_name} is left out: it needs '{error.name}', an extra.")
                continue
            flow = fit(said, flow, data, budget, checkpoint)
            tables[name][flow_name] = {"steps": budget.steps, **measure(flow, data, budget.batch)}
        show(name, tables[name])
        (args.out / "comparison.json").write_text(json.dumps(tables, indent=2))
    print(f"{TAN}\n\nWritten to {args.out}")


if __name__ == "__main__":
    main()
