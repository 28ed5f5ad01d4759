"""At home in Pyro: guides, priors, plates, modules, autoguides, reparameterisation, caches."""

import gc
import io
import warnings
import weakref
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import perturb
from pyro.contrib.zuko import ZukoToPyro
from pyro.distributions.conditional import ConditionalComposeTransformModule
from pyro.distributions.transforms import iterated
from pyro.infer import HMC, MCMC, NUTS, SVI, JitTrace_ELBO, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam

from pyro_sinflow import (
    LDU,
    ConditionalLDU,
    Sinusoidal,
    SinusoidalFlow,
    SinusoidalTransform,
    conditional_ldu,
    ldu,
    record_inversions,
    sinusoidal,
)


def base(*shape):
    return dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))


def target():
    """Two correlated latents far from the standard normal."""
    pyro.sample(
        "x",
        dist.MultivariateNormal(torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 0.8], [0.8, 1.0]])),
    )


@pytest.mark.parametrize("features", [(3,), (2, 4, 4)])
@pytest.mark.parametrize("make", [LDU, Sinusoidal])
def test_transformed_distribution(features, make):
    t = perturb(make(features))
    for transform in (t, t.inv):
        d = dist.TransformedDistribution(base(*features), [transform])
        assert d.event_shape == features
        assert d.batch_shape == ()
        x = d.sample((5,))
        assert x.shape == (5, *features)
        assert d.log_prob(x).shape == (5,)
    guide = dist.TransformedDistribution(base(*features), [t])
    x = guide.rsample((5,))
    cached = guide.log_prob(x)
    t.clear_cache()
    assert torch.allclose(guide.log_prob(x.detach()), cached, atol=1e-3)


def test_a_guides_own_samples_are_scored_from_the_cache():
    t = perturb(LDU(4))
    d = dist.TransformedDistribution(base(4), [t])
    with record_inversions() as inversions:
        d.log_prob(d.rsample((10,)))
    assert inversions == []


def test_guide_with_pyro_module_in_a_plate():
    t = LDU(2, hidden_features=(16,))

    def model():
        with pyro.plate("n", 3):
            pyro.sample("x", dist.Normal(torch.tensor([2.0, -1.0]), 0.5).to_event(1))

    def guide():
        pyro.module("flow", t)
        with pyro.plate("n", 3):
            pyro.sample("x", dist.TransformedDistribution(base(2), [t]))

    svi = SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step() for _ in range(400)]
    assert sum(losses[-50:]) / 50 < 1.0 < losses[0]
    assert any(name.startswith("flow$$$") for name in pyro.get_param_store())
    x = dist.TransformedDistribution(base(2), [t]).sample((2000,))
    assert torch.allclose(x.mean(0), torch.tensor([2.0, -1.0]), atol=0.15)
    assert torch.allclose(x.std(0), torch.tensor([0.5, 0.5]), atol=0.1)


def test_prior_is_scored_explicitly():
    t = perturb(LDU(3))

    def model(x):
        pyro.module("prior", t)
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.TransformedDistribution(base(3), [t.inv]), obs=x)

    with record_inversions() as inversions:
        trace = pyro.poutine.trace(model).get_trace(torch.randn(7, 3))
        assert trace.log_prob_sum().isfinite()
    assert inversions == []


@pytest.mark.parametrize("direction", ["guide", "prior"])
def test_repeated_backward_on_the_same_tensor_never_meets_a_stale_graph(direction):
    t = LDU(3)
    d = dist.TransformedDistribution(base(3), [t if direction == "guide" else t.inv])
    optimizer = torch.optim.SGD(t.parameters(), lr=1e-2)
    x = torch.randn(8, 3)  # the very same tensor each time, which is the cache's key
    losses = []
    for _ in range(5):
        for _ in range(2):  # also twice without a step in between
            optimizer.zero_grad()
            loss = -d.log_prob(x).mean()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 5


