"""The Laplace approximation from which AutoLDU starts."""

import math
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import FLOAT
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from pyro.optim import Adam

from pyro_sinflow import AutoLDU
from pyro_sinflow.laplace import approximate, best_laplace, elbo

Small = partial(AutoLDU, hidden_features=(8,))
NORMAL = dist.MultivariateNormal(
    torch.tensor([1.0, -300.0, 2e-3]).double(),
    scale_tril=torch.tensor([[2.0, 0.0, 0.0], [1.0, 50.0, 0.0], [1e-3, 5e-4, 1e-3]]).double(),
)


def default(features, dtype=torch.float32):
    return torch.zeros(features, dtype=dtype), 0.1 * torch.eye(features, dtype=dtype)


def funnel(z):
    """A density without a mode: it grows without bound for small scales."""
    scale = z[0].exp()
    return dist.Normal(0.0, scale).log_prob(z[1:]).sum() - z[0].square() / 18


@pytest.mark.parametrize("dtype", FLOAT)
@pytest.mark.parametrize("start", [0.0, 2.0])
def test_a_normal_distribution_is_its_own_approximation(dtype, start):
    loc, tril = NORMAL.loc.to(dtype), NORMAL.scale_tril.to(dtype)
    target = dist.MultivariateNormal(loc, scale_tril=tril)
    mean, scale = approximate(target.log_prob, torch.full((3,), start, dtype=dtype))
    assert mean.dtype == scale.dtype == dtype
    assert ((mean - loc).abs() <= 0.02 * tril.diagonal()).all()
    tolerance = 1e-2 if dtype == torch.float32 else 1e-9
    assert torch.allclose(scale, tril, rtol=tolerance, atol=1e-3 * tolerance)


def test_the_mode_of_a_skewed_density():
    # Of log x for x with a gamma distribution: the mode is log(3 / 2), the curvature there 3.
    def log_density(z):
        return (3 * z - 2 * z.exp()).sum()

    loc, scale = approximate(log_density, torch.full((2,), -6.0))
    assert torch.allclose(loc, torch.full((2,), math.log(1.5)), atol=0.02)
    assert torch.allclose(scale, torch.eye(2) / 3**0.5, atol=0.02)


def test_a_saddle_point_is_left():
    def log_density(z):
        return (2 * z.square() - z**4).sum()

    loc, _ = approximate(log_density, torch.tensor([1e-3]))
    assert float(loc) == pytest.approx(1.0, abs=0.02)


def raises(z):
    raise KeyError("no density")


WITHOUT_A_MODE = {
    "funnel": funnel,
    "linear": lambda z: z.sum(),
    "constant": lambda z: 0.0 * z.sum(),
    "NaN": lambda z: math.nan * z.sum(),
    "convex": lambda z: z.square().sum(),
    "no gradient": lambda z: -z.detach().square().sum(),
    "no second derivative": lambda z: Cliff.apply(z).sum(),
    "error": lambda z: z.sum() if (z == 0).all() else raises(z),
    "tiny": lambda z: 2 * z[0] * z[1] + 1e-312 * z.square().sum(),
    "random": lambda z: -(z + torch.randn(3)).square().sum(),
}


class Cliff(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return -z.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return -2 * g * ctx.saved_tensors[0]


@pytest.mark.parametrize("name", WITHOUT_A_MODE)
def test_without_a_mode_the_default_is_taken(name):
    first = default(3, torch.float64 if name == "tiny" else torch.float32)
    assert best_laplace(WITHOUT_A_MODE[name], first, 4) is None


def test_a_default_with_a_higher_elbo_is_taken():
    def spike_on_a_hill(z):
        hill, spike = -z.square().sum() / 2, 3.0 - 1e4 * (z - 0.5).square().sum()
        return torch.logaddexp(hill, spike)

    start, noise = torch.tensor([0.5]), torch.randn(100, 1)
    narrow, wide = approximate(spike_on_a_hill, start), (start, torch.eye(1))
    assert narrow[1].item() == pytest.approx(2e4**-0.5, rel=0.1)
    assert elbo(spike_on_a_hill, narrow, noise) < elbo(spike_on_a_hill, wide, noise)
    assert best_laplace(spike_on_a_hill, wide, 1) is None


def test_the_best_of_two_modes_is_taken():
    modes = torch.tensor([[-1.5, -1.5], [1.0, 1.0]])
    weights = torch.tensor([0.01, 0.99]).log()

    def log_density(z):
        return (weights + dist.Normal(modes, 0.2).to_event(1).log_prob(z)).logsumexp(0)

    torch.manual_seed(0)
    loc, _ = best_laplace(log_density, (modes[0], 0.1 * torch.eye(2)), 4)
    assert torch.allclose(loc, modes[1], atol=0.05)
    loc, _ = best_laplace(log_density, (modes[0], 0.1 * torch.eye(2)), 1)
    assert torch.allclose(loc, modes[0], atol=0.05)


X = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) @ torch.diag(
    torch.tensor([1.0, 100.0, 0.01])
)
Y = X @ torch.tensor([1.0, -0.02, 30.0])
CALLS = []


