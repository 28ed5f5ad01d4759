"""Linear maps and the compression of tails, each by itself."""

import copy
import math
import pickle

import hypothesis.strategies as st
import pytest
import torch
from conftest import FLOAT, perturb, residual, slogdet
from hypothesis import example, given
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import jacobian
from torch.distributions import constraints
from zuko.lazy import UnconditionalTransform

from pyro_sinflow import InversionWarning
from pyro_sinflow.element_wise import Asinh
from pyro_sinflow.linear import Linear

BATCHES = [(), (5,), (2, 3)]
ENDS = [-200.0, 0.0, 200.0]  # of the unconstrained b
TREE = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]])
MAKE = {
    "Linear": lambda dtype=torch.float64: Linear(torch.randn(3, 3, dtype=dtype)),
    "Asinh": lambda dtype=torch.float64: Asinh(torch.randn(3, dtype=dtype)),
}
LAZY = {
    "Linear": lambda: UnconditionalTransform(Linear, torch.zeros(3, 3)),
    "Asinh": lambda: UnconditionalTransform(Asinh, torch.zeros(3)),
}


def total(t, ladj):
    """The log-determinant of events of three features."""
    return ladj if t.event_dim == 1 else ladj.sum(dim=-1)


def both(name):
    """Both directions of a transform as functions of an input and the parameters."""
    cls = {"Linear": Linear, "Asinh": Asinh}[name]
    return {
        "forward": lambda x, p: cls(p).call_and_ladj(x),
        "inverse": lambda x, p: cls(p).inv.call_and_ladj(x),
    }


def parameters(name):
    return torch.randn((3, 3) if name == "Linear" else (3,), dtype=torch.float64)


@pytest.mark.parametrize("dtype", FLOAT)
@pytest.mark.parametrize("features", [1, 2, 7])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_linear_map_starts_as_the_identity(features, batch, dtype):
    t = Linear(torch.zeros(features, features, dtype=dtype))
    x = torch.randn(*batch, features, dtype=dtype)
    y, ladj = t.call_and_ladj(x)
    assert torch.equal(y, x)
    assert torch.equal(t.inv(x), x)
    assert torch.equal(ladj, torch.zeros(batch, dtype=dtype))


@pytest.mark.parametrize("features", [32, 64, 65, 300, 1000])
def test_a_step_of_all_parameters_moves_a_large_event_no_further(features):
    # The first step of Adam, with a learning rate of 0.01.
    x = torch.ones(features)
    moved = (Linear(torch.full((features, features), 0.01))(x) - x).abs().max()
    assert 0.3 < moved < 2.0


def test_a_linear_map_is_the_product_of_its_factors():
    matrix, x = torch.randn(4, 4).double(), torch.randn(5, 4).double()
    diagonal = matrix.diagonal() / (1 + matrix.diagonal().abs() / math.log(1e3))
    lower = matrix.tril(-1) + torch.eye(4)
    upper = matrix.triu(1) + diagonal.exp().diag()
    t = Linear(matrix)
    assert torch.allclose(t(x), x @ (lower @ upper).T, atol=1e-12)
    _, ladj = t.call_and_ladj(x)
    assert torch.allclose(ladj, (lower @ upper).slogdet().logabsdet.expand(5), atol=1e-12)


@pytest.mark.parametrize("entry", [-1e30, -1e3, 1e3, 1e30])
def test_the_diagonal_of_u_is_bounded(entry):
    t = Linear(entry * torch.eye(3))
    scale = t(torch.ones(3))
    assert (scale >= 1e-3 * 0.999).all()
    assert (scale <= 1e3 * 1.001).all()
    assert torch.allclose(t.inv(scale), torch.ones(3))


def test_tails_start_with_a_b_of_three_tenths():
    x = torch.linspace(-50, 50, 21).double()[:, None].expand(21, 3)
    t = Asinh(torch.zeros(3).double())
    b = 1e-3 + (1 - 1e-3) * 0.3
    assert torch.allclose(t(x), (b * x).asinh() / b, atol=1e-12)


