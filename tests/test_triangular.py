"""TriangularTransform and LDUTransform: contract, guarantee and accuracy of the inverse."""

import copy
import gc
import pickle
import weakref

import hypothesis.strategies as st
import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from conftest import perturb, residual, slogdet
from hypothesis import given, settings
from pyro.infer import MCMC, NUTS
from torch import nn
from torch.distributions import constraints

from pyro_sinflow import (
    LDU,
    ConditionalLDU,
    FastInverse,
    InversionError,
    InversionWarning,
    LDUTransform,
    SinusoidalFlow,
    SinusoidalTransform,
    Solver,
    TriangularTransform,
    fast_inverse,
    record_inversions,
)

AIM = {torch.float32: 1e-5, torch.float64: 1e-11}


def linear(weight):
    """A conditioner whose shift is linear."""
    return lambda x: zuko.transforms.AdditiveTransform(x @ weight.T)


@given(
    features=st.integers(1, 12),
    batch=st.sampled_from([(), (0,), (1,), (5,), (2, 3)]),
    scale=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25)
def test_block_round_trip(features, batch, scale, seed):
    torch.manual_seed(seed)
    block = perturb(LDU(features, scale=scale, hidden_features=(16,)).double(), 0.5)
    y = 3 * torch.randn(*batch, features, dtype=torch.float64)
    with torch.no_grad():
        x = block.inv(y)
    assert x.shape == y.shape
    assert residual(block, x, y) <= AIM[torch.float64]


@pytest.mark.parametrize("dtype", AIM)
@pytest.mark.parametrize("features", [1, 2, 16, 64])
@pytest.mark.parametrize("conditioner", ["independent", "shift", "autoregressive"])
def test_flow_of_8_round_trip(dtype, features, conditioner):
    kwargs = {"conditioner": conditioner}
    if conditioner == "shift":
        kwargs = {"conditioner": "independent", "scale": False}
    flow = perturb(SinusoidalFlow(features, transforms=8, **kwargs).to(dtype), 0.02)
    z = torch.randn(16, features, dtype=dtype)
    with torch.no_grad(), record_inversions() as inversions:
        x = flow().transform.inv(z)
    assert residual(flow().transform, x, z) <= AIM[dtype]
    passes = [i.iterations for i in inversions if i.problem == "triangular"]
    assert max(passes) <= features


def test_passes_never_exceed_features_whatever_the_map():
    # A shift by 100 times the feature before: no contraction, and its powers reach 1e30.
    weight = 100 * torch.diag(torch.ones(15, dtype=torch.float64), -1)
    t = TriangularTransform(linear(weight))
    y = torch.randn(64, 16, dtype=torch.float64)
    with record_inversions() as inversions:
        x = t.inv(y)
    assert [i.iterations for i in inversions] == [16]
    exact = torch.linalg.solve_triangular(torch.eye(16) + weight, y[..., None], upper=False)
    assert torch.allclose(x, exact[..., 0], rtol=1e-12)


def test_an_event_without_features():
    t = TriangularTransform(lambda x: zuko.transforms.AdditiveTransform(torch.zeros_like(x)))
    y = torch.zeros(5, 0)
    assert t.inv(y).shape == t(y).shape == (5, 0)
    assert torch.func.vmap(t.inv)(y).shape == (5, 0)


def test_a_single_feature_tells_when_it_is_lost():
    t = LDU(1).block.lower()
    with torch.no_grad():
        t.map.network.constant.fill_(torch.nan)
    with pytest.raises(InversionError, match="leaves the range"):
        t.inv(torch.ones(3, 1))


@pytest.mark.parametrize("lost", [1, "all"])
@pytest.mark.parametrize("rows", [3, 500])  # by passes, and by forward substitution
def test_events_out_of_range_are_nan(lost, rows):
    block, y = LDU(3).block, torch.randn(rows, 3)
    t, lost = block.lower(), rows if lost == "all" else lost
    expected = t.inv(y)[lost:]
    y[:lost] = 1e25
    y = y.requires_grad_()
    with (
        pyro.validation_enabled(lost < rows),
        pytest.warns(
            InversionWarning, match=rf"in {lost} of {rows} events: .* These events are set to NaN"
        ),
    ):
        x = t.inv(y)
    assert x[:lost].isnan().all()
    assert torch.allclose(x[lost:], expected, atol=1e-5)
    grads = torch.autograd.grad(x.nansum(), (y, *block.lower.parameters()))
    assert all(g.isfinite().all() for g in grads)


def test_events_out_of_range_are_nan_where_values_cannot_be_read():
    t, y = LDU(3), torch.randn(5, 3)
    y[0] = 1e25
    x = torch.func.vmap(t.inv)(y)
    assert x[0].isnan().all()
    assert torch.allclose(x[1:], t.inv(y[1:]), atol=1e-5)


