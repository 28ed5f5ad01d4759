"""How fast, as ratios within one run; `make bench` runs this and prints the table.

The first benchmark of each group is the unit of the others. It runs by turns with each of them,
because the machine changes its pace.
"""

import subprocess
import sys
import time
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from pyro.distributions.transforms import block_autoregressive, iterated, spline_autoregressive
from pyro.infer.autoguide import AutoIAFNormal, AutoNormalizingFlow
from torch import nn

from pyro_sinflow import SinusoidalFlow, Solver, fast_inverse, ldu
from pyro_sinflow.element_wise import SinusoidalChain
from pyro_sinflow.kernels import evaluate

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from data import Data, patches  # noqa: E402
from training import Budget, fit  # noqa: E402

D, TRANSFORMS, SINUSOIDS, K = 63, 12, 4, 4
NETWORK = {"hidden_features": (256, 256)}
BLOCKS = {"conditioner": "independent", "linear": False, "tails": False, **NETWORK}
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def naive_chain(x, parameters, min_slope=1e-3):
    """Eq. 13 and 15 as they are written, one autograd node for each operation."""
    k = parameters.shape[-1] // 3
    frequency, phase, weight, residual, shift = parameters.split((k, k, k, 1, 1), dim=-1)
    a, w = nn.functional.softplus(frequency), weight.softmax(dim=-1)
    alpha = (1 - min_slope) * residual.tanh()
    total = 0.0
    for m in range(parameters.shape[-2]):
        t = a[..., m, :] * x.unsqueeze(-1)
        wave = (t + 2 * phase[..., m, :]).cos() * t.sin() / a[..., m, :]
        bend = (2 * t + 2 * phase[..., m, :]).cos()
        x = x + shift[..., m, 0] - alpha[..., m, 0] * (w[..., m, :] * wave).sum(dim=-1)
        total = total + (1 - alpha[..., m, 0] * (w[..., m, :] * bend).sum(dim=-1)).log()
    return x, total


def seconds(function):
    """Returns the time that a call takes, on the GPU as well."""
    start = time.perf_counter()
    function()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(benchmark, group, function, rounds=15, unit=None):
    """Measures a function, and its ratio to the unit of its group, where that can be had."""
    benchmark.group = group
    alone = unit in (None, function)
    for _ in range(3):
        function()
    if not alone:
        times, units = [], []
        for _ in range(rounds):
            times.append(seconds(function))
            units.append(seconds(unit))
        benchmark.extra_info["ratio"] = min(times) / min(units)
    benchmark.pedantic(function, rounds=rounds if alone else 1)


def training_step(parameters, loss):
    def step():
        for p in parameters:
            p.grad = None
        loss().backward()

    return step


@pytest.fixture(scope="module")
def paper_flow():
    torch.manual_seed(0)
    flow = SinusoidalFlow(
        D,
        transforms=TRANSFORMS,
        sinusoids=SINUSOIDS,
        components=K,
        scale=False,
        **BLOCKS,
    )
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return flow.to(DEVICE), torch.randn(128, D).to(DEVICE)


class TestTrainingStep:
    group = "Training step, D = 63, 12 LDU blocks, batch 128"

    @pytest.fixture(scope="class")
    def floor(self, paper_flow):
        widths = [D, *NETWORK["hidden_features"]]
        mlps = []
        for _ in range(2 * TRANSFORMS):
            layers = [(nn.Linear(i, o), nn.ReLU()) for i, o in pairwise(widths)]
            mlps.append(nn.Sequential(*chain(*layers), nn.Linear(widths[-1], D)).to(DEVICE))

        def loss():
            h = paper_flow[1]
            for mlp in mlps:
                h = h + mlp(h)
            return h.square().mean()

        return training_step([p for mlp in mlps for p in mlp.parameters()], loss)

    def test_floor_24_plain_mlps(self, benchmark, floor):
        measure(benchmark, self.group, floor, unit=floor)

    def test_eager(self, benchmark, paper_flow, floor):
        flow, x = paper_flow
        step = training_step([*flow.parameters()], lambda: -flow().log_prob(x).mean())
        measure(benchmark, self.group, step, unit=floor)

    def test_compiled(self, benchmark, paper_flow, floor):
        flow, x = paper_flow
        with torch._dynamo.config.patch(rewrite_assert_with_torch_assert=False):
            loss = torch.compile(lambda: -flow().log_prob(x).mean(), fullgraph=True)
            step = training_step([*flow.parameters()], loss)
            step()
            measure(benchmark, self.group, step, unit=floor)

    def test_naive_sinusoids(self, benchmark, paper_flow, floor, monkeypatch):
        flow, x = paper_flow
        monkeypatch.setattr(
            SinusoidalChain, "_call_and_ladj", lambda self, x: naive_chain(x, self.packed)
        )
        step = training_step([*flow.parameters()], lambda: -flow().log_prob(x).mean())
        measure(benchmark, self.group, step, unit=floor)