@pytest.mark.parametrize(("parameter", "b"), [(-200.0, 1e-3), (200.0, 1.0)])
def test_b_lies_between_its_bounds(parameter, b):
    t, x = Asinh(torch.tensor(parameter).double()), torch.linspace(-9, 9, 19).double()
    assert torch.allclose(t(x), (b * x).asinh() / b, atol=1e-12)
    assert torch.allclose(t.inv(x), (b * x).sinh() / b, rtol=1e-12)


@pytest.mark.parametrize("dtype", FLOAT)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MAKE)
def test_log_determinants(name, batch, dtype):
    t, x = MAKE[name](dtype), torch.randn(*batch, 3, dtype=dtype)
    y, ladj = t.call_and_ladj(x)
    back, inverse = t.inv.call_and_ladj(y)
    atol = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    assert total(t, ladj).shape == batch
    assert torch.allclose(total(t, ladj), slogdet(t, x, 1), atol=atol)
    assert torch.allclose(total(t, t.log_abs_det_jacobian(x, y)), slogdet(t, x, 1), atol=atol)
    assert torch.allclose(total(t, inverse), slogdet(t.inv, y, 1), atol=100 * atol)
    assert y.shape == back.shape == x.shape
    assert ladj.dtype == y.dtype == dtype


def check_round_trip(t, y):
    """Solving with each factor is exact for factors that differ by a few units of round-off."""
    x = t.inv(y)
    lower, upper, _ = t._factors()
    # Of the product of the magnitudes of L, U and x.
    size = x.abs() @ upper.abs().mT
    size = size + size @ lower.abs().mT + y.abs()
    assert ((t(x) - y).abs() <= 8 * len(lower) * torch.finfo(y.dtype).eps * size).all()


@pytest.mark.parametrize("dtype", FLOAT)
@given(
    entries=st.lists(st.floats(-1e3, 1e3, width=32), min_size=9, max_size=9),
    y=st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3),
)
@example(entries=[1e3] * 9, y=[1e4, -1e4, 1e-6])
@example(entries=[-1e3] * 9, y=[0.0, 0.0, 1e4])
@example(entries=[1e3, -1e3] * 4 + [1e3], y=[1.0, -1.0, 0.0])
def test_round_trip_of_a_linear_map(dtype, entries, y):
    t, y = Linear(torch.tensor(entries, dtype=dtype).view(3, 3)), torch.tensor(y, dtype=dtype)
    check_round_trip(t, y)
    check_round_trip(t, torch.stack((y, -y, y / 7)))


@pytest.mark.parametrize("dtype", FLOAT)
@given(rate=st.floats(-200, 200, width=32), y=st.floats(-80, 80, width=32))
@example(rate=-200.0, y=80.0)
@example(rate=0.0, y=-80.0)
@example(rate=200.0, y=80.0)
@example(rate=200.0, y=1e-6)
def test_round_trip_of_tails(dtype, rate, y):
    t, y = Asinh(torch.tensor(rate, dtype=dtype)), torch.tensor(y, dtype=dtype)
    assert residual(t, t.inv(y), y) <= FLOAT[dtype]


@pytest.mark.parametrize("dtype", FLOAT)
@pytest.mark.parametrize("rate", ENDS)
@pytest.mark.parametrize("value", [0.0, 1e-6, -1e-6, 1.0, 1e4, -1e4, 1e19, -1e19, 1e30])
def test_tails_and_their_slopes_have_all_digits(value, rate, dtype):
    # Several values, for the code of vectors, and one, for that of a single number.
    for shape in ((), (17,)):
        x = torch.full(shape, value, dtype=dtype)
        t = Asinh(torch.tensor(rate, dtype=dtype))
        y, ladj = t.call_and_ladj(x)
        wide = x.double()
        b = 1e-3 + (1 - 1e-3) * {-200.0: 0.0, 0.0: 0.3, 200.0: 1.0}[rate]
        assert torch.allclose(y.double(), (b * wide).asinh() / b, rtol=FLOAT[dtype])
        expected = -(1 + (b * wide).square()).log() / 2
        assert ladj.isfinite().all()
        eps = torch.finfo(dtype).eps  # of the slopes near one
        assert torch.allclose(ladj.double(), expected, rtol=FLOAT[dtype], atol=eps)
        x.requires_grad_()
        y, ladj = t.call_and_ladj(x)
        for gradient in torch.autograd.grad((y.sum(), ladj.sum()), x):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("name", MAKE)
