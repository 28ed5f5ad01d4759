"""Compiled kernels: the same numbers, where they are used and where they cannot be."""

import pytest
import torch
from conftest import perturb
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from pyro_sinflow import (
    LDU,
    InversionWarning,
    Sinusoidal,
    SinusoidalFlow,
    SinusoidalTransform,
    Solver,
    compile_kernels,
    record_inversions,
)
from pyro_sinflow.compilation import compiling_kernels

pytestmark = pytest.mark.skipif(
    torch.__version__ < torch.torch_version.TorchVersion("2.11"), reason="older compilers fail"
)

FLOWS = {
    "scale": {"scale": True},
    "autoregressive": {"conditioner": "autoregressive"},
}


@pytest.fixture
def kernels():
    """The graphs of compiled kernels, which are compiled and run as they are."""
    torch._dynamo.reset()  # or else the graphs of other tests count towards the compiler's limit
    graphs = CompileCounterWithBackend("aot_eager")
    compile_kernels(backend=graphs)
    yield graphs
    compile_kernels(False)


def everything(flow):
    """Yields what a flow computes, with and without gradients."""
    x, c = torch.linspace(-2, 2, 15).view(5, 3).double(), torch.ones(5, 2).double()
    for function in (lambda: flow(c).log_prob(x), lambda: flow(c).transform.inv(x).sin()):
        value = function()
        yield from (value, *torch.autograd.grad(value.sum(), [*flow.parameters()]))
    with torch.no_grad():
        yield from (*flow(c).transform.call_and_ladj(x), flow(c).transform.inv(x))
    gx = torch.autograd.functional.hessian(lambda x: flow(c).log_prob(x).sum(), x)
    yield from (gx, torch.func.vmap(torch.func.grad(lambda x: flow(c[0]).log_prob(x)))(x))


@pytest.mark.parametrize("name", FLOWS)
def test_kernels_agree(name, kernels):
    flow = perturb(SinusoidalFlow(3, 2, transforms=2, **FLOWS[name]).double(), 0.1)
    compiled = [*everything(flow)]
    assert kernels.frame_count > 0
    compile_kernels(False)
    seen = kernels.frame_count
    for a, b in zip(compiled, everything(flow), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)
    assert kernels.frame_count == seen


@pytest.mark.parametrize("residual", [0.1, 20.0])
@pytest.mark.parametrize("shape", [(), (500,)])
def test_kernels_keep_the_guarantee(residual, shape, kernels):
    # Where |alpha| is nearly 1, four steps are too few for some.
    t = SinusoidalTransform(
        *torch.randn(3, *shape, 4).double() * 2,
        torch.full(shape, residual).double(),
        torch.zeros(shape).double(),
    )
    y = torch.linspace(-8, 8, 500).double()
    with record_inversions() as inversions:
        x = t.inv(y)
    assert kernels.frame_count > 0
    assert (inversions[0].iterations > 4) == (residual == 20.0)
    assert ((t(x) - y).abs() <= 32 * 2.0**-52 * (1 + x.abs() + y.abs())).all()


def test_kernels_of_other_solvers(kernels):
    t = Sinusoidal(3)
    perturb(t, 0.5)
    t.solver = Solver(max_iter=1)
    with pytest.warns(InversionWarning), torch.no_grad():
        t.inv(torch.linspace(-5, 5, 30).view(10, 3))


def test_forward_over_reverse(kernels):
    # The slopes that the backward pass finds have no tangents, and must not pass for constants.
    t = SinusoidalTransform(*torch.randn(3, 4).double(), *torch.randn(2).double())
    x = torch.randn(5).double()

    def gradient(x):
        return torch.autograd.grad(t(x).sin().sum(), x)[0]

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x))
        tangent = forward_ad.unpack_dual(gradient(dual)).tangent
    h = 1e-6
    expected = (gradient((x + h).requires_grad_()) - gradient((x - h).requires_grad_())) / (2 * h)
    assert torch.allclose(tangent, expected, atol=1e-7)


@pytest.mark.parametrize("make", [lambda: Sinusoidal(3), lambda: LDU(3)])
def test_neither_switch_nor_cache_compiles_a_users_function_anew(make):
    torch._dynamo.reset()
    t, graphs = make(), CompileCounterWithBackend("eager")
    function = torch.compile(lambda x: t(x), backend=graphs)
    x = torch.randn(5, 3)
    function(x)
    frames = graphs.frame_count
    for enabled in (True, False):
        compile_kernels(enabled)
        for shape in ((5, 3), (3,), (2, 5, 3)):
            t(torch.randn(shape).requires_grad_())  # another pair in the cache
            function(x)
    assert graphs.frame_count == frames


def test_kernels_of_no_rows(kernels):
    with torch.no_grad():
        assert LDU(3)(torch.randn(0, 3)).shape == (0, 3)


def test_compile_kernels_refuses_an_unknown_backend():
    with pytest.raises(RuntimeError, match="nonsense"):
        compile_kernels(backend="nonsense")
    assert not compiling_kernels()


def test_compile_kernels_takes_a_flag():
    with pytest.raises(TypeError, match="'enabled' should be True or False, got None"):
        compile_kernels(None)


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("name", FLOWS)
def test_kernels_of_the_default_backend(name, device):
    flow = perturb(SinusoidalFlow(3, **FLOWS[name]), 0.1).to(device)
    x = torch.randn(100, 3, device=device)
    results = []
    for enabled in (False, True):
        compile_kernels(enabled)
        try:
            grads = torch.autograd.grad(flow().log_prob(x).mean(), [*flow.parameters()])
            with torch.no_grad():
                results.append((flow().transform.inv(x), flow().log_prob(x), *grads))
        finally:
            compile_kernels(False)
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
