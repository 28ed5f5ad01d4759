"""AutoLDU, wherever Pyro's autoguides work."""

import copy
import math
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import perturb
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuideList,
    AutoNormal,
    init_to_median,
    init_to_value,
)
from pyro.infer.reparam import NeuTraReparam
from pyro.optim import ClippedAdam
from torch import nn

from pyro_sinflow import AutoLDU, record_inversions

Small = partial(AutoLDU, hidden_features=(16,), starts=2)  # which take less time


def correlated():
    """A positive number, and a vector that depends on it."""
    scale = pyro.sample("scale", dist.LogNormal(0.5, 0.3))
    loc = scale.log().unsqueeze(-1)
    pyro.sample("x", dist.Normal(loc * torch.tensor([1.0, -2.0]), 0.5).to_event(1))


def grouped(y):
    """A regression with a latent number for each group, in a plate."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", len(y)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def fit(model, guide, *args, steps=200, particles=8, lr=1e-2, **options):
    loss = Trace_ELBO(particles, vectorize_particles=True, max_plate_nesting=1)
    optimizer = ClippedAdam({"lr": lr, "lrd": 0.05 ** (1 / steps)})
    svi = SVI(model, guide, optimizer, loss)
    return [svi.step(*args) for _ in range(steps)]


@pytest.mark.parametrize("blocks", [1, 3])
def test_starts_as_a_diagonal_normal(blocks):
    values = {"scale": torch.tensor(2.0), "x": torch.tensor([3.0, -4.0])}
    options = {"init_loc_fn": init_to_value(values=values), "init_scale": 0.25}
    guide, normal = (
        Small(correlated, blocks=blocks, starts=0, **options),
        AutoDiagonalNormal(correlated, **options),
    )
    guide(), normal()
    x = torch.randn(5, 3)
    expected = normal.get_posterior().log_prob(x)
    assert torch.allclose(guide.get_posterior().log_prob(x), expected, rtol=1e-4)
    assert torch.allclose(guide.get_transform()(x), normal.get_transform()(x), atol=1e-5)


def test_fits_where_a_diagonal_normal_does_not():
    guide = Small(correlated)
    losses = fit(correlated, guide, steps=500)
    assert sum(losses[-50:]) / 50 < 0.1  # the divergence from a normalized target
    draws = Predictive(correlated, guide=guide, num_samples=2000)()
    assert draws["x"].shape == (2000, 2)
    scale = draws["scale"].log()
    assert float(scale.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(scale.std()) == pytest.approx(0.3, abs=0.05)
    correlation = torch.stack((scale, draws["x"][:, 1])).corrcoef()[0, 1]
    assert float(correlation) == pytest.approx(-0.6 / (0.36 + 0.25) ** 0.5, abs=0.1)


def test_scores_its_own_samples_and_others_alike():
    guide = Small(correlated, blocks=2)
    guide()
    perturb(guide, 0.1)
    posterior = guide.get_posterior()
    z = posterior.rsample((50,))
    cached = posterior.log_prob(z)
    assert torch.allclose(guide.get_posterior().log_prob(z.detach()), cached, atol=1e-3)


ELBOS = [
    Trace_ELBO(),
    Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1),
    TraceGraph_ELBO(4, vectorize_particles=True, max_plate_nesting=1),
    TraceMeanField_ELBO(4, vectorize_particles=True, max_plate_nesting=1),
    TraceEnum_ELBO(4, vectorize_particles=True, max_plate_nesting=1),
    JitTrace_ELBO(ignore_jit_warnings=True),
]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("loss", ELBOS, ids=lambda loss: type(loss).__name__)
def test_every_loss_moves_every_parameter(loss):
    y = torch.randn(4)
    guide = Small(grouped)
    guide(y)
    perturb(guide, 0.1)
    svi = SVI(grouped, guide, ClippedAdam({"lr": 1e-2}), loss)
    before = copy.deepcopy(guide.state_dict())
    with record_inversions() as inversions:  # the cache scores samples, also in a trace
        for _ in range(2):
            assert math.isfinite(svi.step(y))
    assert inversions == []
    assert [n for n, p in guide.named_parameters() if torch.equal(p, before[n])] == []


def test_plates_and_predictive():
    y = torch.randn(4)
    guide = Small(grouped)
    fit(grouped, guide, y, steps=3)
    assert guide(y)["z"].shape == (4,)
    draws = Predictive(grouped, guide=guide, num_samples=7)(y)
    assert draws["z"].shape == (7, 4)


def test_subsampling_behaves_as_with_pyros_guides():
    def model(y):
        with pyro.plate("n", 10, subsample_size=len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    outcomes = []
    for make in (AutoDiagonalNormal, Small):
        guide = make(model)
        with warnings.catch_warnings(record=True) as warned:
            shape = guide(torch.randn(4))["z"].shape
        with pytest.raises(Exception, match=r".+") as error:
            Trace_ELBO().loss(model, guide, torch.randn(3))
        outcomes.append((shape, type(error.value), str(error.value)))
    assert outcomes[0] == outcomes[1]
    (warning,) = warned  # which Pyro's do not give
    assert "'z' is in plate 'n', which subsamples 4 of 10 elements" in str(warning.message)


def test_discrete_and_missing_latents_fail_as_with_pyros_guides():
    def discrete():
        pyro.sample("z", dist.Bernoulli(0.5))

    def empty():
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    for model in (discrete, empty):
        raised = []
        for make in (AutoDiagonalNormal, Small):
            with pytest.raises(Exception, match=r".+") as error:
                make(model)()
            raised.append(type(error.value))
        assert raised[0] is raised[1]


def test_in_a_list_of_guides():
    y = torch.randn(4)
    guide = AutoGuideList(grouped)
    guide.append(AutoNormal(pyro.poutine.block(grouped, expose=["mean"])))
    guide.append(Small(pyro.poutine.block(grouped, hide=["mean"])))
    fit(grouped, guide, y, steps=5)
    assert set(guide(y)) == {"mean", "z"}
    assert guide.median(y)["z"].shape == (4,)
    assert guide.quantiles([0.1, 0.9], y)["z"].shape == (2, 4)


def test_medians_and_quantiles_are_those_of_samples():
    guide = Small(correlated, init_loc_fn=init_to_median(num_samples=1000), starts=0)
    for method in (guide.median, guide.get_posterior, guide.get_transform, guide.get_base_dist):
        with pytest.raises(RuntimeError, match=r"AutoLDU.*call"):
            method()
    guide()
    normal = AutoDiagonalNormal(correlated)
    normal()
    with torch.no_grad():
        normal.loc.copy_(10 * guide.flow.affine[0])
    for name, value in guide.median().items():
        assert torch.allclose(value, normal.median()[name], atol=0.02, rtol=0.02)
    levels = [0.05, 0.5, 0.95]
    for name, value in guide.quantiles(levels).items():
        expected = normal.quantiles(levels)[name]
        assert value.shape == expected.shape
        assert torch.allclose(value, expected, atol=0.02, rtol=0.02)
    with pytest.raises(ValueError, match=r"'quantiles' should be between 0 and 1, got 1.5"):
        guide.quantiles([0.5, 1.5])
    with pytest.raises(ValueError, match=r"'quantiles' should be a sequence of numbers, got 0.5"):
        guide.quantiles(0.5)


def test_neutra():
    guide = Small(correlated)
    fit(correlated, guide, steps=300)
    neutra = NeuTraReparam(guide)
    model = pyro.poutine.reparam(correlated, config=lambda _: neutra)
    mcmc = MCMC(
        NUTS(model, max_tree_depth=4), num_samples=100, warmup_steps=50, disable_progbar=True
    )
    mcmc.run()
    samples = neutra.transform_sample(mcmc.get_samples()["scale_shared_latent"])
    assert samples["x"].shape == (100, 2)
    assert float(samples["scale"].log().mean()) == pytest.approx(0.5, abs=0.2)


def test_render_model():
    pytest.importorskip("graphviz")
    guide = Small(grouped)
    guide(torch.randn(4))
    graph = pyro.render_model(guide, model_args=(torch.randn(4),), render_params=True)
    assert "z" in graph.source


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_takes_the_dtype_of_the_latent_variables(dtype):
    def model():
        loc = torch.zeros(2, dtype=dtype)
        pyro.sample("x", dist.Normal(loc, torch.ones((), dtype=dtype)).to_event(1))

    guide = Small(model)
    assert guide()["x"].dtype == dtype
    assert {p.dtype for p in guide.parameters()} == {dtype}
    fit(model, guide, steps=2)
    assert guide.median()["x"].dtype == dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_takes_the_device_of_the_latent_variables():
    def model():
        loc = torch.zeros(2, device="cuda")
        pyro.sample("x", dist.Normal(loc, torch.ones((), device="cuda")).to_event(1))

    guide = Small(model)
    fit(model, guide, steps=2)
    assert {p.device.type for p in guide.parameters()} == {"cuda"}
    assert guide.quantiles([0.5])["x"].device.type == "cuda"


def test_half_precision_is_lifted():
    def model():
        loc = torch.zeros(2, dtype=torch.bfloat16)
        pyro.sample("x", dist.Normal(loc, torch.ones_like(loc)).to_event(1))

    guide = Small(model)
    assert guide()["x"].dtype == torch.float32
    guide.bfloat16()
    assert guide()["x"].dtype == guide.median()["x"].dtype == torch.float32


def test_many_samples_of_many_variables():
    """A product with the matrix for each sample would take tens of seconds."""

    def model():
        pyro.sample("x", dist.Normal(torch.arange(300.0), 1.0).to_event(1))

    guide = Small(model)
    guide()
    assert torch.allclose(guide.median()["x"], torch.arange(300.0), atol=0.2)


def test_one_latent_number():
    def model():
        pyro.sample("x", dist.Normal(3.0, 1.0))

    guide = Small(model)
    losses = fit(model, guide, steps=300)
    assert sum(losses[-20:]) / 20 < 0.05


def test_bad_arguments():
    cases = [
        ({"init_scale": 0.0}, ValueError, "'init_scale' should be strictly between 0.0 and inf"),
        ({"init_scale": "1"}, TypeError, "'init_scale' should be a number"),
        ({"init_loc_fn": 3}, TypeError, "'init_loc_fn' should be callable, got 3"),
        ({"blocks": 0}, ValueError, "'blocks' should be at least 1, got 0"),
        ({"hidden_features": (0,)}, ValueError, "'hidden_features' should be at least 1"),
        ({"activation": nn.Softmax}, ValueError, "'activation' should act on each unit"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            AutoLDU(correlated, **options)
    with pytest.raises(TypeError, match="'model' should be callable"):
        AutoLDU(3)


def test_autocast_keeps_the_precision_of_affine_maps():
    """Half precision would move samples by several standard deviations of a narrow posterior."""
    x = torch.linspace(100.0, 101.0, 50)
    y = 2 * x + 1 + 0.1 * torch.randn(50)

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 100.0))
        b = pyro.sample("b", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", 50):
            pyro.sample("y", dist.Normal(a.float() + b.float() * x, 0.1), obs=y)

    guide = Small(model)
    guide()
    z = torch.randn(100, 2)
    expected = guide.get_transform()(z)
    with torch.autocast("cpu", torch.bfloat16):
        found = guide.get_transform()(z)
    scale = guide.get_transform().transforms[-1].matrix
    errors = torch.linalg.solve(scale, (found - expected).T)
    assert errors.abs().max() < 0.05
