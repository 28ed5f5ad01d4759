"""Gradients of samples reach the weights of networks, however a module is given them."""

import copy
from contextlib import nullcontext

import pytest
import torch
import zuko
from conftest import perturb, replicate
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from zuko.bayesian import BayesianModel

from pyro_sinflow import PixelCNN, SinusoidalFlow, fast_inverse

BLOCKS = {"conditioner": "independent"}
IMAGES = {"network": PixelCNN, "hidden_features": (4,), **BLOCKS}
FLOWS = {
    "independent": lambda c: SinusoidalFlow(4, c, transforms=1, **BLOCKS),
    "autoregressive": lambda c: SinusoidalFlow(4, c, transforms=1),
    "PixelCNN": lambda c: SinusoidalFlow((1, 2, 2), c, transforms=1, **IMAGES),
    "fast_inverse(NSF)": lambda c: fast_inverse(zuko.flows.NSF(4, c, transforms=1)),
}
NAMES = [*FLOWS]


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def features(name, rows):
    return torch.randn(rows, *((1, 2, 2) if name == "PixelCNN" else (4,)))


def weighted(flow):
    """All modules that have a weight."""
    return [m for m in flow.modules() if m._parameters.get("weight") is not None]


def last_layers(flow):
    """The last layer of each network: a sequence, and an index."""
    networks = [m for m in flow.modules() if isinstance(m, nn.Sequential)]
    return [(n, len(n) - 1) for n in networks if not isinstance(n, zuko.nn.Residual)]


class Call(nn.Module):
    """Calls a function of a flow, for the sake of functional_call."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, function):
        return function(self.flow)


# Each way takes a flow and a function of the flow and of the leaves that it depends on.


def as_parameters(flow, use):
    return use(flow, [*flow.parameters()])


def by_weight_norm(flow, use, cached=False):
    for layer in weighted(flow):
        parametrizations.weight_norm(layer)
    with parametrize.cached() if cached else nullcontext():
        return use(flow, [*flow.parameters()])


def by_cached_weight_norm(flow, use):
    return by_weight_norm(flow, use, cached=True)


def by_pruning(flow, use):
    for layer in weighted(flow):
        prune.random_unstructured(layer, "weight", 0.3)
    return use(flow, [*flow.parameters()])


def by_a_hypernetwork(flow, use):
    h = torch.zeros((), requires_grad=True)
    for layer in weighted(flow):
        weight = layer._parameters.pop("weight").detach()
        layer.weight = weight * (1 + h) + 0.1 * h.sin()
    return use(flow, [h])


def by_new_layers(flow, use):
    for network, i in last_layers(flow):
        network[i] = perturb(copy.deepcopy(network[i]), 0.1)
    return use(flow, [*flow.parameters()])


def by_new_parameters(flow, use):
    for layer in weighted(flow):
        layer.weight = nn.Parameter(layer.weight.detach() + 0.1)
    return use(flow, [*flow.parameters()])


def by_tied_parameters(flow, use):
    shared = {}
    for layer in weighted(flow):
        layer.weight = shared.setdefault(layer.weight.shape, layer.weight)
    return use(flow, [*flow.parameters()])


class Scaled(nn.Module):
    """Scales what a layer returns."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.factor = nn.Parameter(torch.tensor(1.1))

    def forward(self, x):
        return self.factor * self.layer(x)


def by_wrapped_layers(flow, use):
    for network, i in last_layers(flow):
        network[i] = Scaled(network[i])
    return use(flow, [*flow.parameters()])


def by_functional_call(flow, use):
    leaves = {f"flow.{n}": (p + 0.1).detach() for n, p in flow.named_parameters()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    return torch.func.functional_call(
        Call(flow), leaves, (lambda flow: use(flow, [*leaves.values()]),)
    )


def by_replication(flow, use):
    replica = replicate(flow)
    assert not [*replica.parameters()]
    return use(replica, [*flow.parameters()])


def by_hooks(flow, use):
    s = torch.tensor(1.1, requires_grad=True)
    for layer in weighted(flow):
        layer.register_forward_hook(lambda module, args, output: s * output)
    return use(flow, [s, *flow.parameters()])


def by_hooks_before(flow, use):
    s = torch.tensor(1.1, requires_grad=True)
    for layer in weighted(flow):
        layer.register_forward_pre_hook(lambda module, args: (s * args[0],))
    return use(flow, [s, *flow.parameters()])


def by_global_hooks(flow, use):
    s, scaled = torch.tensor(1.1, requires_grad=True), {*weighted(flow)}
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: s * output if module in scaled else None
    )
    try:
        return use(flow, [s, *flow.parameters()])
    finally:
        hook.remove()


