"""Chains of sinusoids: numpy, torch and plain operations compute the same function."""

import math

import pytest
import torch
from conftest import FLOAT
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_sinflow import InversionWarning, Solver, kernels, record_inversions
from pyro_sinflow.kernels import eager, evaluate, invert

MIN_SLOPE = 1e-3
WAYS = ["numpy", "torch", "plain"]
# The batch shapes of numbers and parameters: shared, per-element and between.
SHAPES = {
    "scalar": ((), ()),
    "shared": ((5, 3), (3,)),
    "shared by all": ((4, 5, 3), ()),
    "one row": ((5, 3), (1, 3)),
    "per-element": ((5, 3), (5, 3)),
    "per row": ((5, 3), (5, 1)),
    "more parameters": ((3,), (5, 3)),
    "two batches": ((4, 1, 3), (5, 3)),
    "middle": ((4, 5, 3), (4, 1, 3)),
}


@pytest.fixture
def use(monkeypatch):
    """Makes one of the implementations the one in use."""

    def choose(way):
        if way == "plain":
            monkeypatch.setattr(kernels, "can_fuse", lambda *_: False)
        else:
            monkeypatch.setattr(kernels, "_NUMPY", 2**62 if way == "numpy" else -1)

    return choose


def draw(x, parameters, m=2, k=3, shifts=True, dtype=torch.float64):
    numbers = 2 * torch.randn(x, dtype=dtype)
    return numbers, torch.randn(*parameters, m, 3 * k + 1 + shifts, dtype=dtype)


def literal(x, parameters):
    """Eq. 15 of the paper with f(0) = d, sinusoid after sinusoid, and the slope of Eq. 12."""
    k, ladj = parameters.shape[-1] // 3, torch.zeros(())
    for p in parameters.unbind(-2):
        a, b = torch.nn.functional.softplus(p[..., :k]), p[..., k : 2 * k]
        w = p[..., 2 * k : 3 * k].softmax(-1)
        alpha = (1 - MIN_SLOPE) * p[..., 3 * k].tanh()
        shift = p[..., 3 * k + 1] if p.shape[-1] % 3 == 2 else 0.0
        t = x.unsqueeze(-1)
        slope = 1 - alpha * (w * (2 * a * t + 2 * b).cos()).sum(-1)
        sines = ((2 * a * t + 2 * b).sin() - (2 * b).sin()) / (2 * a)
        x, ladj = x + shift - alpha * (w * sines).sum(-1), ladj + slope.log()
    return x, ladj


