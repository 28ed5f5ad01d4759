"""Derivatives of both directions: to second order, under torch.func, and at constant memory."""

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import zuko
from conftest import perturb
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from pyro_sinflow import (
    LDU,
    ConditionalLDU,
    FastInverse,
    SinusoidalFlow,
    SinusoidalTransform,
    Solver,
    TriangularTransform,
    record_inversions,
)

exact = Solver()  # aims at round-off


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def leaves(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def block(**options):
    options = {"hidden_features": (4,), "activation": nn.Tanh, "components": 2} | options
    return perturb(ConditionalLDU(3, 2, sinusoids=1, solver=exact, **options), 0.5)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_sinusoid(direction):
    inputs = leaves((4, 2), (2, 3), (2, 3), (3,), (2,), ())

    def f(x, *p):
        t = SinusoidalTransform(*p, solver=exact)
        return (t if direction == "forward" else t.inv).call_and_ladj(x)

    assert gradcheck(f, inputs, check_forward_ad=True)
    assert gradgradcheck(f, inputs)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("options", [{"scale": False}, {"context_diagonal": True}])
def test_block(direction, options):
    t = block(**options)
    inputs = (*leaves((2, 3), (2,)), *t.parameters())

    def f(x, c, *_):
        return (t(c) if direction == "forward" else t(c).inv).call_and_ladj(x)

    assert gradcheck(f, inputs, fast_mode=True)
    assert gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_autoregressive(direction):
    flow = perturb(
        SinusoidalFlow(
            3,
            2,
            transforms=2,
            sinusoids=1,
            components=2,
            hidden_features=(4,),
            activation=nn.Tanh,
            solver=exact,
        )
    )
    inputs = (*leaves((3,), (2,)), *flow.parameters())

    def f(x, c, *_):
        t = flow(c).transform
        return (t if direction == "forward" else t.inv).call_and_ladj(x)

    assert gradcheck(f, inputs, fast_mode=True)
    assert gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("univariate", ["affine", "spline"])
def test_zukos_own_weights(univariate):
    options = (
        {}
        if univariate == "affine"
        else {
            "univariate": zuko.transforms.MonotonicRQSTransform,
            "shapes": [(3,), (3,), (2,)],
        }
    )
    t = FastInverse(
        zuko.flows.MaskedAutoregressiveTransform(
            3, 2, hidden_features=(8,), activation=nn.Tanh, **options
        ),
        exact,
    )
    inputs = (*leaves((2, 3), (2,)), *t.parameters())
    assert gradcheck(lambda y, c, *_: t(c).inv(y), inputs, fast_mode=True)


def test_gradients_agree_with_those_of_zukos_unrolled_passes():
    ours = FastInverse(zuko.flows.MaskedAutoregressiveTransform(6))
    y = torch.randn(5, 6)
    grads = [
        torch.autograd.grad(t().inv(y).square().sum(), [*ours.parameters()], retain_graph=True)
        for t in (ours, ours.transform)
    ]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("size", [1e-9, 1e-200, 1e12])
def test_gradient_of_samples_is_as_exact_for_any_loss(size):
    t, y = block(), torch.randn(20, 3)
    leaf = y.clone().requires_grad_()
    c = torch.randn(2)

    def gradient(scale):
        loss = scale * t(c).inv(leaf).sin().sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [leaf, *t.parameters()])])

    assert torch.allclose(gradient(size) / size, gradient(1.0), rtol=1e-11, atol=1e-13)


def test_gradient_that_is_not_finite_stays_with_its_event():
    t, y = block(), torch.randn(4, 3, requires_grad=True)
    (one,) = torch.autograd.grad(t(torch.zeros(2)).inv(y), y, torch.tensor([[1.0, 2, 3]] * 4))
    g = torch.tensor([[1.0, 2, 3]] * 3 + [[torch.inf, 0, 0]])
    (two,) = torch.autograd.grad(t(torch.zeros(2)).inv(y), y, g)
    assert torch.equal(one[:3], two[:3])
    assert two[3].isnan().all()


