"""Flows for sbi, with its z-scoring."""

import importlib
import pickle
from functools import partial

import pytest
import torch
import zuko
from torch import nn

from pyro_sinflow import SinusoidalFlow, fast_inverse, record_inversions
from pyro_sinflow.sbi import posterior_nn, variational_family

LOC, SCALE = torch.tensor([100.0, -3.0]), torch.tensor([20.0, 0.1])
PRIOR = torch.distributions.MultivariateNormal(LOC, SCALE.square().diag())
BOX = torch.distributions.Independent(
    torch.distributions.Uniform(torch.zeros(2), torch.tensor([1.0, 50.0])), 1
)


def simulations(prior, n=400):
    theta = prior.sample((n,))
    return theta, 1000 * torch.cat((theta, theta.sum(dim=1, keepdim=True)), dim=1)


def small(features, context=0):
    return SinusoidalFlow(features, context, transforms=1, hidden_features=(8,))


def turned(features):
    return SinusoidalFlow(features, transforms=1, hidden_features=(8,), tails=False)


@pytest.fixture
def sbi():
    return pytest.importorskip("sbi")


@pytest.mark.parametrize("make", [posterior_nn, partial(variational_family, PRIOR)])
def test_a_missing_sbi_is_said(make, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr("pyro_sinflow.sbi.import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="the extra 'inference'"):
        make()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"build": 3}, TypeError, "'build' should be callable"),
        ({"z_score_theta": "all"}, ValueError, "'z_score_theta' should be one of"),
        ({"z_score_x": "transform_to_unconstrained"}, ValueError, "'z_score_x' should be one of"),
        ({"embedding_net": 3}, TypeError, "'embedding_net' should be a Module"),
        ({"z_score_theta": "transform_to_unconstrained"}, ValueError, "'x_dist' should be"),
    ],
)
def test_wrong_options_of_a_posterior(options, error, message, monkeypatch):
    monkeypatch.setattr("pyro_sinflow.sbi.import_module", lambda name: None)
    with pytest.raises(error, match=message):
        posterior_nn(**options)


@pytest.mark.parametrize(
    ("prior", "options", "error", "message"),
    [
        (3, {}, TypeError, "'prior' should be a Distribution"),
        (PRIOR, {"build": 3}, TypeError, "'build' should be callable"),
        (PRIOR, {"z_score_theta": "all"}, ValueError, "'z_score_theta' should be one of"),
    ],
)
def test_wrong_options_of_a_variational_family(prior, options, error, message, monkeypatch):
    monkeypatch.setattr("pyro_sinflow.sbi.import_module", lambda name: None)
    with pytest.raises(error, match=message):
        variational_family(prior, **options)


def test_the_package_does_not_import_sbi():
    module = importlib.import_module("pyro_sinflow.sbi")
    assert not hasattr(module, "ZukoFlow")


def first_of(estimator):
    """What the parameters are when they leave the first transformation of the flow."""
    first, *_ = estimator.net.transform.transforms
    return first()


def test_parameters_and_observations_are_standardized_as_sbi_does_it(sbi):
    from sbi.neural_nets.net_builders import build_zuko_maf

    theta, x = simulations(PRIOR)
    for score in ("independent", "structured"):
        ours = posterior_nn(small, z_score_theta=score, z_score_x=score)(theta, x)
        theirs = build_zuko_maf(theta, x, z_score_x=score, z_score_y=score)
        assert torch.equal(first_of(ours)(theta), first_of(theirs)(theta))
        assert torch.equal(ours.embedding_net(x), theirs.embedding_net(x))
    z = first_of(posterior_nn(small)(theta, x))(theta)
    assert torch.allclose(z.mean(dim=0), torch.zeros(2), atol=1e-3)
    assert torch.allclose(z.std(dim=0), torch.ones(2), atol=1e-3)


@pytest.mark.parametrize("none", [None, "none"])
def test_nothing_is_standardized_unless_wanted(sbi, none):
    theta, x = simulations(PRIOR)
    estimator = posterior_nn(small, z_score_theta=none, z_score_x=none)(theta, x)
    assert len(estimator.net.transform.transforms) == 1
    assert torch.equal(estimator.embedding_net(x), x)


def test_a_bounded_prior_bounds_the_posterior(sbi):
    theta, x = simulations(BOX)
    build = posterior_nn(small, z_score_theta="transform_to_unconstrained", x_dist=BOX)
    estimator = build(theta, x)
    with torch.no_grad():
        samples = estimator.sample((500,), x[:1])
        log_prob = estimator.log_prob(samples, x[:1])
    assert BOX.support.check(samples).all()
    assert log_prob.isfinite().all()


