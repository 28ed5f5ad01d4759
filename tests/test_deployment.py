"""Checkpoints and exported programs give the flow's numbers, to the bit."""

import io
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import perturb
from pyro.distributions.transforms import iterated
from pyro.infer.autoguide import AutoNormalizingFlow
from torch import nn

from pyro_sinflow import SinusoidalFlow, Solver, ldu, sinusoidal

BLOCKS = {"conditioner": "independent"}
CONDITIONERS = [BLOCKS, {**BLOCKS, "scale": False}, {}]


def make(options):
    return SinusoidalFlow(3, context=2, **{"transforms": 2, **options})


@pytest.mark.parametrize("options", CONDITIONERS)
def test_pickle_of_a_distribution(options):
    flow, x, c = perturb(make(options), 0.1).eval(), torch.randn(5, 3), torch.randn(2)
    other = pickle.loads(pickle.dumps(flow(c)))
    assert torch.equal(flow(c).log_prob(x), other.log_prob(x))


def saved(traced):
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("what", ["log_prob", "inverse", "sample"])
@pytest.mark.parametrize("options", CONDITIONERS[::2])
def test_a_traced_flow_gives_the_same_numbers_after_it_is_saved(options, what):
    class Use(nn.Module):
        def __init__(self):
            super().__init__()
            few = {"transforms": 1, "sinusoids": 2, "solver": Solver(max_iter=8)}
            self.flow = perturb(make({**options, **few}), 0.1)  # a trace records all iterations

        def forward(self, x, c):
            d = self.flow(c)
            if what == "inverse":
                return d.transform.inv(x)
            return d.log_prob(x) if what == "log_prob" else d.sample((7,))

    use, results = Use(), []
    traced = torch.jit.trace(use, (torch.randn(5, 3), torch.randn(5, 2)), check_trace=False)
    x, c = torch.randn(9, 3), torch.randn(9, 2)
    for f in (use, saved(traced)):
        torch.manual_seed(1)
        results.append(f(x, c))
    assert torch.allclose(*results, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("transform", [ldu, sinusoidal, partial(iterated, 2, ldu)])
def test_a_traced_guide_gives_the_same_samples_after_it_is_saved(transform):
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))

    guide = AutoNormalizingFlow(model, transform)
    guide()
    perturb(guide)
    traced = torch.jit.trace_module(guide, {"call": ()}, check_trace=False)
    results = []
    for f in (guide.call, saved(traced).call):
        pyro.set_rng_seed(1)
        results.append(f())
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


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
