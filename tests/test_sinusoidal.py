"""SinusoidalTransform: its contract, its inverse at every extreme, and its formula."""

import math
import pickle

import hypothesis.strategies as st
import pytest
import torch
from conftest import FLOAT, perturb, residual, slogdet
from hypothesis import example, given
from torch.distributions import constraints

from pyro_sinflow import (
    ConditionalLDU,
    InversionWarning,
    Sinusoidal,
    SinusoidalTransform,
    Solver,
    record_inversions,
)

unconstrained = st.floats(-30, 30, width=32)


def draw(*batch, components=3, scale=2.0, dtype=torch.float64):
    vectors = [scale * torch.randn(*batch, components, dtype=dtype) for _ in range(3)]
    scalars = [scale * torch.randn(batch, dtype=dtype) for _ in range(2)]
    return [*vectors, *scalars]


def literal(x, frequency, phase, weight, residual, shift, min_slope=1e-3):
    """Eq. 15 of the paper as it stands, with the constant folded into the shift."""
    a = torch.nn.functional.softplus(frequency)
    w, alpha = weight.softmax(-1), (1 - min_slope) * residual.tanh()
    sines = torch.sin(2 * a * x[..., None] + 2 * phase) - torch.sin(2 * phase)
    return x + shift - alpha * (w / (2 * a) * sines).sum(-1)


def test_is_the_papers_formula():
    p = draw(5)
    x = torch.linspace(-20, 20, 101, dtype=torch.float64)[:, None]
    assert torch.allclose(SinusoidalTransform(*p)(x), literal(x, *p), rtol=0, atol=1e-12)


def test_staircase_of_figure_2():
    # tau(x) = x - 0.8 [0.5 sin(2x + 1) + 0.3 sin(-0.1x) + 0.2 sin(0.7x - 3)]. In Eq. 15 each sine
    # carries w / (2a), so that w is in proportion to 2a times its factor; sin(-0.1x) is the sine of
    # 0.1x + pi.
    def tau(x):
        return x - 0.8 * (
            0.5 * torch.sin(2 * x + 1) + 0.3 * torch.sin(-0.1 * x) + 0.2 * torch.sin(0.7 * x - 3)
        )

    a = torch.tensor([1.0, 0.05, 0.35], dtype=torch.float64)
    b = torch.tensor([0.5, torch.pi / 2, -1.5], dtype=torch.float64)
    factors = 2 * a * torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    alpha = 0.8 * factors.sum()
    shift = tau(torch.zeros((), dtype=torch.float64))
    t = SinusoidalTransform(a.expm1().log(), b, factors.log(), (alpha / (1 - 1e-3)).atanh(), shift)
    x = torch.linspace(-10, 10, 201, dtype=torch.float64)
    assert torch.allclose(t(x), tau(x), atol=1e-12)


@pytest.mark.parametrize("dtype", FLOAT)
@given(
    parameters=st.lists(unconstrained, min_size=11, max_size=11),
    value=st.floats(-1e4, 1e4, width=32),
)
@example(parameters=[-30.0] * 11, value=1e4)
@example(parameters=[30.0] * 11, value=-1e4)
def test_round_trip(dtype, parameters, value):
    p = torch.tensor(parameters, dtype=dtype)
    t = SinusoidalTransform(p[:3], p[3:6], p[6:9], p[9], p[10])
    y = torch.tensor(value, dtype=dtype)
    with record_inversions() as inversions:
        x = t.inv(y)
    assert residual(t, x, y) <= FLOAT[dtype]
    assert inversions[0].iterations <= 90
    # There and back again: the error of x is that of y over the slope.
    y, ladj = t.call_and_ladj(x)
    error = (t.inv(y) - x).abs() * ladj.exp()
    assert error <= 2 * FLOAT[dtype] * (1 + x.abs() + y.abs())


@pytest.mark.parametrize("dtype", FLOAT)
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e4, 1e6])
def test_round_trip_in_bulk(dtype, magnitude):
    vectors = [torch.rand(20_000, 3, dtype=dtype) * 60 - 30 for _ in range(3)]
    scalars = [torch.rand(20_000, dtype=dtype) * 60 - 30 for _ in range(2)]
    t = SinusoidalTransform(*vectors, *scalars)
    y = (torch.rand(20_000, dtype=dtype) * 2 - 1) * magnitude
    assert residual(t, t.inv(y), y) <= FLOAT[dtype]