def by_replaced_forwards(flow, use):
    s = torch.tensor(1.1, requires_grad=True)
    for layer in weighted(flow):
        layer.forward = lambda x, forward=layer.forward: s * forward(x)
    return use(flow, [s, *flow.parameters()])


def by_the_posterior_of_a_bayesian_model(flow, use, local_trick=False):
    model = BayesianModel(flow)
    with model.reparameterize(local_trick) as reparameterized:
        return use(reparameterized, [*model.means.parameters(), *model.logvars.parameters()])


def by_the_local_trick_of_a_bayesian_model(flow, use):
    return by_the_posterior_of_a_bayesian_model(flow, use, local_trick=True)


WAYS = {name: f for name, f in globals().items() if name.startswith(("by_", "as_"))}


def reference(t, y):
    """The inverse of y, with derivatives from the Jacobian that autograd computes."""
    x = t.inv(y).detach().requires_grad_()
    value = t(x).flatten(1)
    assert torch.allclose(value, y.flatten(1), atol=1e-10)
    rows = [torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for v in value.unbind(1)]
    jacobian = torch.stack(rows, dim=1).flatten(2)
    error = (t(x.detach()) - y).flatten(1)
    return x.detach() - torch.linalg.solve(jacobian, error).view_as(x)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FLOWS)
def test_gradients_of_samples(name, way):
    c = torch.randn(2)

    def use(flow, leaves):
        for rows in (3, 60):  # inverted by passes, and by substitution
            y = features(name, rows)
            given, expected = (
                torch.autograd.grad(
                    f(flow(c).transform, y).sin().sum(),
                    leaves,
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for f in (lambda t, y: t.inv(y), reference)
            )
            for a, b in zip(given, expected, strict=True):
                assert torch.allclose(a, b, rtol=1e-8, atol=1e-9)
            assert sum(bool(g.abs().max() > 0) for g in given) > len(given) / 2

    flow = perturb(FLOWS[name](2), 0.05)  # some parameters are multiplied by ten
    flow(c).sample((60,))  # before the weights are what they will be
    WAYS[way](flow, use)


@pytest.mark.parametrize("name", FLOWS)
def test_scores_after_samples_in_a_context_that_caches_weights(name):
    c, x, z = torch.randn(2), features(name, 5), features(name, 60)
    flow = perturb(FLOWS[name](2), 0.1)
    for layer in weighted(flow):
        parametrizations.weight_norm(layer)

    def gradients(samples, scores):
        loss = 0.0
        with parametrize.cached():
            if samples:
                loss = loss + flow(c).transform.inv(z).sin().sum()
            if scores:
                loss = loss + flow(c).log_prob(x).mean()
        inputs = [*flow.parameters()]
        return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)

    alone = zip(gradients(True, False), gradients(False, True), strict=True)
    for both, (a, b) in zip(gradients(True, True), alone, strict=True):
        assert torch.allclose(both, a + b, atol=1e-10)


@pytest.fixture(params=[False, True], ids=["", "local trick"])
def local_trick(request):
    return request.param


def check_bayesian_gradients(model):
    for name, p in (*model.means.named_parameters(), *model.logvars.named_parameters()):
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    assert all(p.grad is None for p in model.base.parameters())


@pytest.mark.parametrize("name", FLOWS)
def test_scores_of_a_bayesian_flow(name, local_trick):
    model, c, x = BayesianModel(FLOWS[name](2)), torch.randn(2), features(name, 60)
    scores = []
    for _ in range(2):
        with model.reparameterize(local_trick) as flow:
            scores += [flow(c).log_prob(x), flow(c).log_prob(x)]
    assert torch.allclose(scores[0], scores[1])
    assert not torch.allclose(scores[0], scores[2])
    scores[2].mean().backward()
    check_bayesian_gradients(model)
    sampled = model.sample_model()
    sampled(c).log_prob(x).mean().backward()
    assert all(p.grad is not None for p in sampled.parameters())


@pytest.mark.parametrize("rows", [3, 60])
@pytest.mark.parametrize("name", FLOWS)
def test_samples_of_a_bayesian_flow(name, local_trick, rows):
    model, c = BayesianModel(FLOWS[name](2)), torch.randn(2)
    with model.reparameterize(local_trick) as flow:
        x = flow(c).rsample((rows,))
        t = flow(c).transform
        assert torch.allclose(t.inv(t(x)), x, atol=1e-10)
        with torch.no_grad():
            assert torch.allclose(t.inv(t(x)), x, atol=1e-10)
    x.square().sum().backward()  # after the context
    check_bayesian_gradients(model)