def test_a_gradient_out_of_range_is_nan():
    weight = torch.tensor([[0.0, 0.0, 0.0], [-1e13, 0.0, 0.0], [0.0, -1e13, 0.0]])
    t = TriangularTransform(lambda x: zuko.transforms.AdditiveTransform(x @ weight.T))
    y = torch.zeros(2, 3, requires_grad=True)
    x = t.inv(y)
    with pytest.warns(InversionWarning, match="The gradient of the inverse .* in 1 of 2 events"):
        x.backward(torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    assert y.grad[0].isnan().all()
    assert torch.equal(y.grad[1], torch.tensor([1.0, 0.0, 0.0]))


def test_mcmc_rejects_events_out_of_range():
    pyro.set_rng_seed(2)  # reaches such events in the warm-up
    t = LDU(2).requires_grad_(False)

    def model():
        scale = pyro.sample("log_scale", dist.Normal(0.0, 3.0)).exp()
        noise = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        affine = dist.transforms.AffineTransform(torch.zeros(2), scale, event_dim=1)
        flow = dist.TransformedDistribution(noise, [t, affine])
        pyro.sample("x", flow, obs=torch.tensor([1.0, -0.5]))

    mcmc = MCMC(NUTS(model), num_samples=20, warmup_steps=50, disable_progbar=True)
    with pytest.warns(InversionWarning, match="in 1 of 1 events"):
        mcmc.run()
    assert mcmc.get_samples()["log_scale"].isfinite().all()


def test_overflow_on_the_way_does_not_spoil_settled_features():
    # At the root all features are 3. Until its predecessor is, a feature overflows to infinity, and
    # infinity times the zeros of a masked weight is NaN for the features that have settled.
    def conditioner(x):
        before = nn.functional.pad(x[..., :-1], (1, 0), value=3.0)
        shift = x @ torch.zeros(6, 6)
        return torch.distributions.AffineTransform(shift, torch.exp(-60 * (before - 3).square()))

    y = torch.full((6,), 3.0)
    assert not conditioner(torch.zeros(6)).inv(y).isfinite().all()
    assert torch.equal(TriangularTransform(conditioner).inv(y), y)


def test_order_is_the_maps_own_affair():
    weight = torch.randn(6, 6, dtype=torch.float64).tril(-1)
    permutation = torch.randperm(6)
    t = TriangularTransform(linear(weight[permutation][:, permutation]))
    y = torch.randn(3, 6, dtype=torch.float64)
    assert residual(t, t.inv(y), y) <= 1e-14


def test_a_map_that_is_not_triangular_is_an_error():
    y = torch.randn(5, 4)
    with pytest.raises(InversionError, match="not triangular or not deterministic"):
        TriangularTransform(linear(3 * torch.ones(4, 4))).inv(y)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: zuko.transforms.DependentTransform(t, 0),
        lambda t: zuko.transforms.ComposedTransform(zuko.transforms.SoftclipTransform(9.0), t),
    ],
)
def test_an_inverse_leaves_no_reference_cycles(wrap):
    made = []

    class Shift(zuko.transforms.AdditiveTransform):
        def __init__(self, shift):
            super().__init__(shift)
            made.append(weakref.ref(self))

    weight = torch.randn(4, 4).tril(-1)
    gc.disable()
    try:
        TriangularTransform(lambda x: wrap(Shift(x @ weight.T))).inv(torch.randn(5, 4))
        assert len(made) > 2
        assert not any(shift() for shift in made)
    finally:
        gc.enable()


def test_dropout_in_training_is_an_error_and_not_in_evaluation():
    block = perturb(LDU(6, dropout=0.5))
    y = torch.randn(64, 6)
    with torch.no_grad():
        with pytest.raises(InversionError, match=r"Call '.eval\(\)' if it has dropout"):
            block.inv(y)
        assert residual(block.eval(), block.inv(y), y) <= AIM[torch.float32]


def test_a_conditioner_that_returns_nan_is_an_error():
    bad = lambda x: zuko.transforms.AdditiveTransform(x * torch.nan)  # noqa: E731
    with pytest.raises(InversionError):
        TriangularTransform(bad).inv(torch.randn(3))


def test_a_limit_below_the_guarantee_warns():
    t = TriangularTransform(linear(torch.ones(8, 8).tril(-1)), solver=Solver(max_iter=2))
    with pytest.warns(InversionWarning, match="triangular map stopped after 2 iterations"):
        t.inv(torch.randn(3, 8))