def test_memory_does_not_grow_with_passes():
    def saved_bytes(passes):
        size = 12
        weight = torch.zeros(size, size)
        weight.diagonal(-1)[: passes - 1] = 1.0  # a chain: exactly this many passes
        weight = nn.Parameter(weight)
        t = TriangularTransform(
            lambda x: zuko.transforms.AdditiveTransform(torch.tanh(x @ weight.T))
        )
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda s: saved.append(s.nbytes) or s, lambda s: s
        )
        with hooks, record_inversions() as inversions:
            x = t.inv(torch.randn(64, size))
        assert x.requires_grad
        return sum(saved), inversions[0].iterations

    short, long = saved_bytes(2), saved_bytes(11)
    assert long[1] > short[1] + 5
    assert long[0] == short[0]


def test_backward_may_run_twice():
    t = LDU(3)
    x = t.inv(torch.randn(5, 3))
    x.sum().backward(retain_graph=True)
    first = [p.grad.clone() for p in t.parameters() if p.grad is not None]
    x.sum().backward()
    second = [p.grad for p in t.parameters() if p.grad is not None]
    for a, b in zip(first, second, strict=True):
        assert torch.allclose(2 * a, b)


def test_gradients_reach_whatever_a_conditioner_depends_on():
    weight, y = torch.randn(3, 3), torch.randn(4, 3)
    mask = torch.ones(3, 3).tril(-1)

    def f(y, weight):
        return TriangularTransform(
            lambda x: zuko.transforms.AdditiveTransform(torch.tanh(x @ (mask * weight).T))
        ).inv(y)

    assert gradcheck(f, (y.requires_grad_(), weight.requires_grad_()))
    with torch.no_grad():
        assert not f(y, weight).requires_grad
    assert not f(y.detach(), weight.detach()).requires_grad  # nothing to differentiate by


def test_what_is_saved_may_be_a_copy():
    flow, z = perturb(SinusoidalFlow(3, 2, transforms=1)), torch.randn(5, 3)
    weight = torch.randn(5, 2, requires_grad=True)

    def samples():
        return flow(2 * weight).transform.inv(z).sin().sum()

    inputs = [weight, *flow.parameters()]
    expected = torch.autograd.grad(samples(), inputs)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):  # as checkpoints have
        loss = samples()
    for a, b in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_gradients_reach_what_is_bound_to_the_univariate_and_what_embeds_the_context():
    class Shifted(zuko.transforms.AdditiveTransform):
        def __init__(self, shift, more):
            super().__init__(shift + more)

    class Embedded(zuko.flows.MaskedAutoregressiveTransform):
        def forward(self, c):
            return super().forward(c.exp())

    more, c = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    lazy = Embedded(3, 2, univariate=partial(Shifted, more=more), shapes=[()])
    y, grads = torch.randn(2, 3), []
    for t in (FastInverse(lazy)(c), lazy(c)):
        loss = sum(t.inv(row).square().sum() for row in y)  # two inverses share the embedding
        grads.append(torch.autograd.grad(loss, [more, c]))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_parameters_may_be_replaced_before_the_backward_pass():
    class Inverse(nn.Module):
        def __init__(self):
            super().__init__()
            self.t = LDU(3)

        def forward(self, y):
            return self.t.inv(y).sum()

    module, y = perturb(Inverse()), torch.randn(2, 3)
    others = {n: p.detach() + 0.1 for n, p in module.named_parameters()}
    leaves = {n: p.clone().requires_grad_() for n, p in others.items()}
    torch.func.functional_call(module, leaves, (y,)).backward()
    grads = torch.func.grad(lambda p: torch.func.functional_call(module, p, (y,)))(others)
    module.load_state_dict(others, strict=False)  # masks stay
    module(y).backward()
    for name, parameter in module.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for grad in (grads[name], leaves[name].grad):
            grad = torch.zeros_like(expected) if grad is None else grad
            assert torch.allclose(grad, expected, atol=1e-10)


