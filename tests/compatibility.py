"""The public things in one form, for the tests behind docs/compatibility.md."""

from collections.abc import Callable
from functools import partial

import pyro.distributions as dist
import torch
import zuko
from conftest import perturb
from torch import Tensor, nn
from torch.distributions import Transform
from zuko.lazy import Flow, UnconditionalTransform
from zuko.transforms import AdditiveTransform

from pyro_sinflow import (
    LDU,
    AutoLDU,
    ConditionalLDU,
    LDUTransform,
    MaskedNetwork,
    Sinusoidal,
    SinusoidalFlow,
    SinusoidalTransform,
    Solver,
    TriangularTransform,
    fast_inverse,
)

SMALL = {"sinusoids": 1, "components": 2, "hidden_features": (8,)}


def normal(*batch: int) -> dist.TorchDistribution:
    return dist.Normal(torch.zeros(*batch, 3), 1.0).to_event(1)


class Subject(nn.Module):
    """One of the public things, as a module that owns its parameters.

    Calling it returns the log-density of x under the flow that maps x to noise explicitly.
    """

    solver: Solver
    context = 0  # the number of context features

    def transform(self, c: Tensor | None = None) -> Transform:
        """The transform of vectors of three features."""
        raise NotImplementedError

    def lazy(self) -> nn.Module:
        """The same for zuko."""
        raise NotImplementedError

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        y, ladj = self.transform(c).call_and_ladj(x)
        ladj = ladj if ladj.ndim < y.ndim else ladj.sum(-1)
        return ladj - 0.5 * y.square().sum(-1)

    def inverse(self, y: Tensor, c: Tensor | None = None) -> Tensor:
        return self.transform(c).inv(y)


class OfSinusoidalTransform(Subject):
    def __init__(self, solver: Solver) -> None:
        super().__init__()
        self.solver = solver
        shapes = [(3, 2), (3, 2), (3, 2), (3,), (3,)]
        self.parts = nn.ParameterList(nn.Parameter(torch.randn(s)) for s in shapes)

    def transform(self, c: Tensor | None = None) -> Transform:
        return SinusoidalTransform(*self.parts, solver=self.solver)

    def lazy(self) -> nn.Module:
        return UnconditionalTransform(SinusoidalTransform, *(p.detach() for p in self.parts))


class OfTriangularTransform(Subject):
    def __init__(self, solver: Solver) -> None:
        super().__init__()
        self.solver = solver
        self.network = MaskedNetwork(3, hidden_features=(8,))

    def conditioner(self, x: Tensor) -> Transform:
        return AdditiveTransform(self.network(x).squeeze(-1))

    def transform(self, c: Tensor | None = None) -> Transform:
        return TriangularTransform(self.conditioner, solver=self.solver)

    def lazy(self) -> nn.Module:
        return UnconditionalTransform(linear, torch.randn(3, 3))


def linear(weight: Tensor) -> TriangularTransform:
    """Shifts each feature by a linear map of those before it."""
    return TriangularTransform(partial(shift, weight))


def shift(weight: Tensor, x: Tensor) -> AdditiveTransform:
    return AdditiveTransform(x @ weight.tril(-1).mT)


class OfLDUTransform(Subject):
    def __init__(self, solver: Solver) -> None:
        super().__init__()
        self.solver = solver
        ascending = torch.arange(3)
        self.upper = OfTriangularTransform(solver)
        self.upper.network = MaskedNetwork(3, order=ascending.flip(0), hidden_features=(8,))
        self.diagonal = OfSinusoidalTransform(solver)
        self.lower = OfTriangularTransform(solver)

    def transform(self, c: Tensor | None = None) -> Transform:
        return LDUTransform(*(p.transform() for p in (self.upper, self.diagonal, self.lower)))

    def lazy(self) -> nn.Module:
        return UnconditionalTransform(block, torch.randn(3, 3))


def block(weight: Tensor) -> LDUTransform:
    return LDUTransform(linear(weight), AdditiveTransform(weight[0]), linear(weight))