@pytest.mark.parametrize("n", [128, 4096])
@pytest.mark.parametrize("which", ["naive", "ours"])
def test_four_sinusoids(benchmark, which, n):
    parameters = torch.randn(D, SINUSOIDS, 3 * K + 2, device=DEVICE).mul(0.5).requires_grad_()
    x = torch.randn(n, D, device=DEVICE, requires_grad=True)

    def step(function):
        return training_step([x, parameters], lambda: sum(t.sum() for t in function()))

    naive = step(lambda: naive_chain(x, parameters))
    ours = step(lambda: evaluate(x, parameters, 1e-3))
    measure(
        benchmark,
        f"A chain of four sinusoids at ({n}, 63), forward and backward",
        naive if which == "naive" else ours,
        rounds=50 if n == 128 else 10,
        unit=naive,
    )


FLOWS = {
    "shift": lambda: SinusoidalFlow(D, transforms=TRANSFORMS, scale=False, **BLOCKS),
    "scale": lambda: SinusoidalFlow(D, transforms=TRANSFORMS, **BLOCKS),
    "default": lambda: SinusoidalFlow(D, transforms=5, **NETWORK),
    "MAF": lambda: zuko.flows.MAF(D, transforms=10, **NETWORK),
    "NSF": lambda: zuko.flows.NSF(D, transforms=5, **NETWORK),
}


@pytest.fixture(scope="module")
def data():
    return Data(*(part.to(DEVICE) for part in patches()))


@pytest.fixture(scope="module")
def trained(data):
    """Returns a trained flow by its name; what has been trained once is read from out."""
    folder = ROOT / "out" / f"bench_{DEVICE}"
    folder.mkdir(parents=True, exist_ok=True)

    def get(name):
        torch.manual_seed(0)
        flow, budget = FLOWS[name]().to(DEVICE), Budget(steps=300, lr=1e-3)
        return fit(name, flow, data, budget, folder / f"{name}.pt")

    return get


def invert(flow, z):
    with torch.no_grad():
        return flow().transform.inv(z)


def log_density(flow, data):
    return torch.no_grad()(lambda: flow().log_prob(data.test[:1000]))


def algorithm_1(flow, y):
    """The paper's inverse, of its formulas as written: a fixed point for each of the maps."""

    def solve(function, y):
        x = y
        for _ in range(100):
            x, last = y - (function(x) - x), x
            if torch.allclose(x, last):
                break
        return x

    *blocks, affine = flow().transform.transforms
    with torch.no_grad():
        y = affine.inv(y)
        for block in reversed(blocks):
            y = solve(block.lower, y)
            for one in reversed(block.diagonal.packed.split(1, dim=-2)):
                y = solve(lambda x, one=one: naive_chain(x, one)[0], y)
            y = solve(block.upper, y)
        return y


WAYS = {
    "log-density": None,
    "samples": invert,
    "samples by Algorithm 1": algorithm_1,
    "samples by Solver('banach')": invert,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["shift", "scale", "default"])
@pytest.mark.filterwarnings("ignore::pyro_sinflow.InversionWarning")
def test_sampling(benchmark, trained, data, name, way):
    if way in [*WAYS][2:] and name != "shift":
        pytest.skip("the paper's algorithm, for the paper's block")
    flow, z = trained(name), torch.randn(1000, D, device=DEVICE)
    if way == "samples by Solver('banach')":
        for module in flow.modules():
            if hasattr(module, "solver"):
                module.solver = Solver("banach", max_iter=100)
    function = unit = log_density(trained(name), data)
    if way != "log-density":
        function = partial(WAYS[way], flow, z)
        report_residual(benchmark, flow, z, WAYS[way])
    rounds = 3 if "Algorithm" in way else 8
    measure(benchmark, f"1,000 {name} samples", function, rounds, unit)


