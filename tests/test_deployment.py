"""Checkpoints and exported programs give the flow's numbers, to the bit."""

import pickle

import pytest
import torch
from conftest import perturb
from torch import nn

from pyro_sinflow import SinusoidalFlow

CONDITIONERS = [{}, {"scale": False}, {"conditioner": "autoregressive"}]


def make(options):
    return SinusoidalFlow(3, context=2, transforms=2, **options)


@pytest.mark.parametrize("options", CONDITIONERS)
def test_pickle_of_a_distribution(options):
    flow, x, c = perturb(make(options), 0.1).eval(), torch.randn(5, 3), torch.randn(2)
    other = pickle.loads(pickle.dumps(flow(c)))
    assert torch.equal(flow(c).log_prob(x), other.log_prob(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("options", CONDITIONERS)
def test_trace_of_an_inverse(options):
    class Inverse(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = perturb(make(options), 0.1).eval()

        def forward(self, z, c):
            return self.flow(c).transform.inv(z)

    inverse, c = Inverse(), torch.randn(5, 2)
    traced = torch.jit.trace(inverse, (torch.randn(5, 3), c))
    z = torch.randn(5, 3)
    assert torch.allclose(traced(z, c), inverse(z, c), atol=1e-5)


@pytest.mark.parametrize("options", CONDITIONERS)
def test_safetensors(tmp_path, options):
    safetensors = pytest.importorskip("safetensors.torch")
    flow, other = perturb(make(options), 0.1).eval(), make(options).eval()
    safetensors.save_file(flow.state_dict(), tmp_path / "flow.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "flow.safetensors"))
    x, c = torch.randn(5, 3), torch.randn(5, 2)
    assert torch.equal(flow(c).log_prob(x), other(c).log_prob(x))
    draws = []
    for f in (flow, other):
        torch.manual_seed(1)
        draws.append(f(c).sample((4,)))
    assert torch.equal(*draws)


@pytest.mark.skipif(
    torch.__version__ < torch.torch_version.TorchVersion("2.13"),
    reason="older compilers break the graph",
)
@pytest.mark.parametrize("options", CONDITIONERS)
def test_export(monkeypatch, options):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    flow = perturb(make(options), 0.1).eval()

    class LogDensity(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self, x, c):
            return self.flow(c).log_prob(x)

    rows = torch.export.Dim("rows")
    with torch._dynamo.config.patch(rewrite_assert_with_torch_assert=False):
        program = torch.export.export(
            LogDensity(),
            (torch.randn(5, 3), torch.randn(5, 2)),
            dynamic_shapes=({0: rows}, {0: rows}),
            strict=True,
        ).module()
    for n in (5, 9):
        x, c = torch.randn(n, 3), torch.randn(n, 2)
        assert torch.allclose(program(x, c), flow(c).log_prob(x), atol=1e-5)
