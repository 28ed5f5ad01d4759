"""Derivatives of order 1 to 3, in both directions and every mode of differentiation."""

from itertools import product

import pytest
import torch
import zuko
from conftest import perturb
from torch import nn
from torch.autograd.functional import jacobian

from pyro_sinflow import (
    LDU,
    PixelCNN,
    Sinusoidal,
    SinusoidalFlow,
    SinusoidalTransform,
    Solver,
    TriangularTransform,
    fast_inverse,
)

SMALL = {"hidden_features": (4,), "activation": nn.Tanh, "components": 2, "sinusoids": 2}
BLOCKS = {"conditioner": "independent"}
FLOWS = {
    "scale=False": {**BLOCKS, "scale": False},
    "scale=True": BLOCKS,
    "context_diagonal": {**BLOCKS, "context_diagonal": True},
    "autoregressive": {},
}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def sinusoid(direction, own):
    """A transform with all its parameters as inputs, and those inputs."""
    shape = (4, 3) if own else (3,)
    inputs = [torch.randn(4, 3), *(torch.randn(*shape, 2) for _ in range(3))]
    inputs += [torch.randn(shape), torch.randn(shape)]

    def f(x, *p):
        t = SinusoidalTransform(*p)
        return (t if direction == "forward" else t.inv).call_and_ladj(x)

    return f, inputs


def flow(direction, derivatives=2, **options):
    """A flow as a function of features, context and weights, and those inputs."""
    module = perturb(
        SinusoidalFlow(
            3, 2, transforms=1, solver=Solver(derivatives=derivatives), **SMALL, **options
        ),
        0.1,  # some parameters are multiplied by ten
    )
    names = [n for n, _ in module.named_parameters()]
    inputs = [torch.randn(4, 3), torch.randn(4, 2), *(p.detach() for p in module.parameters())]

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = module

        def forward(self, x, c):
            t = self.flow(c).transform
            return (t if direction == "forward" else t.inv).call_and_ladj(x)

    call = Call()

    def f(x, c, *p):
        named = {f"flow.{n}": q for n, q in zip(names, p, strict=True)}
        return torch.func.functional_call(call, named, (x, c))

    return f, inputs


def directional(f, inputs, direction, order):
    """The derivative of some order of a function in a direction, by repeated reverse mode."""
    inputs = [i.detach().requires_grad_() for i in inputs]
    outputs = f(*inputs)
    value = sum(o.sin().sum() for o in outputs)
    for _ in range(order):
        grads = torch.autograd.grad(
            value, inputs, create_graph=True, allow_unused=True, materialize_grads=True
        )
        value = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
    return value.detach()


def check_orders(f, inputs, orders=(1, 2, 3), h=3e-6):
    """Compares each derivative with central differences of the one before."""
    along = [torch.randn_like(i) for i in inputs]
    for order in orders:

        def lower(steps, order=order):
            moved = [i + steps * h * d for i, d in zip(inputs, along, strict=True)]
            return directional(f, moved, along, order - 1)

        # Of fourth order: those of second order are not accurate enough for steep inverses.
        expected = (8 * (lower(1) - lower(-1)) - (lower(2) - lower(-2))) / (12 * h)
        assert torch.allclose(directional(f, inputs, along, order), expected, rtol=1e-6), order


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_sinusoid_by_reverse_mode(direction, own):
    check_orders(*sinusoid(direction, own))


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_flow_by_reverse_mode(direction, name):
    check_orders(*flow(direction, derivatives=3, **FLOWS[name]))


@pytest.mark.parametrize("name", FLOWS)
def test_two_orders_of_an_inverse_need_no_option(name):
    f, inputs = flow("inverse", **FLOWS[name])
    check_orders(f, inputs, orders=(1, 2))
    with pytest.raises(RuntimeError, match=r"more often than 'Solver\(derivatives=...\)' allows"):
        check_orders(f, inputs, orders=(3,))


HEADS = {
    "sum": torch.sum,
    "squares": lambda x: x.square().sum(),
    "last": lambda x: x[0, -1],
}


@pytest.mark.parametrize("derivatives", [1, 2, 3])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("scaled", [False, True])
def test_one_order_beyond_is_an_error_whatever_is_differentiated(scaled, head, derivatives):
    """Each sequence of derivatives is exact up to the last, which is an error."""
    lower, log_scale = torch.randn(2, 5, 5).tril(-1)
    start = {"weight": torch.tensor(0.9), "y": torch.randn(2, 5)}

    def tau(weight, x):
        shift = (weight * x @ lower.T).sin()
        if not scaled:
            return zuko.transforms.AdditiveTransform(shift)
        scale = 0.5 * (weight * x @ log_scale.T).cos()
        return zuko.transforms.MonotonicAffineTransform(shift, scale)

    def by_passes(weight, y):
        x = torch.zeros_like(y)
        for _ in range(5):
            x = tau(weight, x).inv(y)
        return x

    def by_transform(weight, y):
        solver = Solver(derivatives=derivatives)
        return TriangularTransform(lambda x: tau(weight, x), solver=solver).inv(y)

    def differentiate(inverse, names):
        leaves = {n: t.clone().requires_grad_() for n, t in start.items()}
        value = HEADS[head](inverse(**leaves))
        for name in names:
            (grad,) = torch.autograd.grad(value, leaves[name], create_graph=True)
            value = (grad * torch.linspace(0.5, 1.5, grad.numel()).view_as(grad)).sum()
        return value

    for names in product(start, repeat=derivatives):
        expected = differentiate(by_passes, names)
        assert torch.allclose(differentiate(by_transform, names), expected)
        for last in start:
            with pytest.raises(RuntimeError, match="more often"):
                differentiate(by_transform, (*names, last))


