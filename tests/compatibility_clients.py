"""Checks of what works in Pyro, zuko, sbi and lampe, one for each row of docs/compatibility.md."""

import copy
import io
from functools import partial
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from compatibility import agree, inputs, normal, parameters, three_latents
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.infer.inspect import get_model_relations
from pyro.infer.reparam import NeuTraReparam
from torch import nn
from zuko.bayesian import BayesianModel

# Pyro


def pyro_distribution(s, prior=False, c=None):
    t = s.transform(c)
    return dist.TransformedDistribution(normal(), [t.inv if prior else t])


def check_transformed_distribution(s):
    x, c = inputs(s, 5)
    for prior in (False, True):
        d = pyro_distribution(s, prior, c)
        assert d.event_shape == (3,)
        z = d.rsample(() if s.context else (5,))
        assert z.shape == (5, 3)
        again = pyro_distribution(copy.deepcopy(s), prior, c)
        agree(d.log_prob(z), again.log_prob(z.detach()), atol=1e-3)
        assert d.log_prob(x).shape == (5,)


def elbo_step(s, loss):
    c = inputs(s)[1]

    def model():
        with pyro.plate("n", 4):
            z = pyro.sample("z", dist.Normal(torch.ones(3), 0.5).to_event(1))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.zeros(4, 3))

    def guide():
        pyro.module("s", s)
        with pyro.plate("n", 4):
            pyro.sample("z", pyro_distribution(s, c=c))

    before = [p.detach().clone() for p in parameters(s)]
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss)
    for _ in range(2):
        svi.step()
    moved = [not torch.equal(p, q) for p, q in zip(parameters(s), before, strict=True)]
    assert sum(moved) >= len(moved) - 1


def check_svi(s):
    elbo_step(s, Trace_ELBO())


def check_trace_graph(s):
    elbo_step(s, TraceGraph_ELBO(2, vectorize_particles=True, max_plate_nesting=1))


def check_plates(s):
    c = inputs(s)[1]
    with pyro.plate("outer", 2), pyro.plate("inner", 5):
        for prior in (False, True):
            z = pyro.sample(f"z{prior}", pyro_distribution(s, prior, c))
            assert z.shape == (5, 2, 3)


def check_param_store(s):
    x, c = inputs(s, 5)
    expected = s(x, c)
    pyro.module("s", s)
    file = io.BytesIO()
    torch.save(pyro.get_param_store().get_state(), file)
    pyro.clear_param_store()
    with torch.no_grad():
        for p in s.parameters():
            p.zero_()
    file.seek(0)
    pyro.get_param_store().set_state(torch.load(file, weights_only=False))
    pyro.module("s", s, update_module_params=True)
    agree(s(x, c), expected)


def run_nuts(model):
    mcmc = MCMC(NUTS(model, max_tree_depth=2), 3, 2, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples()


def check_nuts(s):
    c = inputs(s)[1]
    s.requires_grad_(False)

    def model():
        z = pyro.sample("z", pyro_distribution(s, prior=True, c=c))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(3))

    assert run_nuts(model)["z"].shape == (3, 3)


def check_neutra(s):
    guide = getattr(s, "guide", None)
    if guide is None:
        guide = AutoNormalizingFlow(three_latents, lambda _: s.part)
        guide()
    neutra = NeuTraReparam(guide.requires_grad_(False))
    latent = run_nuts(pyro.poutine.reparam(three_latents, config=lambda _: neutra))
    assert neutra.transform_sample(latent["scale_shared_latent"])["x"].shape == (3, 2)
    assert Predictive(three_latents, guide=guide, num_samples=4)()["x"].shape == (4, 2)


def check_render_model(s):
    # Pyro forks the random state of all devices, and the fake one of conftest.py has none.
    fork = partial(torch.random.fork_rng, devices=[])
    c = inputs(s)[1]

    def model():
        z = pyro.sample("z", pyro_distribution(s, c=c))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.zeros(3))

    with mock.patch("torch.random.fork_rng", fork):
        assert get_model_relations(model)["sample_sample"] == {"z": [], "y": ["z"]}