def regression(y=Y):
    """A regression whose posterior is normal, with columns of very different sizes."""
    CALLS.append(True)
    weights = pyro.sample("weights", dist.Normal(torch.zeros(3), 100.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal((X @ weights.unsqueeze(-1)).squeeze(-1), 0.5), obs=y)


def exact():
    precision = torch.eye(3).double() / 1e4 + X.double().T @ X.double() / 0.25
    covariance = precision.inverse()
    loc = covariance @ (X.double().T @ Y.double()) / 0.25
    return dist.MultivariateNormal(loc.float(), covariance.float())


def check(guide, most=0.02, draws=5000):
    expected = exact()
    posterior = guide.get_posterior()
    z = posterior.sample((draws,))
    divergence = (posterior.log_prob(z) - expected.log_prob(z)).mean()
    assert divergence.item() < most


def test_a_guide_starts_at_a_normal_posterior():
    guide = Small(regression)
    guide()
    check(guide)
    # And stays there, because the optimizer works in units of the posterior.
    svi = SVI(regression, guide, Adam({"lr": 1e-3}), Trace_ELBO(4, vectorize_particles=True))
    before = guide.flow.affine.detach().clone()
    for _ in range(20):
        svi.step()
    trained, whitening = guide.flow.affine.detach().split((5, 4))
    assert torch.equal(whitening, before[5:])
    assert not torch.equal(trained, before[:5])
    check(guide, most=0.5)  # in units of the data, steps of this size would move it by thousands


def test_the_search_is_seen_by_nobody():
    """Neither by handlers around the guide, nor by modes of autograd, nor by gradients."""
    weight = torch.ones((), requires_grad=True)

    def model():
        pyro.sample("z", dist.Normal(weight * pyro.param("p", torch.ones(())), 1.0))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad(), pyro.plate("particles", 7, dim=-1), poutine.trace() as trace:
            guide = Small(model)
            guide()
    assert weight.grad is None
    assert pyro.get_param_store()._params["p"].grad is None
    names = {name for name in trace.trace.nodes if not name.startswith(("_", "AutoLDU"))}
    assert names == {"z"}
    assert guide.flow.affine[3].item() == pytest.approx(1.0, abs=0.02)
    pyro.clear_param_store()
    with torch.inference_mode():
        other = Small(regression)
        other()
        check(other)


def test_predictive_searches_once():
    CALLS.clear()
    guide = Small(regression)
    Predictive(regression, guide=guide, num_samples=5, parallel=True)(Y)
    count = len(CALLS)
    assert count > 100
    guide()
    assert len(CALLS) == count
    check(guide)


def test_a_guide_whose_parameters_are_stored_does_not_search(tmp_path):
    guide = Small(regression)
    guide()
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    CALLS.clear()
    other = Small(regression)
    other()
    assert len(CALLS) < 5
    check(other)


@pytest.mark.parametrize("starts", [0, 4])
def test_starts(starts):
    CALLS.clear()
    guide = Small(
        regression, init_loc_fn=init_to_value(values={"weights": torch.ones(3)}), starts=starts
    )
    guide()
    assert (len(CALLS) > 2) == (starts > 0)
    trained, whitening = guide.flow.affine.split((5, 4))
    assert bool(trained.any()) == (starts == 0)
    assert bool(whitening.any()) == (starts > 0)


def test_weights_load_whether_or_not_there_was_a_search():
    guide, other = Small(regression), Small(regression, starts=0)
    guide()
    pyro.clear_param_store()
    other()
    other.load_state_dict(guide.state_dict())
    check(other)


def test_many_variables_start_at_the_initial_location():
    def model():
        CALLS.append(True)
        pyro.sample("z", dist.Normal(torch.ones(101), 1.0).to_event(1))

    CALLS.clear()
    guide = Small(model)
    guide()
    assert len(CALLS) == 1
    assert guide.flow.affine.shape == (103, 101)
    assert guide.get_posterior().sample().shape == (101,)


def test_a_posterior_with_a_mode_at_zero():
    guide = Small(lambda: pyro.sample("z", dist.Normal(0.0, 3.0)))
    guide()
    assert guide.get_posterior().sample((5000,)).std() == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("kind", ["subsampled", "listed", "discrete"])
def test_a_random_density_is_not_searched(kind):
    """That of a mini-batch, or of some variables while others are drawn at random."""

    def model():
        other = z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if kind == "listed":
            other = pyro.sample("other", dist.Normal(z, 1.0))
        if kind == "discrete":  # two draws are often the same
            pyro.sample("y", dist.Normal(z + pyro.sample("k", dist.Bernoulli(0.1)), 1.0), obs=Y[0])
            return
        with pyro.plate("rows", 200, subsample_size=10) as rows:
            pyro.sample("y", dist.Normal(other, 1.0), obs=Y[rows])

    guide = Small(model)
    if kind == "listed":
        guides = AutoGuideList(model)
        guide = Small(poutine.block(model, hide=["other"]))
        guides.append(guide)
        guides.append(AutoNormal(poutine.block(model, expose=["other"])))
        guides()
    elif kind == "discrete":
        guide = Small(poutine.block(model, hide=["k"]))
        guide()
    else:
        guide()
    assert not guide.flow.affine[3:].any()


def test_a_loss_depends_on_all_stored_parameters():
    """Also on those of the approximation, whose gradient is zero."""
    guide = Small(regression)
    guide()
    loss = Trace_ELBO().differentiable_loss(regression, guide)
    stored = [value.unconstrained() for value in pyro.get_param_store().values()]
    gradients = torch.autograd.grad(loss, stored)
    (affine,) = (g for g in gradients if g.shape == (9, 3))
    assert affine[:5].any()
    assert not affine[5:].any()


@pytest.mark.parametrize(("starts", "error"), [(-1, ValueError), (1.5, TypeError)])
def test_bad_numbers_of_starts(starts, error):
    with pytest.raises(error, match="'starts' should be"):
        AutoLDU(regression, starts=starts)