def test_score_matching_through_the_iterative_direction():
    """The loss has two derivatives in x, and its gradient one more."""
    maf = perturb(zuko.flows.MAF(2, transforms=1, hidden_features=(8,), activation=nn.Tanh))
    x = torch.randn(4, 2, requires_grad=True)

    def gradient(flow):
        flow = zuko.lazy.Flow(flow.transform.inv, flow.base)  # scoring is iterative now
        (score,) = torch.autograd.grad(flow().log_prob(x).sum(), x, create_graph=True)
        trace = sum(
            torch.autograd.grad(score[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)
        )
        loss = (trace + 0.5 * score.square().sum(-1)).mean()
        return torch.autograd.grad(
            loss, [*maf.parameters()], materialize_grads=True, allow_unused=True
        )

    with pytest.raises(RuntimeError, match="more often"):
        gradient(fast_inverse(maf))
    fast = gradient(fast_inverse(maf, Solver(derivatives=3)))
    for a, b in zip(fast, gradient(maf), strict=True):
        assert torch.allclose(a, b)


def nested(modes):
    """Nests transforms of torch.func: the first is the innermost."""

    def transform(f):
        for mode in modes:
            f = mode(f)
        return f

    return transform


MODES = {
    "reverse": torch.func.jacrev,
    "forward": torch.func.jacfwd,
}


@pytest.mark.parametrize(
    "modes",
    [
        "forward",
        "reverse forward",
        "forward forward",
        "forward reverse forward",
        "reverse reverse reverse",
        "forward forward forward",
    ],
)
@pytest.mark.parametrize("name", ["sinusoid", "scale=True", "autoregressive"])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_modes_of_torch_func_agree_with_reverse_mode(direction, name, modes):
    if name == "sinusoid":
        f, inputs = sinusoid(direction, own=False)
        inputs = [inputs[0][0], *inputs[1:]]
    else:
        f, inputs = flow(direction, derivatives=3, **FLOWS[name])
        inputs = [inputs[0][0], inputs[1][0], *inputs[2:]]
    inputs[0] = inputs[0].detach()
    x, others = inputs[0], inputs[1:]
    modes = modes.split()

    def scalar(x):
        return sum(o.sin().sum() for o in f(x, *others))

    value = nested([MODES[m] for m in modes])(scalar)(x)
    v = torch.randn(3)
    for _ in modes:
        value = value @ v
    direction = [v, *(torch.zeros_like(o) for o in others)]
    assert torch.allclose(value, directional(f, inputs, direction, len(modes)), rtol=1e-7)


def networks_of_zuko():
    for make in (zuko.flows.MAF, zuko.flows.NSF):
        flow = make(4, transforms=2)
        yield f"fast_inverse({make.__name__})", fast_inverse(perturb(flow))().transform


def transforms():
    image = SinusoidalFlow(
        (1, 2, 2), transforms=1, network=PixelCNN, hidden_features=(4,), **BLOCKS
    )
    return {
        **dict(networks_of_zuko()),
        "SinusoidalFlow": perturb(SinusoidalFlow(4), 0.1)().transform,
        "independent": perturb(SinusoidalFlow(4, transforms=2, **BLOCKS), 0.1)().transform,
        "image": perturb(image, 0.1)().transform,
        "LDU": perturb(LDU(4)),
        "Sinusoidal": perturb(Sinusoidal(4)),
    }


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", transforms())
def test_vectorized_jacobian(name, direction, strategy):
    t = transforms()[name]
    f = t if direction == "forward" else t.inv
    x = torch.randn(1, 2, 2) if name == "image" else torch.randn(4)
    vectorized = jacobian(f, x, vectorize=True, strategy=strategy)
    assert torch.allclose(vectorized, jacobian(f, x), atol=1e-9)


@pytest.mark.parametrize("name", transforms())
def test_batched_gradients_of_a_log_density(name):
    t = transforms()[name]
    x = torch.randn(3, 1, 2, 2) if name == "image" else torch.randn(3, 4)
    x.requires_grad_()
    ladj = (
        t.call_and_ladj(x)[1].flatten(1).sum(-1) if name == "Sinusoidal" else t.call_and_ladj(x)[1]
    )
    (together,) = torch.autograd.grad(
        ladj, x, torch.eye(3), retain_graph=True, is_grads_batched=True
    )
    for i in range(3):
        (one,) = torch.autograd.grad(ladj[i], x, retain_graph=True)
        assert torch.allclose(together[i], one, atol=1e-12)