def test_there_and_back_again(name):
    t, x = MAKE[name](), 100 * torch.randn(1000, 3).double()
    assert torch.allclose(t.inv(t(x)), x, rtol=1e-9)


def test_a_single_vector_is_inverted_as_a_batch_is():
    t, y = MAKE["Linear"](), torch.randn(2, 3, 3).double()
    assert t.inv(y[0, 0]).shape == (3,)
    for i in range(2):
        for j in range(3):
            assert torch.allclose(t.inv(y[i, j]), t.inv(y)[i, j], rtol=1e-12)
    assert t.inv(torch.zeros(0, 3).double()).shape == (0, 3)


# Derivatives


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MAKE)
def test_gradients(name, batch, direction):
    inputs = torch.randn(*batch, 3).double().requires_grad_(), parameters(name).requires_grad_()
    f = both(name)[direction]
    assert gradcheck(f, inputs, check_forward_ad=True)
    assert gradgradcheck(f, inputs)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", MAKE)
def test_torch_func(name, direction):
    t = MAKE[name]()
    t = t if direction == "forward" else t.inv
    x, v = torch.randn(4, 3).double(), torch.randn(3).double()
    expected = torch.stack([jacobian(t, row) for row in x])
    assert torch.allclose(torch.func.vmap(t)(x), t(x), atol=1e-12)
    for mode in (torch.func.jacrev, torch.func.jacfwd):
        assert torch.allclose(torch.func.vmap(mode(t))(x), expected, atol=1e-10)
        for outer in (torch.func.jacrev, torch.func.jacfwd):
            second = outer(mode(t))(x[0])
            assert torch.allclose(second, jacobian(lambda x: jacobian(t, x, True), x[0]))
    value, tangent = torch.func.jvp(t, (x[0],), (v,))
    assert torch.allclose(value, t(x[0]), atol=1e-12)
    assert torch.allclose(tangent, expected[0] @ v, atol=1e-10)
    ladj = torch.func.vmap(lambda row: t.call_and_ladj(row)[1].sum())(x)
    assert torch.allclose(ladj, expected.slogdet().logabsdet, atol=1e-10)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", MAKE)
def test_vectorized_jacobian(name, direction, strategy):
    t, x = MAKE[name](), torch.randn(3).double()
    f = t if direction == "forward" else t.inv
    assert torch.allclose(jacobian(f, x, vectorize=True, strategy=strategy), jacobian(f, x))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", MAKE)
def test_vmap_over_parameters(name, direction):
    f, x = both(name)[direction], torch.randn(3).double()
    p = torch.stack([parameters(name) for _ in range(4)])
    one_by_one = zip(*(f(x, q) for q in p), strict=True)
    for a, b in zip(torch.func.vmap(f, (None, 0))(x, p), one_by_one, strict=True):
        assert torch.allclose(a, torch.stack(b), atol=1e-12)


# As other transforms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAZY)
def test_weights_of_half_precision_are_lifted(name, dtype):
    lazy = perturb(LAZY[name]()).to(dtype)
    t, x = lazy(), torch.randn(5, 3, dtype=dtype)
    y, ladj = t.call_and_ladj(x)
    back = t.inv(y)
    assert y.dtype == ladj.dtype == back.dtype == torch.float32
    assert torch.allclose(back, x.float(), atol=1e-4)
    assert torch.equal(y, copy.deepcopy(lazy).float()()(x.float()))
    (back.sum() + ladj.sum()).backward()
    assert [p.grad.dtype for p in lazy.parameters()] == [dtype]


