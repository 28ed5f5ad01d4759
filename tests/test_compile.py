"""torch.compile: one graph, the same numbers, and no new graph for each batch size."""

import pytest
import torch
from conftest import perturb
from torch._dynamo.testing import CompileCounterWithBackend

from pyro_sinflow import LDU, SinusoidalFlow, Solver

pytestmark = pytest.mark.skipif(
    torch.__version__ < torch.torch_version.TorchVersion("2.13"),
    reason="older compilers break the graph",
)

FLOWS = {
    "independent": {"conditioner": "independent", "scale": False},
    "scale": {"conditioner": "independent", "residual": True, "hidden_features": (16, 16)},
    "autoregressive": {},
}


@pytest.fixture(autouse=True)
def _settings():
    torch._dynamo.reset()
    # zuko asserts that a tuple of transforms is not empty, which the compiler takes for a tensor.
    with torch._dynamo.config.patch(rewrite_assert_with_torch_assert=False):
        yield


def flow_and_log_prob(name):
    flow = perturb(SinusoidalFlow(3, 2, transforms=2, **FLOWS[name]).double(), 0.1)
    return flow, lambda x, c: flow(c).log_prob(x)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_training_step(name, backend):
    flow, log_prob = flow_and_log_prob(name)
    x, c = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    results = []
    for function in (log_prob, torch.compile(log_prob, fullgraph=True, backend=backend)):
        value = function(x, c)
        results.append((value, *torch.autograd.grad(value.sum(), [*flow.parameters()])))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_batch_sizes_share_a_graph():
    _, log_prob = flow_and_log_prob("independent")
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(log_prob, fullgraph=True, dynamic=True, backend=graphs)
    for n in (5, 7, 64, 100):
        x, c = torch.randn(n, 3).double(), torch.randn(n, 2).double()
        assert torch.allclose(compiled(x, c), log_prob(x, c))
    assert graphs.frame_count == 1


def test_inverse_with_a_fixed_number_of_iterations():
    t = perturb(LDU(3, sinusoids=2, hidden_features=(8,), solver=Solver(max_iter=6)).double(), 0.1)
    y = torch.randn(5, 3).double()
    function = torch.compile(lambda y: t.block().inv(y), fullgraph=True, backend="aot_eager")
    results = []
    for inverse in (t.inv, function):
        x = inverse(y)
        results.append((x, *torch.autograd.grad(x.sin().sum(), [*t.parameters()])))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-10)
