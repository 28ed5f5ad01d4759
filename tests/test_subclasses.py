"""Tensor subclasses: Pyro's, which tell what depends on what, and those of a third party."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from conftest import perturb
from pyro.contrib.zuko import ZukoToPyro
from pyro.distributions.transforms import iterated
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.infer.inspect import get_model_relations
from torch.utils._pytree import tree_leaves, tree_map

from pyro_sinflow import (
    ConditionalLDU,
    PixelCNN,
    SinusoidalFlow,
    conditional_ldu,
    fast_inverse,
    ldu,
    sinusoidal,
)

BLOCKS = {"conditioner": "independent"}
FLOWS = {
    "scale": lambda c: SinusoidalFlow(3, c, transforms=1, **BLOCKS),
    "shift": lambda c: SinusoidalFlow(3, c, transforms=1, scale=False, **BLOCKS),
    "context_diagonal": lambda c: SinusoidalFlow(
        3, c, transforms=1, context_diagonal=True, **BLOCKS
    ),
    "autoregressive": lambda c: SinusoidalFlow(3, c, transforms=1),
    "MAF": lambda c: zuko.flows.MAF(3, c, transforms=1),
    "fast_inverse(NSF)": lambda c: fast_inverse(zuko.flows.NSF(3, c, transforms=1)),
}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def base(*batch):
    return dist.Normal(torch.zeros(*batch, 3), 1.0).to_event(1)


# Distributions of vectors, given a latent context: a function of module and context.
CONDITIONAL = {
    **{name: (make, lambda flow, c: ZukoToPyro(flow(c))) for name, make in FLOWS.items()},
    "ConditionalLDU": (
        partial(conditional_ldu, 3),
        lambda t, c: dist.TransformedDistribution(base(), [t.condition(c)]),
    ),
    "ConditionalLDU.inv": (
        partial(conditional_ldu, 3),
        lambda t, c: dist.TransformedDistribution(base(), [t.inv.condition(c)]),
    ),
}


def gradients(elbo, model, guide, module):
    """The gradients of an ELBO by the parameters of a module, for the same draws each time."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    module.zero_grad()
    elbo.loss_and_grads(model, guide)
    return {name: p.grad for name, p in module.named_parameters()}


def check_gradients_agree(model, guide, module):
    expected = gradients(Trace_ELBO(), model, guide, module)
    given = gradients(TraceGraph_ELBO(), model, guide, module)
    for name, gradient in expected.items():
        assert given[name] is not None, name
        assert torch.allclose(given[name], gradient), name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("name", CONDITIONAL)
def test_tracegraph_elbo_with_a_discrete_latent_as_context(name):
    make, distribution = CONDITIONAL[name]
    module, x = perturb(make(1), 0.1), torch.randn(20, 3)

    def latent():
        with pyro.plate("rows", 20):
            return pyro.sample("k", dist.Bernoulli(torch.full((20,), 0.5)))

    def model():
        pyro.module("module", module)
        k = latent()
        with pyro.plate("data", 20):
            pyro.sample("x", distribution(module, k.unsqueeze(-1)), obs=x)

    check_gradients_agree(model, latent, module)


@pytest.mark.parametrize("name", CONDITIONAL)
def test_tracegraph_elbo_with_samples_given_a_discrete_latent(name):
    make, distribution = CONDITIONAL[name]
    module = perturb(make(1), 0.1)

    def latent(distribution):
        with pyro.plate("rows", 20):
            k = pyro.sample("k", dist.Bernoulli(torch.full((20,), 0.5)))
            pyro.sample("z", distribution(k.unsqueeze(-1)))

    def model():
        latent(lambda k: dist.Normal(k.expand(20, 3), 0.5).to_event(1))

    def guide():
        pyro.module("module", module)
        latent(partial(distribution, module))

    check_gradients_agree(model, guide, module)


@pytest.fixture
def relations(monkeypatch):
    """What pyro.render_model draws: on which samples each sample depends."""
    # Pyro forks the random state of all devices, and the fake one of conftest.py has none.
    monkeypatch.setattr(torch.random, "fork_rng", partial(torch.random.fork_rng, devices=[]))
    return lambda model: get_model_relations(model)["sample_sample"]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("make", [ldu, sinusoidal])
def test_render_model_finds_what_depends_on_samples_of_a_transform(make, inverse, relations):
    t = make(3)

    def model():
        d = dist.TransformedDistribution(base(), [t.inv if inverse else t])
        z = pyro.sample("z", d)
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.zeros(3))

    assert relations(model) == {"z": [], "y": ["z"]}