@pytest.mark.filterwarnings("ignore::pyro_sinflow.InversionWarning")
@pytest.mark.parametrize("rows", [4, 100])  # by passes, and by substitution
def test_nan_stays_with_its_event_where_validation_is_off(rows):
    t, y = perturb(LDU(3)), torch.randn(rows, 3)
    expected = t.inv(y)
    y = y.clone()
    y[1, 2] = torch.nan
    with pyro.validation_enabled(False):
        x, alone = t.inv(y), t.inv(y[1])
    assert x[1].isnan().all()
    assert alone.isnan().all()
    keep = torch.arange(rows) != 1
    assert torch.allclose(x[keep], expected[keep], atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("make", [LDU, Sinusoidal])
@pytest.mark.parametrize("rows", [4, 5000])  # by numpy, and by torch
def test_nan_takes_no_further_iterations(rows, make, bad):
    t, y = perturb(make(3)), torch.randn(rows, 3)
    with record_inversions() as expected:
        t.inv(y)
    y[1, 2] = bad
    with pyro.validation_enabled(False), warnings.catch_warnings(), record_inversions() as found:
        warnings.simplefilter("error")
        assert not t.inv(y)[1].isfinite().all()
    most = max(i.iterations for i in expected)
    assert max(i.iterations for i in found) <= most + 4


def test_a_trajectory_that_diverges_is_rejected():
    prior = ldu(2).requires_grad_(False)

    def model():
        z = pyro.sample("z", dist.TransformedDistribution(base(2), [prior.inv]))
        pyro.sample("y", dist.Normal(z[0].log(), 0.5), obs=torch.tensor(0.0))  # NaN for z < 0

    start = {"z": torch.tensor([1.0, 0.0])}
    mcmc = MCMC(HMC(model, num_steps=8), 20, 20, initial_params=start, disable_progbar=True)
    mcmc.run()
    assert (mcmc.get_samples()["z"][:, 0] > 0).all()


def test_samples_drawn_without_a_graph_are_scored_with_one():
    t = perturb(LDU(3))
    guide = dist.TransformedDistribution(base(3), [t])
    guide.log_prob(guide.sample((5,))).mean().backward()
    assert all(p.grad is not None for p in t.parameters())


def test_inference_mode_from_the_start():
    with torch.inference_mode():
        t = perturb(LDU(3))
        x = torch.randn(5, 3)
        assert torch.allclose(t.inv(t(x)), x, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_of_an_elbo_in_either_direction():
    t = perturb(LDU(3))

    def model():
        pyro.sample("x", base(3))

    def guide(transform):
        pyro.module("t", t)
        pyro.sample("x", dist.TransformedDistribution(base(3), [transform]))

    for transform in (t, t.inv):
        losses = []
        for elbo in (Trace_ELBO, JitTrace_ELBO):
            pyro.set_rng_seed(0)
            losses.append(elbo().loss(model, partial(guide, transform)))
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_hundreds_of_steps_leak_nothing():
    t = iterated(2, ldu, 2, hidden_features=(8,))
    conditional = conditional_ldu(2, 1, hidden_features=(8,))
    optimizer = torch.optim.Adam([*t.parameters(), *conditional.parameters()], 1e-3)
    context = torch.zeros(4, 1)

    def step():
        guide = dist.TransformedDistribution(base(2), [t])
        other = dist.ConditionalTransformedDistribution(base(2), [conditional]).condition(context)
        x, y = guide.rsample((4,)), other.rsample()
        loss = (guide.log_prob(x) + x.square().sum(-1) + other.log_prob(y) - y.sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return weakref.ref(x), weakref.ref(y)

    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    for _ in range(5):
        last, other = step()
    before = tensors()
    gc.disable()  # samples are freed by reference counts alone
    try:
        for _ in range(200):
            x, y = step()
            assert last() is None  # the latest pair stays in the cache
            assert other() is None
            last, other = x, y
    finally:
        gc.enable()
    assert tensors() <= before


def test_pyro_module_registers_parameters():
    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.flow = LDU(2)
            self.element = sinusoidal(2)

        def forward(self):
            d = dist.TransformedDistribution(base(2), [self.element, self.flow])
            return pyro.sample("x", d)

    guide = Guide()
    SVI(target, guide, Adam({"lr": 1e-2}), Trace_ELBO()).step()
    assert {"flow", "element"} <= {
        n.split("$$$")[0].split(".")[0] for n, _ in guide.named_parameters()
    }
    assert any("frequency" in name for name in pyro.get_param_store())
    assert isinstance(PyroModule[LDU](2), LDU)


def test_bayesian_parameters():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            for name in ("frequency", "phase", "weight"):
                setattr(self, name, PyroSample(dist.Normal(torch.zeros(1, 4), 1.0).to_event(2)))
            for name in ("residual", "shift"):
                setattr(self, name, PyroSample(dist.Normal(torch.zeros(1), 1.0).to_event(1)))

        def forward(self, x):
            t = SinusoidalTransform(
                self.frequency, self.phase, self.weight, self.residual, self.shift
            )
            with pyro.plate("n", len(x)):
                pyro.sample("x", dist.TransformedDistribution(base(1), [t.inv]), obs=x)

    x = torch.randn(20, 1)
    mcmc = MCMC(NUTS(Model()), num_samples=5, warmup_steps=5, disable_progbar=True)
    mcmc.run(x)
    assert mcmc.get_samples()["frequency"].shape == (5, 1, 4)


@pytest.mark.parametrize("scale", [True, False])
def test_auto_normalizing_flow_and_neutra(scale):
    guide = AutoNormalizingFlow(target, partial(iterated, 2, ldu, scale=scale))
    svi = SVI(target, guide, Adam({"lr": 1e-2}), Trace_ELBO(4, vectorize_particles=True))
    losses = [svi.step() for _ in range(300)]
    assert sum(losses[-50:]) / 50 < 0.3 < losses[0]  # the divergence from a normalized target
    posterior = Predictive(target, guide=guide, num_samples=1000)()["x"]
    assert posterior.shape == (1000, 2)

    neutra = NeuTraReparam(guide)
    model = pyro.poutine.reparam(target, config=lambda _: neutra)
    # The density of the warped posterior is that of the target, pulled back.
    latent = torch.randn(2)
    with pyro.poutine.condition(data={"x_shared_latent": latent}):
        log_prob = pyro.poutine.trace(model).get_trace().log_prob_sum()
    x = guide.get_transform()(latent)
    expected = dist.MultivariateNormal(
        torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    ).log_prob(x) + guide.get_transform().log_abs_det_jacobian(latent, x)
    assert torch.allclose(log_prob, expected, atol=1e-4)

    nuts = NUTS(model, max_tree_depth=4)
    mcmc = MCMC(nuts, num_samples=40, warmup_steps=20, disable_progbar=True)
    mcmc.run()
    samples = neutra.transform_sample(mcmc.get_samples()["x_shared_latent"])["x"]
    assert samples.shape == (40, 2)
    assert (samples.mean(0) - torch.tensor([2.0, -1.0])).abs().max() < 1


@pytest.mark.parametrize("inverse", [False, True])
def test_conditional_protocols(inverse):
    block = perturb(ConditionalLDU(3, context=2))
    transform = block.inv if inverse else block
    assert block.inv.inv is block
    context = torch.randn(7, 2)
    d = dist.ConditionalTransformedDistribution(base(3), [transform]).condition(context)
    assert d.batch_shape == (7,)
    x = d.rsample()
    assert x.shape == (7, 3)
    assert d.log_prob(x).shape == (7,)
    with pyro.plate("n", 7):
        assert pyro.sample("x", d).shape == (7, 3)

    stack = ConditionalComposeTransformModule([transform, LDU(3), conditional_ldu(3, 2)], 1)
    assert len([*stack.parameters()]) == 3 * len([*block.parameters()])
    d = dist.ConditionalTransformedDistribution(base(3), [stack]).condition(context)
    d.log_prob(d.rsample()).sum().backward()
    assert all(p.grad is not None for p in block.lower.parameters())


def test_conditional_density_by_maximum_likelihood():
    block = ConditionalLDU(1, context=1, scale=True, context_diagonal=True)
    flow = dist.ConditionalTransformedDistribution(base(1), [block.inv])
    context = torch.rand(2000, 1) * 4 - 2
    x = torch.sin(2 * context) + 0.2 * torch.randn(2000, 1)
    optimizer = torch.optim.Adam(block.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss = -flow.condition(context).log_prob(x).mean()
        loss.backward()
        optimizer.step()
    entropy = 0.5 * (1 + torch.log(torch.tensor(2 * torch.pi))) + torch.log(torch.tensor(0.2))
    assert loss.item() < entropy + 0.1


def test_zuko_to_pyro():
    flow = perturb(SinusoidalFlow(3), 0.1)  # some parameters are multiplied by ten

    def model():
        pyro.module("flow", flow)
        with pyro.plate("n", 5):
            return pyro.sample("x", ZukoToPyro(flow()))

    trace = pyro.poutine.trace(model).get_trace()
    assert trace.nodes["x"]["value"].shape == (5, 3)
    trace.log_prob_sum().backward()
    assert all(p.grad is not None for p in flow.parameters())


def test_param_store_round_trip():
    t = perturb(LDU(2))
    pyro.module("flow", t)
    file = io.BytesIO()
    torch.save(pyro.get_param_store().get_state()["params"], file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert len(state) == len([*t.parameters()])