@pytest.mark.parametrize("name", ["sinusoid", "block", "autoregressive"])
def test_forward_differentiation_outside_of_torch_func(name):
    t = transforms()[name]
    if name == "block":
        t.requires_grad_(False)
    y, v = torch.zeros(3), torch.randn(3)
    expected = torch.autograd.functional.jacobian(t.inv, y) @ v
    with torch.no_grad(), fwAD.dual_level():
        x = t.inv(fwAD.make_dual(y, v))
        assert torch.allclose(fwAD.unpack_dual(x).tangent, expected, atol=1e-8)


def test_forward_differentiation_by_a_context():
    lazy, y, c, v = block(), torch.zeros(3), torch.randn(2), torch.randn(2)
    expected = torch.autograd.functional.jacobian(lambda c: lazy(c).inv(y), c) @ v
    with fwAD.dual_level():
        x = lazy(fwAD.make_dual(c, v)).inv(y)
        assert torch.allclose(fwAD.unpack_dual(x).tangent, expected, atol=1e-8)


@pytest.mark.filterwarnings("ignore::pyro_sinflow.InversionWarning")
@pytest.mark.parametrize("name", ["block", "autoregressive"])
def test_nan_does_not_pass_in_silence_inside_of_torch_func(name):
    y = torch.randn(4, 3)
    y[1, 0] = torch.nan
    x = torch.func.vmap(transforms()[name].inv)(y)
    assert x.isnan().tolist() == [[row == 1] * 3 for row in range(4)]


def transforms():
    sinusoid = SinusoidalTransform(*torch.randn(3, 3, 4), *torch.randn(2, 3), solver=exact)
    return {
        "sinusoid": sinusoid,
        "block": perturb(LDU(3, solver=exact)),
        "autoregressive": perturb(SinusoidalFlow(3, transforms=2, solver=exact))().transform,
    }


@pytest.mark.parametrize("name", ["sinusoid", "block", "autoregressive"])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_torch_func(name, direction):
    t = transforms()[name]
    t = t if direction == "forward" else t.inv
    x, v = torch.randn(4, 3), torch.randn(3)
    expected = torch.stack([torch.autograd.functional.jacobian(t, row) for row in x])

    assert torch.allclose(torch.func.vmap(t)(x), t(x), atol=1e-10)
    assert torch.allclose(torch.func.vmap(torch.func.jacrev(t))(x), expected, atol=1e-8)
    assert torch.allclose(torch.func.vmap(torch.func.jacfwd(t))(x), expected, atol=1e-8)
    value, tangent = torch.func.jvp(t, (x[0],), (v,))
    assert torch.allclose(value, t(x[0]), atol=1e-10)
    assert torch.allclose(tangent, expected[0] @ v, atol=1e-8)
    ladj = torch.func.vmap(lambda row: t.call_and_ladj(row)[1].sum())(x)
    assert torch.allclose(ladj, expected.slogdet().logabsdet, atol=1e-8)


def test_torch_func_over_parameters_of_a_log_density():
    flow = perturb(SinusoidalFlow(3, 2, transforms=2))
    parameters = {n: p.detach() for n, p in flow.named_parameters()}
    x, c = torch.randn(4, 3), torch.randn(4, 2)

    class Density(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self, x, c):
            return self.flow(c).log_prob(x)

    def loss(parameters, x, c):
        named = {f"flow.{n}": p for n, p in parameters.items()}
        return torch.func.functional_call(Density(), named, (x, c))

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, c)
    flow.zero_grad()
    flow(c).log_prob(x).sum().backward()
    for name, parameter in flow.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(per_sample[name].sum(0), grad, atol=1e-10)


