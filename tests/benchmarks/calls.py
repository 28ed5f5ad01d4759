"""What a call costs: Python and aten calls, and small batches over the parts they are made of.

In guides and small flows nearly all time goes into calls. `python tests/benchmarks/calls.py` prints
one table; all times are ratios that were measured by turns in this run, on one thread.
"""

import sys
import time
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import zuko
from pyro.distributions.transforms import affine_autoregressive, iterated
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal
from pyro.optim import ClippedAdam
from torch.profiler import ProfilerActivity, profile

import pyro_sinflow
from pyro_sinflow import AutoLDU, ConditionalLDU, SinusoidalFlow, fast_inverse, ldu

BLOCKS = {"conditioner": "independent", "linear": False, "tails": False}
PACKAGE = Path(pyro_sinflow.__file__).parent
ZUKO = Path(zuko.__file__).parent


def python_calls(function, folder):
    """Counts the calls of functions that are defined in a folder."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(f"{folder}/")

    function()
    sys.setprofile(trace)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def aten_calls(function):
    """Counts aten's operators, those that others call included, as torch.profiler lists them."""
    function()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return sum(e.count for e in profiler.key_averages() if e.key.startswith("aten::"))


def seconds(functions, rounds=60, repeat=10):
    """Returns the shortest time of each function; they are measured by turns."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            for _ in range(repeat):
                function()
            best[i] = min(best[i], (time.perf_counter() - start) / repeat)
    return best


def gradients(outputs, inputs):
    """Returns a function that evaluates outputs and differentiates their sum."""

    def step():
        total = sum(output.sum() for output in outputs())
        torch.autograd.grad(total, inputs, allow_unused=True)

    return step


def log_prob_step(flow, x):
    """Returns a training step without the optimizer."""
    return gradients(lambda: [-flow().log_prob(x).mean()], [*flow.parameters()])


def guide_step(transform, rows, features):
    """Returns the loss of a guide with a normal target, and its gradients."""
    base = dist.Normal(torch.zeros(features), 1.0).to_event(1)
    guide = dist.TransformedDistribution(base, [transform])

    def loss():
        x = guide.rsample((rows,))
        return [(guide.log_prob(x) + x.square().sum(-1)).mean()]

    return gradients(loss, [*transform.parameters()])


def per_transform(make, step, measure):
    """Measures 1 and 3 transforms, and returns what one more of them adds."""
    one, three = (measure(step(make(n))) for n in (1, 3))
    return (three - one) / 2


def lines():
    """Counts the lines of the package."""
    return sum(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py"))


def count_calls():
    """Yields the rows of the table that are counts."""
    yield "lines in pyro_sinflow/", lines(), 3700
    for scale in (False, True):
        name = f"scale={scale}"
        one = partial(SinusoidalFlow, transforms=1, scale=scale, **BLOCKS)
        x = torch.randn(128, 16)
        flow = one(16)
        yield (
            f"Python calls: log_prob of one block, {name}",
            python_calls(lambda flow=flow, x=x: flow().log_prob(x), PACKAGE),
            120,
        )
        flow = one(4)
        yield (
            f"Python calls: sample of 500, {name}",
            python_calls(lambda flow=flow: flow().sample((500,)), PACKAGE),
            350,
        )
        flow = SinusoidalFlow(16, transforms=3, scale=scale, **BLOCKS)
        inverse = gradients(
            lambda flow=flow, x=x: [flow().transform.inv(x).square()], [*flow.parameters()]
        )
        yield (
            f"Python calls: inverse and backward of 3 blocks, {name}",
            python_calls(inverse, PACKAGE),
            1500,
        )
        yield (
            f"aten calls: training step, per block, {name}",
            per_transform(
                lambda n, scale=scale: SinusoidalFlow(16, transforms=n, scale=scale, **BLOCKS),
                lambda flow, x=x: log_prob_step(flow, x),
                aten_calls,
            ),
            700,
        )
    maf = zuko.flows.MAF(4, transforms=1)
    x = torch.randn(128, 4)
    yield (
        "Python calls of zuko: log_prob of MAF(1)",
        python_calls(lambda: maf().log_prob(x), ZUKO),
        "",
    )
    yield (
        "Python calls of zuko: sample of 500",
        python_calls(lambda: maf().sample((500,)), ZUKO),
        "",
    )
    yield (
        "aten calls: training step, per MAF network",
        per_transform(
            lambda n: zuko.flows.MAF(4, transforms=n), lambda f: log_prob_step(f, x), aten_calls
        ),
        "",
    )


def time_guides(features=10, rows=8):
    """Yields the ratios of a guide's block."""
    x = torch.randn(rows, features, requires_grad=True)
    block = ConditionalLDU(features, scale=True)
    networks = [block.upper.network, block.lower.network]
    chain = block.diagonal
    parts = {
        "networks": gradients(
            lambda: [network(x) for network in networks],
            [x, *(p for network in networks for p in network.parameters())],
        ),
        "network": gradients(lambda: [networks[0](x)], [x, *networks[0].parameters()]),
        "chain": gradients(lambda: chain().call_and_ladj(x), [x, *chain.parameters()]),
    }
    ours = [guide_step(iterated(n, ldu, features, scale=True), rows, features) for n in (1, 3)]
    iaf = partial(affine_autoregressive, features, hidden_dims=[64, 64])
    theirs = [guide_step(iterated(n, iaf), rows, features) for n in (1, 3)]
    networks, network, chain, one, three, iaf_one, iaf_three = seconds(
        [*parts.values(), *ours, *theirs]
    )
    step, layer = (three - one) / 2, (iaf_three - iaf_one) / 2
    yield "guide's block over its parts (two networks, chain)", step / (networks + chain), 1.15
    yield "chain of 4 sinusoids over one masked network", chain / network, 2.5
    yield "guide's block over two layers of AutoIAFNormal", step / (2 * layer), 1.5


def time_steps(features=10):
    """Yields the ratio of a step of SVI."""

    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0)).unsqueeze(-1)
        pyro.sample("x", dist.Normal(torch.zeros(features - 1), scale).to_event(1))

    pyro.clear_param_store()
    steps = []
    for guide in (AutoLDU(model), AutoIAFNormal(model, hidden_dim=[64, 64], num_transforms=2)):
        loss = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)
        steps.append(SVI(model, guide, ClippedAdam({"lr": 1e-3}), loss).step)
    ours, iaf = seconds(steps)
    yield "step of SVI: AutoLDU over AutoIAFNormal of two layers", ours / iaf, 1.5


def time_single_samples():
    """Yields the ratios of one sample by fast_inverse to one by zuko's own inverse."""
    for make in (zuko.flows.MAF, zuko.flows.NSF):
        for features in (2, 5):
            flow = make(features)
            z = torch.randn(1, features)
            functions = [lambda f=f, z=z: f().transform.inv(z) for f in (flow, fast_inverse(flow))]
            with torch.no_grad():
                zukos, fast = seconds(functions)
            yield f"one sample of {make.__name__}({features}), over zuko's inverse", fast / zukos, 1


def main():
    """Prints the table."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("| what | measured | aim |\n|---|---|---|")
    rows = (*count_calls(), *time_guides(), *time_steps(), *time_single_samples())
    for what, value, aim in rows:
        print(
            f"| {what} | {value:,.4g} | {aim} |"
            if value < 1000
            else f"| {what} | {value:,.0f} | {aim} |"
        )


if __name__ == "__main__":
    main()