def test_the_density_of_unscaled_parameters_integrates_to_one(sbi):
    theta, x = simulations(PRIOR)
    estimator = posterior_nn(small)(theta, x)
    low, high = LOC - 8 * SCALE, LOC + 8 * SCALE
    axes = [torch.linspace(a, b, 200) for a, b in torch.stack((low, high), dim=1).tolist()]
    points = torch.cartesian_prod(*axes)
    cell = (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
    with torch.no_grad():
        density = estimator.log_prob(points[:, None], x[:1]).exp()
    assert float(density.sum() * cell) == pytest.approx(1.0, abs=1e-3)


def test_embedding_networks_and_other_flows(sbi):
    theta, x = simulations(PRIOR)
    net = nn.Linear(3, 5)
    built = posterior_nn(
        lambda n, c: fast_inverse(zuko.flows.MAF(n, c, transforms=1)), embedding_net=net
    )(theta, x)
    assert built.embedding_net[-1] is net
    assert built.sample((4,), x[:6]).shape == (4, 6, 2)


def test_npe_trains_and_its_posterior_is_pickled(sbi):
    from sbi.inference import NPE

    theta, x = simulations(PRIOR)
    trainer = NPE(PRIOR, density_estimator=posterior_nn(small), show_progress_bars=False)
    trainer.append_simulations(theta, x).train(max_num_epochs=3, learning_rate=1e-2)
    posterior = pickle.loads(pickle.dumps(trainer.build_posterior()))
    samples = posterior.sample((50,), x=x[0], show_progress_bars=False)
    assert samples.shape == (50, 2)
    assert pickle.loads(pickle.dumps(posterior_nn(small)))(theta, x) is not None


def potential(prior, x):
    from sbi.inference.potentials.base_potential import BasePotential

    class Potential(BasePotential):
        def __call__(self, theta, track_gradients=True):
            return self.prior.log_prob(theta) - (theta - self.x_o[0]).square().sum(dim=-1)

        def to(self, device):
            pass

    return Potential(prior, x_o=x)


def test_vi_samples_in_one_pass_and_within_the_support(sbi):
    from sbi.inference import VIPosterior

    x = torch.tensor([[0.5, 25.0]])
    q = variational_family(BOX, turned)
    posterior = VIPosterior(potential(BOX, x), BOX, q=q).set_default_x(x)
    with record_inversions() as inversions:
        posterior.train(
            max_num_iters=5, n_particles=16, quality_control=False, show_progress_bar=False
        )
    assert inversions == []
    samples = posterior.sample((100,))
    assert BOX.support.check(samples).all()
    assert posterior.log_prob(samples).isfinite().all()
    copied = pickle.loads(pickle.dumps(q))(BOX.event_shape, posterior.link_transform)
    assert copied.sample((3,)).shape == (3, 2)


@pytest.mark.parametrize("score", ["independent", "structured", "none"])
def test_samples_and_densities_of_a_variational_family_agree(sbi, score):
    link = torch.distributions.ComposeTransform([])
    q = variational_family(PRIOR, turned, z_score_theta=score)(PRIOR.event_shape, link)
    with torch.no_grad():
        theta, log_prob = q.sample_and_log_prob((20,))
        assert torch.allclose(q.log_prob(theta), log_prob, atol=2e-3)
    if score == "independent":
        spread = q.sample((2000,)).std(dim=0) / SCALE
        assert (spread > 0.5).all()
        assert (spread < 2.0).all()


@pytest.mark.parametrize("build", [None, zuko.flows.NSF])
def test_a_variational_family_has_densities_far_from_its_samples(sbi, build):
    # sbi discards a trained family if the density of a draw from the prior is not finite.
    options = () if build is None else (build,)
    link = torch.distributions.ComposeTransform([])
    q = variational_family(PRIOR, *options)(PRIOR.event_shape, link)
    with torch.no_grad():
        log_prob = q.log_prob(LOC + 100 * SCALE * torch.eye(2))
    assert (log_prob > -1e5).all()


def test_a_variational_family_without_tails_is_asked_for(sbi):
    q = variational_family(PRIOR, small)
    with pytest.raises(ValueError, match="'build' should make a flow with tails=False, got one"):
        q(PRIOR.event_shape, torch.distributions.ComposeTransform([]))