def check_conditional(s):
    c = torch.randn(5, 2)
    for lazy in (s.part, s.part.inv):
        d = dist.ConditionalTransformedDistribution(normal(), [lazy]).condition(c)
        assert d.log_prob(d.rsample()).shape == (5,)


# zuko


def check_zuko_flow(s):
    base = zuko.flows.MAF(3).base
    x, c = inputs(s, 5)
    for lazy in (s.lazy(), zuko.lazy.LazyInverse(s.lazy())):
        flow = zuko.lazy.Flow([zuko.flows.MaskedAutoregressiveTransform(3, s.context), lazy], base)
        d = flow(c)
        z = d.rsample(() if s.context else (5,))
        agree(d.log_prob(z), flow(c).log_prob(z.detach()), atol=1e-3)
        assert flow(c).log_prob(x).shape == (5,)


def check_zuko_composition(s):
    x, c = inputs(s, 5)
    t = zuko.transforms.ComposedTransform(s.transform(c), zuko.transforms.SoftclipTransform(9.0))
    y, ladj = t.call_and_ladj(x)
    agree(t.inv(y), x, atol=1e-3)
    assert ladj.shape in ((5,), (5, 3))


def check_mixtures(s):
    c = torch.randn(4, s.context) if s.context else None
    logits, x = torch.randn(4), torch.randn(6, 3)
    t = s.transform(c)
    flow = zuko.distributions.NormalizingFlow(t, zuko.distributions.DiagNormal(*moments(4)))
    mixtures = [zuko.distributions.Mixture(flow, logits)]
    components = dist.TransformedDistribution(normal(4), [t.inv])
    mixtures.append(dist.MixtureSameFamily(dist.Categorical(logits=logits), components))
    for mixture in mixtures:
        assert mixture.sample((5,)).shape == (5, 3)
    agree(mixtures[0].log_prob(x), mixtures[1].log_prob(x))


def moments(*batch):
    return torch.zeros(*batch, 3), torch.ones(*batch, 3)


def check_bayesian(s):
    model = BayesianModel(s)
    x, c = inputs(s, 5)
    with model.reparameterize() as sampled:
        value = sampled(x, c).mean() + sampled.inverse(x, c).mean()
    value.backward()
    grads = [p.grad for p in model.means.parameters()]
    assert sum(g is not None and bool(g.any()) for g in grads) >= len(grads) - 1


# Simulation-based inference


def build(s, features, context):
    """A flow of the subject, once sizes are known."""
    assert (features, context) == (3, 2)
    return (
        s.part
        if isinstance(s.part, zuko.lazy.Flow)
        else zuko.lazy.Flow([s.part], zuko.flows.MAF(3).base)
    )


def check_sbi(s):
    inference = pytest.importorskip("sbi.inference")
    estimators = pytest.importorskip("sbi.neural_nets.estimators")

    def estimator(theta, x):
        flow = build(s, theta.shape[1], x.shape[1])
        return estimators.ZukoFlow(flow, nn.Identity(), theta.shape[1:], x.shape[1:])

    prior = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    trainer = inference.NPE(prior, density_estimator=estimator, show_progress_bars=False)
    theta = prior.sample((60,))
    trainer.append_simulations(theta, theta[:, :2] + 0.1)
    trained = trainer.train(training_batch_size=20, max_num_epochs=1)
    posterior = trainer.build_posterior(trained)
    z = posterior.sample((5,), x=torch.zeros(1, 2), show_progress_bars=False)
    assert posterior.log_prob(z, x=torch.zeros(1, 2)).shape == (5,)


def check_lampe(s):
    inference = pytest.importorskip("lampe.inference")
    npe = inference.NPE(3, 2, build=partial(build, s))
    theta = torch.randn(20, 3)
    inference.NPELoss(npe)(theta, theta[:, :2]).backward()
    assert npe.flow(torch.zeros(2)).sample((5,)).shape == (5, 3)