@pytest.mark.parametrize("name", CONDITIONAL)
def test_render_model_finds_the_context(name, relations):
    make, distribution = CONDITIONAL[name]
    module = make(2)

    def model():
        c = pyro.sample("c", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        z = pyro.sample("z", distribution(module, c))
        pyro.sample("y", distribution(module, z[..., :2]), obs=torch.zeros(3))

    assert relations(model) == {"c": [], "z": ["c"], "y": ["z"]}


@pytest.mark.parametrize("make", [ldu, sinusoidal, lambda d: iterated(2, ldu, d)])
def test_render_model_of_a_guide(make, relations):
    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("s", dist.Normal(m, 1.0))

    guide = AutoNormalizingFlow(model, make)
    guide()
    latent = "_AutoNormalizingFlow_latent"
    assert relations(guide) == {latent: [], "m": [latent], "s": [latent]}


class Labelled(torch.Tensor):
    """Remembers the labels of all that it was computed from."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        labels = [getattr(leaf, "labels", set()) for leaf in tree_leaves((args, kwargs))]
        for leaf in tree_leaves(result):
            if isinstance(leaf, Labelled):
                leaf.labels = set().union(*labels)
        return result

    @classmethod
    def wrap(cls, x, label):
        """Returns a leaf, and the labelled tensor that is computed from it."""
        leaf = x.detach().clone().requires_grad_()
        labelled = leaf.as_subclass(cls)
        labelled.labels = {label}
        return leaf, labelled

    def unwrap(self):
        return self.as_subclass(torch.Tensor)


class Wrapper(torch.Tensor):
    """Holds another tensor, on which all of torch's operations are carried out."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(plain, (args, kwargs or {}))
        return tree_map(
            lambda t: cls(t) if isinstance(t, torch.Tensor) else t, func(*args, **kwargs)
        )

    @classmethod
    def wrap(cls, x, label):
        leaf = cls(x.detach().clone()).requires_grad_()
        return leaf, leaf

    def unwrap(self):
        return self.inner


def plain(t):
    return t.unwrap() if isinstance(t, Labelled | Wrapper) else t


def check_results(run, subclass, inputs):
    """Compares outputs of a function, and their gradients, with those that a subclass gives.

    Args:
        run: The function, of tensors by name.
        subclass: The subclass.
        inputs: The tensors that are of the subclass.

    Returns:
        The labels of the outputs, if the subclass has labels.
    """
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    expected = run(**leaves)
    wrapped = {name: subclass.wrap(x, name) for name, x in inputs.items()}
    results = run(**{name: x for name, (_, x) in wrapped.items()})
    grads = []
    for outputs, by in ((expected, leaves.values()), (results, [w for w, _ in wrapped.values()])):
        loss = sum(o.sin().sum() for o in outputs)
        grads.append(torch.autograd.grad(loss, [*by], allow_unused=True, materialize_grads=True))
    for a, b in zip((*expected, *grads[0]), (*results, *grads[1]), strict=True):
        assert torch.allclose(plain(b), a, atol=1e-12)
    labels = []
    for result in results:
        assert type(result) is subclass
        if subclass is Labelled:
            labels.append(result.labels)
    return labels


LAZY = {
    "LDU": lambda: ConditionalLDU(3, 2),
    "context_diagonal": lambda: ConditionalLDU(3, 2, context_diagonal=True),
    "autoregressive": lambda: FLOWS["autoregressive"](2).transform,
    "fast_inverse(NSF)": lambda: FLOWS["fast_inverse(NSF)"](2).transform,
    "PixelCNN": lambda: ConditionalLDU((1, 1, 3), 2, network=PixelCNN, hidden_features=(4,)),
}


def features(name, rows):
    return torch.randn(rows, 1, 1, 3) if name == "PixelCNN" else torch.randn(rows, 3)


@pytest.mark.parametrize(
    ("subclass", "where"),
    [(Labelled, "x"), (Labelled, "c"), (Labelled, "x c"), (Wrapper, "x c")],
)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", LAZY)
def test_features_and_context_of_a_subclass(name, direction, subclass, where):
    lazy = perturb(LAZY[name](), 0.1)
    inputs = {"x": features(name, 4), "c": torch.randn(4, 2)}

    def run(**given):
        given = {**inputs, **given}
        t = lazy(given["c"])
        return (t if direction == "forward" else t.inv).call_and_ladj(given["x"])

    names = where.split()
    for labels in check_results(run, subclass, {name: inputs[name] for name in names}):
        assert labels == set(names)


@pytest.mark.parametrize("rows", [4, 60])  # inverted by passes, and by substitution
@pytest.mark.parametrize("name", LAZY)
def test_weights_of_a_subclass(name, rows):
    lazy, y, c = perturb(LAZY[name](), 0.1), features(name, rows), torch.randn(2)
    owners = {}
    for module in lazy.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners[f"weight {len(owners)}"] = module, attribute

    def run(**weights):
        for name, (module, attribute) in owners.items():
            module._parameters.pop(attribute, None)
            setattr(module, attribute, weights[name])
        return lazy(c).inv.call_and_ladj(y)

    weights = {n: module._parameters[a] for n, (module, a) in owners.items()}
    assert all(check_results(run, Labelled, weights))


@pytest.mark.parametrize("subclass", [Labelled, Wrapper])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", LAZY)
def test_cotangents_of_a_subclass(name, direction, subclass):
    lazy, x = perturb(LAZY[name](), 0.1), features(name, 4).requires_grad_()
    t = lazy(torch.randn(2))
    outputs = (t if direction == "forward" else t.inv).call_and_ladj(x)
    cotangents = [torch.randn_like(o) for o in outputs]
    inputs = [x, *lazy.parameters()]
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    expected = torch.autograd.grad(outputs, inputs, cotangents, **options)
    wrapped = [subclass.wrap(g, "g")[1].detach() for g in cotangents]
    for a, b in zip(
        expected, torch.autograd.grad(outputs, inputs, wrapped, **options), strict=True
    ):
        assert torch.allclose(plain(b), a, atol=1e-12)