def test_algorithm_1_reaches_the_same_root():
    block = perturb(LDU(8, solver=Solver("banach", max_iter=10_000, tolerance=1e-11)).double())
    newton = LDU(8).double()
    newton.load_state_dict(block.state_dict())
    y = torch.randn(32, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(block.inv(y), newton.inv(y), atol=1e-7)


@pytest.mark.parametrize("make", [zuko.flows.MAF, zuko.flows.NSF, zuko.flows.NAF])
@pytest.mark.parametrize("context", [0, 3])
def test_fast_inverse_agrees_with_zuko_in_fewer_passes(make, context):
    features = 24
    flow = perturb(make(features, context, transforms=2, randperm=True), 0.02)
    fast = fast_inverse(flow)
    c = torch.randn(context) if context else None
    z = torch.randn(8, features)
    with torch.no_grad():
        expected = flow(c).transform.inv(z)
        with record_inversions() as inversions:
            x = fast(c).transform.inv(z)
        assert torch.allclose(x, expected, atol=2e-5)
        assert torch.equal(fast(c).log_prob(x), flow(c).log_prob(x))
    assert len(inversions) == 2
    assert max(i.iterations for i in inversions) < features
    assert [*fast.parameters()] == [*flow.parameters()]


def test_fast_inverse_knows_couplings_and_inverses():
    coupling = zuko.flows.MaskedAutoregressiveTransform(8, passes=2)
    flow = zuko.lazy.Flow(
        [coupling.inv, zuko.flows.GeneralCouplingTransform(8, mask=torch.arange(8) % 2 == 0)],
        zuko.flows.MAF(8).base,
    )
    fast = fast_inverse(perturb(flow))
    x = torch.randn(5, 8)
    with torch.no_grad(), record_inversions() as inversions:
        assert torch.allclose(fast().log_prob(x), flow().log_prob(x), atol=1e-5)
    assert [i.iterations for i in inversions] == [2]
    assert isinstance(fast.transform.transforms[0].inv, FastInverse)


@pytest.mark.parametrize("features", [(1,), (4,), (2, 3, 2)])
@pytest.mark.parametrize("options", [{}, {"scale": False}])
def test_log_determinant(features, options):
    block = perturb(LDU(features, **options).double())
    x = torch.randn(2, *features, dtype=torch.float64)
    with torch.no_grad():
        y, ladj = block.call_and_ladj(x)
        _, back = block.inv.call_and_ladj(y)
    assert ladj.shape == (2,)
    assert torch.allclose(ladj, slogdet(block, x, len(features)), atol=1e-10)
    assert torch.allclose(back, slogdet(block.inv, y, len(features)), atol=1e-10)
    assert torch.allclose(block.log_abs_det_jacobian(x, y), ladj)


def test_jacobian_is_dense_and_its_factors_are_triangular():
    block = perturb(LDU(5, scale=False))
    x = torch.randn(5)
    jacobian = torch.autograd.functional.jacobian
    assert (jacobian(block, x) != 0).all()
    upper, lower = jacobian(block.upper, x), jacobian(block.lower, x)
    assert torch.equal(upper, upper.triu())
    assert torch.equal(lower, lower.tril())
    assert torch.equal(upper.diag(), torch.ones(5))
    assert torch.equal(lower.diag(), torch.ones(5))


def test_contract():
    block = LDU(3)
    upper, diagonal, lower = block.transforms
    t = LDUTransform(upper, diagonal, lower)
    for each in (block, t, upper):
        assert each.domain.base_constraint is each.codomain.base_constraint is constraints.real
        assert each.domain.event_dim == each.codomain.event_dim == 1
        assert each.event_dim == 1
        assert each.bijective
        assert each.sign == 1
        assert each.inv.inv is each
        assert each.forward_shape((7, 3)) == each.inverse_shape((7, 3)) == (7, 3)
    assert repr(t).startswith("LDUTransform(\n  (upper): TriangularTransform(")
    assert block.with_cache(1) is block
    assert block.with_cache(0)._cache_size == 0
    assert [*block.with_cache(0).parameters()] == [*block.parameters()]
    assert len({block, copy.deepcopy(block)}) == 2

    again = pickle.loads(pickle.dumps(block))
    x = torch.randn(2, 3)
    assert torch.equal(again(x), block(x))
    block(x)  # now there is something in the cache
    assert torch.equal(copy.deepcopy(block)(x), block(x))


def test_context_gives_a_batch_shape():
    block = perturb(ConditionalLDU(3, context=2))
    c = torch.randn(5, 2)
    assert block(c).forward_shape((3,)) == (3,)  # zuko asks for the shape of an event alone
    t = block.condition(c)
    assert t.forward_shape((3,)) == (5, 3)
    y = torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad(block(c).inv(y).sum(), y)
    (expected,) = torch.autograd.grad(t.inv(y.expand(5, 3)).sum(), y)
    assert torch.allclose(grad, expected, atol=1e-5)
    x = torch.randn(3)
    assert t(x).shape == t.inv(x).shape == (5, 3)
    assert torch.allclose(t.inv(t(x)), x.expand(5, 3), atol=1e-4)
    assert t.inv(torch.randn(4, 1, 3)).shape == (4, 5, 3)


def test_diagonal_may_be_any_element_wise_transform():
    block = LDU(3)
    spline = zuko.transforms.MonotonicRQSTransform(*torch.randn(2, 3, 8), torch.randn(3, 7))
    sinusoid = SinusoidalTransform(*torch.randn(3, 3, 4), *torch.randn(2, 3))
    t = LDUTransform(block.upper, zuko.transforms.ComposedTransform(spline, sinusoid), block.lower)
    x = torch.randn(6, 3)
    assert torch.allclose(t.inv(t(x)), x, atol=1e-4)
    assert t.call_and_ladj(x)[1].shape == (6,)


def test_events_without_features_under_vmap():
    t = TriangularTransform(zuko.transforms.AdditiveTransform)
    assert torch.func.vmap(t.inv)(torch.zeros(4, 0)).shape == (4, 0)