@pytest.mark.parametrize("dtype", FLOAT)
@pytest.mark.parametrize("frequency", [-200.0, -50.0, 200.0])
@pytest.mark.parametrize("weight", [-60.0, 60.0])
def test_limits_of_frequency_and_residual(dtype, frequency, weight):
    t = SinusoidalTransform(
        torch.tensor([frequency, 0.0], dtype=dtype),
        torch.tensor([0.3, -0.2], dtype=dtype),
        torch.tensor([0.0, -1.0], dtype=dtype),
        torch.tensor(weight, dtype=dtype),
        torch.tensor(0.5, dtype=dtype),
    )
    y = torch.tensor([-1e6, -3.0, 0.0, 0.5, 2.0, 1e6], dtype=dtype)
    x = t.inv(y)
    _, ladj = t.call_and_ladj(x)
    assert residual(t, x, y) <= FLOAT[dtype]
    assert ladj.isfinite().all()
    assert (ladj.exp() >= 0.99e-3).all()
    assert (ladj.exp() <= 2).all()


@pytest.mark.parametrize("frequency", [-150.0, -100.0, -40.0, -20.0, -8.0, -2.0])
def test_gradients_keep_their_digits_at_small_frequencies(frequency):
    def gradient(dtype):
        p = [torch.tensor([v], dtype=dtype) for v in (frequency, 0.7, 0.0)]
        p += [torch.tensor(v, dtype=dtype) for v in (1.0, 0.0)]
        p[0].requires_grad_()
        x = torch.tensor(1.3, dtype=dtype)
        y, ladj = SinusoidalTransform(*p).call_and_ladj(x)
        return torch.stack(torch.autograd.grad(y + ladj, p[0]))

    single, double = gradient(torch.float32), gradient(torch.float64)
    assert torch.allclose(single.double(), double, rtol=1e-4, atol=1e-37)


def test_log_determinant():
    t = SinusoidalTransform(*draw(4))
    x = 3 * torch.randn(4, dtype=torch.float64)
    y, ladj = t.call_and_ladj(x)
    assert torch.allclose(ladj.sum(), slogdet(t, x, 1), atol=1e-10)
    assert torch.allclose(t.log_abs_det_jacobian(x, y), ladj)
    _, back = t.inv.call_and_ladj(y)
    assert torch.allclose(back.sum(), slogdet(t.inv, y, 1), atol=1e-10)


def test_a_view_with_the_negative_bit():
    t = SinusoidalTransform(*draw(2))
    x = torch.randn(5, 2, dtype=torch.complex128).conj().imag
    assert x.is_neg()
    assert torch.equal(t(x), t(x.clone()))


def test_the_shapes_of_values_and_parameters_broadcast():
    t = SinusoidalTransform(*(p.unsqueeze(0) for p in draw(2)))
    x = torch.randn(2).double()
    assert t(x).shape == t.inv(x).shape == (1, 2)


def test_contract():
    p = draw(2)
    t = SinusoidalTransform(*p)
    assert t.domain is constraints.real
    assert t.codomain is constraints.real
    assert t.bijective
    assert t.sign == 1
    assert t.event_dim == 0
    assert t.inv.inv is t
    assert t.inv == t.inv
    assert t.forward_shape((5, 1)) == t.inverse_shape((5, 1)) == (5, 1)  # as zuko's do
    assert repr(t) == "SinusoidalTransform(components: 3, batch_shape: (2,))"
    assert t.with_cache(0) is t
    cached = t.with_cache()
    x = torch.randn(2, dtype=torch.float64)
    y = cached(x)
    assert cached.inv(y) is x
    assert cached(x) is y  # which the transform has returned by now
    assert torch.equal(pickle.loads(pickle.dumps(t))(x), t(x))


@pytest.mark.parametrize(
    ("x", "frequency", "residual", "shift", "expected"),
    [
        ((), (4,), (), (), ()),
        ((5, 3), (4,), (), (), (5, 3)),
        ((5, 1), (3, 4), (3,), (), (5, 3)),
        ((1,), (3, 4), (2, 3), (7, 1, 1), (7, 2, 3)),
        ((0, 3), (3, 4), (3,), (3,), (0, 3)),
        ((2, 3, 4, 4), (3, 4, 4, 1), (3, 1, 1), (), (2, 3, 4, 4)),
    ],
)
def test_broadcasting(x, frequency, residual, shift, expected):
    p = [torch.randn(frequency), torch.randn(frequency), torch.randn(frequency[-1:])]
    p += [torch.randn(residual), torch.randn(shift)]
    t = SinusoidalTransform(*(q.requires_grad_() for q in p))
    x = torch.randn(x, requires_grad=True)
    y, ladj = t.call_and_ladj(x)
    assert y.shape == ladj.shape == expected
    (y.sum() + ladj.sum()).backward()
    back = t.inv(y.detach())
    assert back.shape == expected
    assert torch.allclose(back, x.expand(expected), atol=1e-3)
    back.sum().backward()