@pytest.mark.parametrize("way", ["log-density", "samples by fast_inverse", "samples by zuko"])
@pytest.mark.parametrize("name", ["MAF", "NSF"])
@pytest.mark.filterwarnings("ignore::pyro_sinflow.InversionWarning")
def test_sampling_zukos_flows(benchmark, trained, data, name, way):
    flow, z = trained(name), torch.randn(1000, D, device=DEVICE)
    flow = fast_inverse(flow) if way == "samples by fast_inverse" else flow
    function = unit = log_density(flow, data)
    if way != "log-density":
        function = partial(invert, flow, z)
        report_residual(benchmark, flow, z, invert)
    measure(benchmark, f"1,000 {name} samples", function, 5, unit)


def report_residual(benchmark, flow, z, inverse):
    """Notes the residual of the median sample: the tails are the business of docs/accuracy.md."""
    with torch.no_grad():
        error = (flow().transform(inverse(flow, z)) - z).abs() / (1 + z.abs())
    benchmark.extra_info["residual"] = float(error.amax(dim=1).median())


@pytest.mark.parametrize("way", ["sample", "rsample and backward"])
@pytest.mark.parametrize("name", ["shift", "scale", "default"])
@pytest.mark.filterwarnings("ignore::pyro_sinflow.InversionWarning")
def test_gradient_of_samples(benchmark, trained, name, way):
    flow, z = trained(name), torch.randn(1000, D, device=DEVICE)
    step = training_step([*flow.parameters()], lambda: flow().transform.inv(z).square().mean())
    unit = partial(invert, flow, z)
    function = step if way != "sample" else unit
    measure(benchmark, f"Gradient of 1,000 {name} samples", function, 5, unit)


def hierarchical():
    """A regression in eight groups, 20 latent variables."""
    torch.manual_seed(0)
    x, truth = torch.randn(8, 30), torch.randn(8, 1)
    y = truth * x + 0.3 * torch.randn(8, 30)

    def model():
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        w = pyro.sample("w", dist.Normal(loc.expand(8, 2), scale).to_event(2))
        pyro.sample("y", dist.Normal(w[:, :1] * x + w[:, 1:], 0.3).to_event(2), obs=y)

    return model


# About 8,000 parameters each, in two autoregressive maps; an LDU block has two.
GUIDES = {
    "LDU": lambda m: AutoNormalizingFlow(
        m, partial(ldu, hidden_features=(35, 35), activation=nn.SiLU)
    ),
    "AutoIAFNormal": lambda m: AutoIAFNormal(m, hidden_dim=[40, 40], num_transforms=2),
    "spline_autoregressive": lambda m: AutoNormalizingFlow(
        m, partial(iterated, 2, spline_autoregressive, hidden_dims=[24], count_bins=2)
    ),
    "block_autoregressive": lambda m: AutoNormalizingFlow(
        m, partial(iterated, 1, block_autoregressive, hidden_factors=[10])
    ),
}


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.filterwarnings("ignore")
def test_guide(benchmark, name):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = hierarchical()
    guide = GUIDES[name](model)
    optimizer = pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.02**1e-3})  # to a fiftieth
    svi = pyro.infer.SVI(model, guide, optimizer, pyro.infer.Trace_ELBO())
    for _ in range(1000):
        svi.step()
    benchmark.extra_info["ELBO"] = -sum(svi.evaluate_loss() for _ in range(200)) / 200
    benchmark.extra_info["parameters"] = sum(p.numel() for p in guide.parameters())
    measure(benchmark, "SVI step of a guide, and its ELBO after 1,000", svi.step, rounds=30)


@pytest.mark.parametrize("package", ["pyro, zuko", "pyro, zuko, pyro_sinflow"])
def test_import(benchmark, package):
    command = [sys.executable, "-c", f"import {package}"]
    unit = [sys.executable, "-c", "import pyro, zuko"]
    other = partial(subprocess.run, unit, check=True)
    function = other if command == unit else partial(subprocess.run, command, check=True)
    measure(benchmark, "Import", function, 7, other)