def test_vmap_over_parameters_of_an_inverse():
    p = [torch.randn(5, 3, 4) for _ in range(3)] + [torch.randn(5, 3) for _ in range(2)]
    y = torch.randn(3)
    together = torch.func.vmap(lambda *p: SinusoidalTransform(*p, solver=exact).inv(y))(*p)
    one_by_one = [SinusoidalTransform(*q, solver=exact).inv(y) for q in zip(*p, strict=True)]
    assert torch.allclose(together, torch.stack(one_by_one), atol=1e-10)


def test_gradient_of_a_recurrent_context():
    flow = perturb(SinusoidalFlow(2, 2, transforms=1, hidden_features=(4,), activation=nn.Tanh))
    inputs = (*leaves((2, 3, 2)), *flow.parameters())

    def f(z, *_):
        c = torch.zeros(3, 2)
        for step in z:  # each context depends on the parameters that it meets again
            c = flow(c).transform.inv(step)
        return c

    assert gradcheck(f, inputs, fast_mode=True)
    assert gradgradcheck(f, inputs, fast_mode=True)


def test_gradient_where_one_tensor_depends_on_another():
    a = torch.eye(3).roll(1, dims=0).tril()

    def f(y, w):
        phi = w, w * w
        return TriangularTransform(
            lambda x: zuko.transforms.AdditiveTransform(phi[0] * (x @ a.T) + phi[1])
        ).inv(y)

    inputs = leaves((4, 3), ())
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


@pytest.mark.parametrize("create_graph", [False, True])
def test_hooks_of_parameters_run_once(create_graph):
    flow = perturb(SinusoidalFlow(3, transforms=1, hidden_features=(4,)))
    parameter = flow.transform.transforms[2].network.bias
    loss = flow().transform.inv(torch.ones(3)).square().sum()
    (expected,) = torch.autograd.grad(loss, parameter, retain_graph=True)
    calls = []
    parameter.register_hook(lambda g: calls.append(g) or 2 * g)
    (gradient,) = torch.autograd.grad(loss, parameter, create_graph=create_graph)
    assert len(calls) == 1
    assert torch.allclose(gradient, 2 * expected)


@pytest.mark.parametrize("make", [torch.jit.script, partial(torch.compile, backend="eager")])
def test_gradient_of_a_conditioner_that_python_does_not_call(make):
    linear = nn.Linear(3, 3)
    linear.weight.data.tril_(-1)
    made = make(linear)
    y = torch.randn(4, 3)

    def gradients(function):
        t = TriangularTransform(
            lambda x: zuko.transforms.AdditiveTransform(function(x.to(linear.weight.dtype)))
        )
        return torch.autograd.grad(t.inv(y).square().sum(), [*linear.parameters()])

    for g, expected in zip(gradients(made), gradients(linear), strict=True):
        assert torch.allclose(g, expected)


def test_gradient_of_a_steep_map():
    scale = 1e7
    weight = scale * torch.randn(20, 20).tril(-1) / 20

    def gradient(dtype):
        y = torch.ones(20, dtype=dtype, requires_grad=True)
        t = TriangularTransform(
            lambda x: torch.distributions.AffineTransform(x @ weight.T.to(dtype), scale)
        )
        return torch.autograd.grad(t.inv(y).sum(), y)[0].double()

    assert torch.allclose(gradient(torch.float32), gradient(torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("conditioner", ["independent", "autoregressive"])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_forward_over_forward(conditioner, direction):
    options = {"conditioner": conditioner, "hidden_features": (4,), "activation": nn.Tanh}
    flow = perturb(SinusoidalFlow(2, transforms=1, **options)).requires_grad_(False)

    def f(x):
        t = flow().transform if direction == "forward" else flow().transform.inv
        y, ladj = t.call_and_ladj(x)
        return y.square().sum() + ladj

    x = torch.randn(2)
    expected = torch.func.jacrev(torch.func.jacrev(f))(x)
    assert torch.allclose(torch.func.jacfwd(torch.func.jacfwd(f))(x), expected)
    assert torch.allclose(torch.func.hessian(f)(x), expected)