def test_algorithm_1_agrees_and_warns_when_it_stops_early():
    p = draw(100)
    y = torch.randn(100, dtype=torch.float64)
    patient = Solver("banach", max_iter=20_000, tolerance=1e-12)
    newton, banach = (SinusoidalTransform(*p, solver=s).inv(y) for s in (Solver(), patient))
    assert residual(SinusoidalTransform(*p), banach, y) <= 1e-12
    # Equal residuals; the roots differ by those over the slope.
    assert torch.allclose(newton, banach, atol=1e-8)

    with pytest.warns(InversionWarning, match="after 3 iterations with a relative error of"):
        SinusoidalTransform(*p, solver=Solver("banach", max_iter=3)).inv(y)
    with pytest.warns(InversionWarning, match="while its tolerance is 1e-07"):
        SinusoidalTransform(*p, solver=Solver(max_iter=1, tolerance=1e-7)).inv(y)


@pytest.mark.parametrize("n", [100, 10_000])
def test_a_tolerance_out_of_reach_warns(n):
    p = (*torch.randn(3, n, 4), torch.randn(n), torch.randn(n))
    with pytest.warns(InversionWarning, match="its tolerance is 1e-12"):
        SinusoidalTransform(*p, solver=Solver(tolerance=1e-12)).inv(torch.randn(n))


@pytest.mark.parametrize("dtype", FLOAT)
def test_slopes_stay_positive_however_small_the_least_may_be(dtype):
    p = (*torch.randn(3, 10_000, 2).to(dtype), torch.full((10_000,), 50.0).to(dtype))
    t = SinusoidalTransform(*p, torch.zeros(10_000).to(dtype), min_slope=1e-20)
    x = torch.zeros(10_000).to(dtype)
    x -= t.phase[:, 0] / torch.nn.functional.softplus(t.frequency[:, 0])  # where they are least
    assert t.log_abs_det_jacobian(x, x).isfinite().all()
    assert t.inv(x).isfinite().all()


def test_gradients_of_an_empty_batch_of_parameters():
    p = [torch.randn(0, 4, requires_grad=True) for _ in range(3)]
    p += [torch.randn(0, requires_grad=True) for _ in range(2)]
    for f in (SinusoidalTransform(*p), SinusoidalTransform(*p).inv):
        f(torch.zeros(0)).sum().backward()
    assert all(q.grad.shape == q.shape for q in p)


def test_newton_takes_few_iterations_on_ordinary_parameters():
    t = SinusoidalTransform(*draw(1000, scale=0.5, dtype=torch.float32))
    with record_inversions() as inversions:
        t.inv(torch.randn(1000))
    assert inversions[0].iterations <= 8
    assert inversions[0].elements == 1000


def test_module_owns_its_parameters():
    t = Sinusoidal((2, 3), components=5)
    assert {n: tuple(p.shape) for n, p in t.named_parameters()} == {
        "frequency": (2, 3, 5),
        "phase": (2, 3, 5),
        "weight": (2, 3, 5),
        "residual": (2, 3),
        "shift": (2, 3),
    }
    x = torch.randn(4, 2, 3)
    assert torch.equal(t(x), x)  # it starts as the identity
    assert {t: 1}[t] == 1


def test_backward_keeps_two_tensors_for_each_sinusoid():
    n, d, m = 128, 63, 4
    x = torch.randn(n, d, requires_grad=True)
    t = perturb(ConditionalLDU(d, sinusoids=m)).diagonal()
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y, ladj = t.call_and_ladj(x)
    of_data = [size for size in saved.values() if size >= x.nbytes]
    assert m * x.nbytes <= sum(of_data) <= 2 * m * x.nbytes
    assert y.requires_grad
    assert ladj.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_components_lose_no_digits(dtype):
    w, one = torch.zeros(128, dtype=dtype), torch.ones((), dtype=dtype)
    t = SinusoidalTransform(w, w, w, -30 * one, 0 * one, min_slope=1e-15)
    x = torch.arange(-5, 6, dtype=dtype) * math.pi / 2 / math.log(2)  # where the slope is least
    assert t.log_abs_det_jacobian(x, x).isfinite().all()
    error = (t(t.inv(x)) - x).abs() / (1 + x.abs())
    assert error.max() < 32 * torch.finfo(dtype).eps