@pytest.mark.parametrize("name", LAZY)
def test_autocast_does_not_change_them(name):
    t, x = perturb(LAZY[name]())(), torch.randn(5, 3)
    y, ladj = t.call_and_ladj(x)
    with torch.autocast("cpu", torch.bfloat16):
        results = (*t.call_and_ladj(x), t.inv(y))
    for a, b in zip(results, (y, ladj, t.inv(y)), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_another_dtype_is_an_error_that_says_so(direction):
    t = Linear(torch.zeros(3, 3))
    f = t if direction == "forward" else t.inv
    with pytest.raises(TypeError, match=r"'[xy]' should have the .*float32, got torch\.float64"):
        f(torch.randn(3).double())
    for shape in ((), (2,), (3, 1)):
        with pytest.raises(ValueError, match=r"'[xy]' should have shape \(\*, 3\)"):
            f(torch.zeros(shape))


@pytest.mark.parametrize("name", MAKE)
def test_contract(name):
    t, x = MAKE[name](), torch.randn(5, 3).double()
    event_dim = 1 if name == "Linear" else 0
    assert t.event_dim == t.domain.event_dim == t.codomain.event_dim == event_dim
    real = t.domain.base_constraint if event_dim else t.domain
    assert real is constraints.real
    assert t.bijective
    assert t.sign == 1
    assert t.inv.inv is t
    assert t.forward_shape((5, 3)) == t.inverse_shape((5, 3)) == (5, 3)
    assert t.inv == t.inv
    x = torch.randn(5, 3).double()
    for again in (pickle.loads(pickle.dumps(t)), copy.deepcopy(t)):
        assert torch.equal(again(x), t(x))
    cached = t.with_cache()
    y = cached(x)
    assert cached.inv(y) is x
    assert cached(x) is y


def test_representations():
    assert repr(Linear(torch.zeros(3, 3))) == "Linear(features: 3)"
    assert repr(Asinh(torch.zeros(2, 3))) == "Asinh(batch_shape: (2, 3))"


def test_an_inverse_that_overflows_is_announced():
    t = Asinh(torch.full((2,), 200.0))  # b = 1
    y = torch.tensor([[1.0, 80.0], [-100.0, 100.0], [math.nan, 1.0]])
    with pytest.warns(InversionWarning, match=r"range of torch\.float32 in 2 of 6 values"):
        x = t._inverse(y)
    assert torch.equal(x[1], torch.tensor([-math.inf, math.inf]))
    assert torch.allclose(t(x[0]), y[0])
    assert t._inverse(y.double()[1]).isfinite().all()


@pytest.mark.parametrize("name", LAZY)
def test_transforms_that_are_kept_follow_their_parameters(name):
    lazy, x = perturb(LAZY[name]()), torch.randn(5, 3)
    t = lazy()
    (parameter,) = lazy.parameters()
    for _ in range(2):  # each use has a graph of its own
        t.call_and_ladj(x)[1].sum().backward()
        t.inv(x).sum().backward()
    before, cached = t(x), t.with_cache()
    y = cached(x)
    perturb(lazy)
    assert torch.equal(t(x), lazy()(x))
    assert not torch.equal(t(x), before)
    assert not torch.equal(cached.inv(y), x)  # the pair is out of date
    assert torch.equal(cached.inv(y), lazy().inv(y))
    assert parameter.grad is not None


@pytest.mark.parametrize("name", LAZY)
def test_lazy_transforms(name):
    lazy, x = perturb(LAZY[name]()), torch.randn(5, 3)
    assert torch.equal(lazy()(x), lazy(torch.randn(5, 2))(x))  # without regard for the context
    assert torch.equal(lazy.inv()(x), lazy().inv(x))
    again = pickle.loads(pickle.dumps(lazy))
    for copied in (again, copy.deepcopy(lazy)):
        assert torch.equal(copied()(x), lazy()(x))
    lazy()(x).sin().sum().backward()
    assert all(p.grad is not None for p in lazy.parameters())
    assert LAZY[name]().double()()(x.double()).dtype == torch.float64