class OfModule(Subject):
    """A transform with parameters."""

    def __init__(self, make: Callable[..., nn.Module], solver: Solver) -> None:
        super().__init__()
        self.solver = solver
        self.part = make(solver=solver)

    def transform(self, c: Tensor | None = None) -> Transform:
        return self.part

    def lazy(self) -> nn.Module:
        return self.part


class OfConditionalLDU(OfModule):
    context = 2

    def transform(self, c: Tensor | None = None) -> Transform:
        return self.part(c)


class OfFlow(OfModule):
    context = 2

    def transform(self, c: Tensor | None = None) -> Transform:
        return self.part(c).transform

    def lazy(self) -> nn.Module:
        return self.part.transform


def nsf(solver: Solver) -> Flow:
    nsf = zuko.flows.NSF(3, 2, transforms=1, bins=4, hidden_features=(8,))
    return fast_inverse(nsf, solver)


class OfAutoLDU(Subject):
    def __init__(self, solver: Solver) -> None:
        super().__init__()
        self.guide = AutoLDU(three_latents, **SMALL)
        self.guide()
        for part in self.modules():
            if hasattr(part, "solver"):
                part.solver = solver

    def transform(self, c: Tensor | None = None) -> Transform:
        return self.guide.get_transform()


def three_latents() -> None:
    """A model with three latent numbers, the spread of two of them among them."""
    import pyro

    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    pyro.sample("x", dist.Normal(torch.zeros(2), scale).to_event(1))


FLOW = {"features": 3, "context": 2, "transforms": 1, **SMALL}
LDU_BLOCKS = partial(SinusoidalFlow, **FLOW, conditioner="independent")
AUTOREGRESSIVE = partial(SinusoidalFlow, **FLOW)
# The columns of the table, each with the variants that its cells are tested with.
SUBJECTS: dict[str, dict[str, Callable[[Solver], Subject]]] = {
    "SinusoidalTransform": {"": OfSinusoidalTransform},
    "TriangularTransform": {"": OfTriangularTransform},
    "LDUTransform": {"": OfLDUTransform},
    "LDU, Sinusoidal": {
        "LDU": partial(OfModule, partial(LDU, 3, **SMALL)),
        "Sinusoidal": partial(OfModule, partial(Sinusoidal, 3, 2)),
    },
    "ConditionalLDU": {"": partial(OfConditionalLDU, partial(ConditionalLDU, 3, 2, **SMALL))},
    "SinusoidalFlow": {
        "independent": partial(OfFlow, LDU_BLOCKS),
        "autoregressive": partial(OfFlow, AUTOREGRESSIVE),
    },
    "fast_inverse": {"": partial(OfFlow, nsf)},
    "AutoLDU": {"": OfAutoLDU},
}


def make(column: str, variant: str, solver: Solver = Solver()) -> Subject:
    """Returns a subject whose parameters are away from where they start."""
    # Some parameters of AutoLDU and SinusoidalFlow are multiplied by ten.
    scale = {"AutoLDU": 0.05, "SinusoidalFlow": 0.1}.get(column, 0.2)
    return perturb(SUBJECTS[column][variant](solver), scale)


def inputs(s: Subject, *batch: int) -> tuple[Tensor, Tensor | None]:
    """Features and a context."""
    parameter = next(s.parameters())
    options = {"dtype": parameter.dtype}
    c = torch.randn(*batch, s.context, **options) if s.context else None
    return torch.randn(*batch, 3, **options), c


def directions(s: Subject) -> list[Callable]:
    """Functions of x (or y) and a context: the log-density, and the inverse."""
    return [s.forward, s.inverse]


def parameters(s: Subject) -> list[Tensor]:
    """The parameters of a subject that its transform depends on."""
    return [p for name, p in s.named_parameters() if not name.startswith("part.base")]


def gradients(value: Tensor, s: Subject) -> list[Tensor]:
    options = {"allow_unused": True, "materialize_grads": True}
    return [*torch.autograd.grad(value.sin().sum(), parameters(s), **options)]


def agree(a, b, atol=1e-4) -> None:
    if isinstance(a, list | tuple):
        for first, second in zip(a, b, strict=True):
            agree(first, second, atol)
    else:
        assert a.shape == b.shape
        assert torch.allclose(a, b.to(a.dtype), atol=atol, rtol=1e-3)