def results(function, x, parameters):
    """Outputs of a function, and their gradients by numbers and parameters."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, parameters)]
    outputs = function(*leaves)
    return *outputs, *torch.autograd.grad(sum(o.sin().sum() for o in outputs), leaves)


def check_equal(given, expected, tolerance):
    for a, b in zip(given, expected, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a.to(b.dtype), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", FLOAT)
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("k", [1, 4, 40])  # of 40, sums take the place of matrix products
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_are_those_of_the_formula(use, name, k, m, dtype, way):
    x, parameters = draw(*SHAPES[name], m, k, shifts=k != 4)
    expected = results(literal, x, parameters)
    use(way)
    given = results(lambda *t: evaluate(*t, MIN_SLOPE), x.to(dtype), parameters.to(dtype))
    assert all(t.dtype == dtype for t in given)
    check_equal(given, expected, 1e-10 if dtype is torch.float64 else 1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("k", [4, 40])
@pytest.mark.parametrize("name", SHAPES)
def test_inverses_and_their_gradients_are_those_of_the_formula(use, name, k, way):
    x, parameters = draw(*SHAPES[name], k=k)
    y = literal(x, parameters)[0].detach()
    use(way)
    root = invert(y, parameters, MIN_SLOPE, Solver())
    assert torch.allclose(literal(root, parameters)[0], y, atol=1e-12)
    # Two of Newton's steps from the root have its derivatives.
    leaves = [y.clone().requires_grad_(), parameters.clone().requires_grad_()]
    newton = root.detach()
    for _ in range(2):
        value, ladj = literal(newton, leaves[1])
        newton = newton - (value - leaves[0]) * (-ladj).exp()
    expected = torch.autograd.grad(newton.sin().sum(), leaves)
    check_equal(
        results(lambda *t: [invert(*t, MIN_SLOPE, Solver())], y, parameters),
        (newton, *expected),
        1e-9,
    )


@pytest.mark.parametrize("name", ["shared", "per-element", "middle"])
@pytest.mark.parametrize("way", ["numpy", "torch"])
def test_blocks_of_rows_change_nothing(use, monkeypatch, name, way):
    x, parameters = draw(*SHAPES[name])
    use(way)
    whole = results(lambda *t: evaluate(*t, MIN_SLOPE), x, parameters)
    monkeypatch.setattr(kernels, "_BLOCK", 150)  # less than all rows, and no divisor of them
    sizes, forward = [], kernels._forward
    monkeypatch.setattr(
        kernels, "_forward", lambda x, *r: (sizes.append(x.numel()), forward(x, *r))[1]
    )
    check_equal(results(lambda *t: evaluate(*t, MIN_SLOPE), x, parameters), whole, 1e-12)
    assert len(sizes) > 1
    assert max(sizes) < x.numel()


@pytest.mark.parametrize("way", WAYS)
def test_numbers_need_not_be_contiguous(use, way):
    x, parameters = draw((3, 5), (5, 3))
    use(way)
    expanded = parameters[:1].expand(5, 3, *parameters.shape[-2:])
    for p in (parameters, parameters[0], expanded):
        given = results(lambda x, p: evaluate(x.T, p, MIN_SLOPE), x, p)
        check_equal(given, results(lambda x, p: literal(x.T, p), x, p), 1e-10)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("x", "batch"), [((0, 3), (3,)), ((5, 0), (0,)), ((0,), (0,)), ((0, 3), (1, 3))]
)
def test_empty_batches(use, way, x, batch):
    use(way)
    numbers, parameters = draw(x, batch)
    for function in (
        lambda *t: evaluate(*t, MIN_SLOPE),
        lambda *t: [invert(*t, MIN_SLOPE, Solver())],
    ):
        *outputs, by_x, by_parameters = results(function, numbers, parameters)
        assert all(o.shape == numbers.shape for o in outputs)
        assert by_x.shape == numbers.shape
        assert not by_parameters.any()


EXTREMES = {  # what replaces frequencies, phases, weights and residual weights
    "saturated": (None, None, None, 100.0),
    "saturated below": (None, None, None, -100.0),
    "vanishing frequencies": (-200.0, None, None, 3.0),
    "high frequencies": (1e4, None, None, 0.5),
    "one component": (None, None, 1e4, 100.0),
}


def extreme(name, batch, dtype):
    x, p = draw((7, 3), batch, m=2, k=3, dtype=dtype)
    frequency, phase, weight, residual = EXTREMES[name]
    for value, part in ((frequency, p[..., :3]), (phase, p[..., 3:6]), (residual, p[..., 9:10])):
        if value is not None:
            part.fill_(value)
    if weight is not None:
        p[..., 6] = weight
    return x, p


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", FLOAT)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e6])
@pytest.mark.parametrize("batch", [(3,), (7, 3)])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_are_finite_and_are_inverted_to_round_off(use, name, batch, size, dtype, way):
    x, parameters = extreme(name, batch, dtype)
    use(way)
    y, ladj, *gradients = results(lambda *t: evaluate(*t, MIN_SLOPE), size * x, parameters)
    assert all(t.isfinite().all() for t in (y, ladj, *gradients))
    assert ladj.min() >= 2 * math.log(MIN_SLOPE) - 1e-2
    if name == "high frequencies" and size == 1e6:
        return  # float32 has no digits left of the phase
    with torch.no_grad():
        p = parameters[..., -1:, :]  # of one sinusoid, whose residual is what the solver bounds
        y = evaluate(size * x, p, MIN_SLOPE)[0]
        root = invert(y, p, MIN_SLOPE, Solver())  # an InversionWarning would be an error
        error = (evaluate(root, p, MIN_SLOPE)[0] - y).abs() / (1 + y.abs() + root.abs())
    assert error.max() <= 32 * torch.finfo(dtype).eps


@pytest.mark.parametrize("way", ["numpy", "torch"])
@pytest.mark.parametrize(("batch", "k"), [((3,), 3), ((3,), 40), ((7, 3), 3)])
def test_gradients_of_low_frequencies_far_from_zero(use, batch, k, way):
    """The third power of a number may overflow where its product with the frequency is small."""
    x, parameters = draw((7, 3), batch, k=k)
    x, parameters[..., :k] = 1e13 * x, -37.0
    use(way)

    def gradient(x, p):
        y, _ = evaluate(x, p.requires_grad_(), MIN_SLOPE)
        return torch.autograd.grad(y.sum(), p)[0][..., :k].double()

    expected = gradient(x, parameters)
    given = gradient(x.float(), parameters.detach().float())
    assert torch.allclose(given, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


REAL = st.floats(-1e4, 1e4)


@pytest.mark.parametrize("way", WAYS)
@given(st.lists(REAL, min_size=8, max_size=8), REAL)
def test_each_number_has_its_root(way, parameters, y):
    p = torch.tensor(parameters, dtype=torch.float64).view(1, 8)  # of two components
    target = torch.tensor([y], dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        if way == "plain":
            patch.setattr(kernels, "can_fuse", lambda *_: False)
        else:
            patch.setattr(kernels, "_NUMPY", 2**62 if way == "numpy" else -1)
        root = invert(target, p, MIN_SLOPE, Solver())
        value, _ = evaluate(root, p, MIN_SLOPE)
    assert (value - target).abs() <= 7e-15 * (1 + target.abs() + root.abs())
    _, raw = eager.arrange_all(target, p, kernels.PLAIN)
    (function,) = eager.sinusoids(eager.constrain(raw, MIN_SLOPE))
    lower, upper = function.bracket(target.view(1, 1, 1))
    assert lower <= root
    assert root <= upper


@pytest.mark.parametrize("way", WAYS)
def test_few_hard_elements_among_many_are_solved_apart(use, way):
    x, parameters = draw((5000, 2), (5000, 2), m=1)
    parameters[::1000, :, :, 9] = 100.0  # slopes fall to the smallest
    use(way)
    y = literal(x, parameters)[0]
    with record_inversions() as inversions:
        root = invert(y, parameters, MIN_SLOPE, Solver())
    alone = torch.cat(
        [invert(y[i : i + 1], parameters[i : i + 1], MIN_SLOPE, Solver()) for i in (0, 1000, 4001)]
    )
    assert torch.allclose(literal(root, parameters)[0], y, atol=1e-13)
    assert torch.allclose(root[[0, 1000, 4001]], alone, atol=1e-10)
    assert inversions[0].elements == 10_000
    assert inversions[0].iterations > 3


@pytest.mark.parametrize("way", WAYS)
def test_too_few_iterations_warn_and_are_recorded(use, way):
    x, parameters = draw((5, 3), (3,))
    use(way)
    y = literal(5 * x, parameters)[0]
    with record_inversions() as inversions, pytest.warns(InversionWarning, match="after 1 iter"):
        invert(y, parameters, MIN_SLOPE, Solver(max_iter=1))
    assert [*inversions[0]] == ["sinusoid", 1, 2 * 15]


def test_algorithm_1_has_the_same_root():
    x, parameters = draw((5, 3), (3,))
    parameters[..., 9] = 0.3 * parameters[..., 9].tanh()  # a contraction by a third
    y = literal(x, parameters)[0]
    root = invert(y, parameters, MIN_SLOPE, Solver("banach"))
    assert torch.allclose(root, invert(y, parameters, MIN_SLOPE, Solver()), atol=1e-12)


@pytest.mark.parametrize("function", [evaluate, invert])
def test_what_looks_at_more_than_values_takes_plain_operations(function):
    x, parameters = draw((5, 3), (3,))
    parameters.requires_grad_()
    options = (MIN_SLOPE,) if function is evaluate else (MIN_SLOPE, Solver(max_iter=15))

    def call(x):
        outputs = function(x, parameters, *options)
        return outputs if isinstance(outputs, torch.Tensor) else outputs[0]

    def fused(y):
        return y.grad_fn.name() in ("_EvaluateBackward", "_InvertBackward")

    expected = call(x)
    assert fused(expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        value, tangent = torch.autograd.forward_ad.unpack_dual(call(dual))
    assert not fused(value)
    assert torch.allclose(value, expected)
    other = torch.randn_like(x)
    for pre_dispatch in (False, True):
        recorded = make_fx(call, pre_dispatch=pre_dispatch)(x)
        assert torch.allclose(recorded(other), call(other))
    (slope,) = torch.autograd.grad(call(x.requires_grad_()).sum(), x)
    assert torch.allclose(tangent, slope)
    assert torch.allclose(torch.func.vmap(call)(x.detach()), expected)


def test_the_storage_of_inputs_can_still_be_resized():
    """FSDP resizes those of parameters, and users those of buffers."""
    x, parameters = (t.requires_grad_() for t in draw((5, 3), (3,)))
    y, ladj = evaluate(x, parameters, MIN_SLOPE)
    (y.sum() + ladj.sum() + invert(y, parameters, MIN_SLOPE, Solver()).sum()).backward()
    assert x.untyped_storage().resizable()
    assert parameters.untyped_storage().resizable()


def test_a_row_may_be_larger_than_a_block(monkeypatch):
    x, parameters = draw((2, 3), (3,))
    whole = evaluate(x, parameters, MIN_SLOPE)
    monkeypatch.setattr(kernels, "_BLOCK", 10)
    assert torch.allclose(torch.stack(evaluate(x, parameters, MIN_SLOPE)), torch.stack(whole))
