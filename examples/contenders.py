"""The flows of the comparison: those of this package and of Tables 1 and 3 of Wei (2021).

Hidden layers of zuko's flows and ours have 64 units, unless they are resized. The numbers of
transforms were chosen so that steps take similar times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import zuko
from pyro.distributions.transforms import Permute, block_autoregressive
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from zuko.distributions import DiagNormal
from zuko.lazy import Flow, LazyTransform, UnconditionalDistribution
from zuko.transforms import ComposedTransform

from pyro_sinflow import SinusoidalFlow


class Foreign(LazyTransform):
    """Wraps transforms of other packages as one lazy transform of zuko."""

    def __init__(self, modules: Sequence[Any], wrap: Callable[[Any], Transform]) -> None:
        super().__init__()
        self.parts = [wrap(module) for module in modules]
        self.owners = nn.ModuleList(m for m in modules if isinstance(m, nn.Module))

    def forward(self, c: Tensor | None = None) -> Transform:
        """Returns the transform; there is no context."""
        for part in self.parts:  # Pyro's cache may belong to a graph that has been freed
            part.clear_cache()
        return ComposedTransform(*self.parts)


class Normflow(Transform):
    """Wraps a flow of normflows as a transform from data to noise."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, flow: Any) -> None:
        super().__init__()
        self.flow = flow

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns value and log-determinant. The latter may be an estimate."""
        import normflows as nf

        if self.flow.training:  # the norms of residual blocks are updated with their weights
            nf.utils.update_lipschitz(self.flow, 5)
        return self.flow.inverse(x)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the log-determinant. It may be an estimate."""
        return self.call_and_ladj(x)[1]

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.flow(y)[0]


def density(transform: LazyTransform, features: int) -> Flow:
    """Returns a flow with a transform and a standard normal base."""
    moments = {"loc": torch.zeros(features), "scale": torch.ones(features)}
    return Flow(transform, UnconditionalDistribution(DiagNormal, **moments, buffer=True))


def bnaf(features: int) -> Flow:
    """Two block-autoregressive flows of Pyro, the second in reversed order."""
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
    """Residual blocks with Lipschitz networks. Their log-determinant is estimated."""
    import normflows as nf

    def block() -> nn.Module:
        net = nf.nets.LipschitzMLP(
            [features, 64, 64, features], init_zeros=True, lipschitz_const=0.9
        )
        return nf.flows.Residual(net, reduce_memory=False)

    return density(Foreign([block() for _ in range(8)], Normflow), features)


SIZES: dict[str, Any] = {"hidden_features": (64, 64)}
ORDER: dict[str, Any] = {**SIZES, "randperm": True}
BLOCKS: dict[str, Any] = {"conditioner": "independent", **SIZES}
FLOWS: dict[str, Callable[[int], Flow]] = {
    "Sinusoidal": partial(SinusoidalFlow, **SIZES),
    "Sinusoidal, LDU blocks": partial(SinusoidalFlow, **BLOCKS),
    "the paper's LDU blocks": partial(
        SinusoidalFlow, scale=False, linear=False, tails=False, **BLOCKS
    ),
    "MAF": partial(zuko.flows.MAF, transforms=5, **ORDER),
    "RQ-NSF(AR)": partial(zuko.flows.NSF, transforms=3, **ORDER),
    "RQ-NSF(C)": partial(zuko.flows.NSF, transforms=5, passes=2, **ORDER),
    "RealNVP": partial(zuko.flows.RealNVP, transforms=8, randmask=True, **SIZES),
    "NAF": partial(zuko.flows.NAF, transforms=2, **ORDER),
    "UMNN-MAF": partial(
        zuko.flows.UNAF, transforms=1, network={"hidden_features": (32, 32)}, **SIZES
    ),
    "SOS": partial(zuko.flows.SOSPF, transforms=3, **ORDER),
    "FFJORD": partial(zuko.flows.CNF, exact=False, **SIZES),
    "B-NAF": bnaf,
    "Glow": glow,
    "i-ResNet": iresnet,
}


def can_resize(name: str) -> bool:
    """Whether a flow has hidden layers that :func:`resize` can change."""
    return isinstance(FLOWS[name], partial)


def resize(name: str, units: int) -> Callable[[int], Flow]:
    """Returns the constructor of a flow whose hidden layers have the given number of units."""
    make = FLOWS[name]
    return partial(make, hidden_features=(units, units)) if can_resize(name) else make


ESTIMATED = ("FFJORD", "i-ResNet")

TAN = """
TAN (Oliva et al., 2018) has no maintained implementation. The paper quotes its test NLL on other
data: POWER -0.60, GAS -12.06, HEPMASS 13.78, MINIBOONE 11.01, BSDS300 -159.80."""
