"""The example scripts run, with a budget too small to learn anything."""

import json
import math
import os
import re
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyro
import pytest
import torch
from conftest import EXAMPLES
from torch.distributions import Independent, SigmoidTransform, TransformedDistribution, Uniform
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_sinflow import SinusoidalFlow


def run(script, *args):
    process = subprocess.run(
        [sys.executable, EXAMPLES / script, *args],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def rows(output):
    """The tables of the output, by their first column."""
    lines = [line.strip("| ").split("|") for line in output.splitlines() if line.startswith("| ")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}


def test_demo(tmp_path):
    budget = ("--guide-steps", "3", "--draws", "9", "--flow-steps", "2")
    output = run("demo.py", "--out", tmp_path / "out", *budget)

    table = rows(output)
    evidence = float(re.search(r"log-evidence, is (-[\d.]+)\.\n", output)[1])
    for guide in ("LDU guide", "Normal guide"):
        elbo, error = map(float, table[guide][-1].split(" ± "))
        assert error > 0
        assert elbo < evidence + 5 * error
    for flow in (
        "SinusoidalFlow",
        "SinusoidalFlow, LDU blocks",
        "NSF",
        "MAF",
    ):
        assert len(table[flow]) == len(table["flow"]) == 3
        assert "nan" not in " ".join(table[flow])

    for name in ("eight_schools.png", "patches.png"):
        path = tmp_path / "out" / name
        assert path.read_bytes().startswith(b"\x89PNG")
        assert str(path) in output


def test_demo_help():
    assert "--flow-steps" in run("demo.py", "--help")


def test_figures(tmp_path):
    budget = ("--steps", "2", "--batch", "16", "--data", "moons")
    output = run("figures.py", "--out", tmp_path, *budget)
    table = rows(output)
    for name in ("truth", "D-scales", "MAF"):
        assert re.fullmatch(r"-?\d+\.\d{3} ± 0\.\d{3}", table[name][0])
    for name in ("moons", "parameters", "time of a step"):
        assert len(table[name]) == 4
    for name in ("staircase.png", "mixture.png", "planes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    results = json.loads((tmp_path / "figures.json").read_text())
    assert 0 < results["2"]["least slope"] < 1 < results["2"]["greatest slope"] < 2
    run("figures.py", "--out", tmp_path, *budget, "--figures", "3")
    again = json.loads((tmp_path / "figures.json").read_text())
    assert again["3"] == results["3"]


def test_measure(tmp_path):
    output = run("measure.py", "--out", tmp_path, "--quick")
    results = json.loads((tmp_path / "measure.json").read_text())
    assert all(f"\n{title}\n" in output for title in results)
    assert (tmp_path / "passes.png").read_bytes().startswith(b"\x89PNG")

    (aims, *trips), newton, passes = results.values()
    assert len(trips) == 3 * 2 * 2  # kinds of flows, numbers of blocks, numbers of features
    for dtype in ("float32", "float64"):
        for state in (f"{dtype}, untrained", f"{dtype}, trained"):
            for trip in trips:
                error, missed = trip[state]
                assert error <= aims[state]
                assert missed == 0
    for row in newton:
        assert 0 < row["median"] <= row["99 %"] <= row["maximum"] < 200
        assert row["largest error"] <= row["aim"]
    # 8 blocks of two triangular maps, or 8 triangular maps.
    for kind, maps in (("scale=False", 16), ("independent", 16), ("default", 8)):
        assert sum(row[kind] for row in passes) == maps
    assert all(1 <= row["passes"] <= 8 for row in passes)


@pytest.fixture
def training(example):
    """The module that fits flows."""
    return example("training")


@pytest.fixture
def steps(example):
    """The module of training steps."""
    return example("steps")


@pytest.fixture
def start(training):
    """Starts a fit, or resumes it."""

    def start(checkpoint=None, steps=8, features=2, **options):
        torch.manual_seed(0)
        flow = SinusoidalFlow(features, transforms=1, hidden_features=(8,), dropout=0.5)
        budget = training.Budget(steps, batch=16, every=2, **options)
        moons = training.Data(*torch.randn(3, 100, features), torch.zeros(2), torch.ones(2))
        return training.fit("moons", flow, moons, budget, checkpoint)

    return start


@pytest.mark.parametrize("options", [{}, {"average": 0.5}])
def test_an_interrupted_fit_resumes(training, start, tmp_path, monkeypatch, options):
    start = partial(start, **options)
    expected = start().state_dict()
    checkpoint = tmp_path / "fit.pt"

    validations = []
    evaluate = training.evaluate

    def interrupted(*args):
        validations.append(args)
        if len(validations) == 3:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(training, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(checkpoint)
    resumed = start(checkpoint)
    assert len(validations) == 3 + 2  # after steps 2 and 4 and, once more, 6 and 8
    assert all(torch.equal(value, expected[key]) for key, value in resumed.state_dict().items())

    finished = start(checkpoint)
    assert len(validations) == 5
    assert all(torch.equal(value, expected[key]) for key, value in finished.state_dict().items())


@pytest.mark.parametrize("failing", [1, 4])
def test_a_fit_that_diverges_keeps_the_best_weights(training, start, monkeypatch, failing):
    taken, validated, original = [], [], training.likelihood_step

    def likelihood_step(*args):
        def take():
            taken.append(None)
            if len(taken) == failing:
                raise ValueError("values that are not finite")
            return step()

        step = original(*args)
        return take

    def evaluate(flow, rows):
        validated.append({key: value.clone() for key, value in flow.state_dict().items()})
        return 0.0, 0.0

    monkeypatch.setattr(training, "likelihood_step", likelihood_step)
    monkeypatch.setattr(training, "evaluate", evaluate)
    if failing == 1:  # an error that is not of the values
        with pytest.raises(ValueError, match="not finite"):
            start()
        return
    weights = start().state_dict()
    assert len(validated) == 1  # after two steps
    assert all(torch.equal(value, validated[0][key]) for key, value in weights.items())


def test_a_fit_averages_weights(training, start, monkeypatch):
    monkeypatch.setattr(training, "evaluate", lambda flow, rows: (float(flow.training), 0.0))
    plain, short = start(steps=2).state_dict(), start(steps=1).state_dict()
    # A fit of two steps validates once, at the end. The average begins with the first weights.
    averaged = start(steps=2, average=0.25).state_dict()
    assert any(not torch.equal(value, plain[key]) for key, value in averaged.items())
    for key, value in averaged.items():
        if value.is_floating_point():
            assert torch.allclose(value, 0.25 * short[key] + 0.75 * plain[key], atol=1e-6)


def test_a_fit_stops_early(training, start, monkeypatch):
    scores = iter([(1.0, 0.0), (2.0, 0.0), (1.5, 0.0), (1.5, 0.0), (3.0, 0.0)])
    best = []

    def evaluate(flow, rows):
        score = next(scores)
        if score[0] == 2.0:
            best.append({key: value.clone() for key, value in flow.state_dict().items()})
        return score

    monkeypatch.setattr(training, "evaluate", evaluate)
    weights = start(steps=100, patience=4).state_dict()
    assert next(scores) == (3.0, 0.0)
    assert all(torch.equal(value, best[0][key]) for key, value in weights.items())


def test_a_checkpoint_of_something_else_is_an_error(start, tmp_path):
    checkpoint = tmp_path / "fit.pt"
    start(checkpoint)
    with pytest.raises(
        ValueError, match=r"fit\.pt' should have the budget .*'steps': 9,.* got .*'steps': 8,"
    ):
        start(checkpoint, steps=9)
    with pytest.raises(RuntimeError, match="size mismatch"):
        start(checkpoint, features=3)


GPU = pytest.param(
    True,
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)


@pytest.mark.parametrize("captured", [False, GPU])
@pytest.mark.parametrize("conditioner", ["independent", "autoregressive"])
def test_a_step_is_that_of_the_optimizer(steps, conditioner, captured):
    device = "cuda" if captured else "cpu"

    def flow_and_loss(batch):
        torch.manual_seed(0)
        flow = SinusoidalFlow(3, transforms=2, conditioner=conditioner, hidden_features=(8,))
        flow.to(device)
        return flow, lambda: -flow().log_prob(batch).mean()

    batch = torch.empty(16, 3, device=device)
    batches = [torch.randn(16, 3).to(device) for _ in range(5)]
    flow, loss = flow_and_loss(batch)
    optimizer = steps.adamw(flow.parameters(), 0.1)
    schedule = CosineAnnealingLR(optimizer, len(batches))
    step = steps.likelihood_step(optimizer, loss, clip=0.1)
    if captured:
        step = steps.captured(step, warm_up=2)
    found = []
    for rows in batches:
        batch.copy_(rows)
        found.append(float(step()))
        schedule.step()

    flow, loss = flow_and_loss(batch)
    optimizer = torch.optim.AdamW(flow.parameters(), 0.1, weight_decay=0.0)
    for i, rows in enumerate(batches):
        batch.copy_(rows)
        optimizer.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 0.1)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * i / len(batches)))
        optimizer.step()
        assert found[i] == pytest.approx(float(value.detach()), rel=1e-4)


def test_an_optimizer_of_a_gpu_continues_on_a_cpu(steps):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizers = [steps.adamw([parameter], 0.1) for _ in range(2)]
    parameter.square().sum().backward()
    optimizers[0].step()
    state = optimizers[0].state_dict()
    state["param_groups"][0] |= {"capturable": True, "lr": torch.tensor(0.05)}
    optimizers[1].load_state_dict(state)
    steps.use_device(optimizers[1])
    before = parameter.detach().clone()
    optimizers[1].step()
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(0.05)
    assert torch.allclose(before - parameter, torch.tensor(0.05), atol=1e-3)


def test_a_captured_step_is_taken_once_in_each_call(steps, monkeypatch):
    """Stand-ins for what CUDA does: a capture runs nothing, and a replay runs what it recorded."""
    done, capturing = [], [False]

    class Graph:
        def replay(self):
            done.append("replay")

    @contextmanager
    def capture(graph, stream):
        capturing[0] = True
        yield
        capturing[0] = False

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": Graph,
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def step():
        assert not pyro.distributions.is_validation_enabled()
        if not capturing[0]:
            done.append("eager")
        return torch.ones(())

    take = steps.captured(step, warm_up=2)
    for _ in range(5):
        assert take() == 1
    assert done == ["eager", "eager", "replay", "replay", "replay"]
    assert pyro.distributions.is_validation_enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_fit_on_a_gpu_is_that_on_a_cpu(training, tmp_path):
    rows = torch.randn(100, 3)
    data = training.Data(rows, rows[:50], rows[:50], rows.mean(0), rows.std(0))
    weights = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        flow = SinusoidalFlow(3, transforms=2, hidden_features=(8,)).to(device)
        budget = training.Budget(20, batch=16, every=10, lr=1e-3)
        here = data.to(torch.device(device))
        for _ in range(2):  # the second reads the checkpoint
            fitted = training.fit("fit", flow, here, budget, tmp_path / f"{device}.pt")
        weights.append([*fitted.cpu().parameters()])
    for a, b in zip(*weights, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("options", [(), pytest.param(("--compile",), marks=pytest.mark.slow)])
def test_gpu(tmp_path, options):
    budget = ("--steps", "2", "--blocks", "1", "--rows", "16")
    output = run("gpu.py", "--out", tmp_path, *budget, *options)
    result = json.loads((tmp_path / "gpu.json").read_text())
    kind = "captured" if torch.cuda.is_available() else "eager"
    assert result["steps"] == ("compiled" if options else kind)
    score = f"{result['log-likelihood']:.2f} ± {result['error']:.2f}"
    assert rows(output)[result["steps"]] == [score, f"{result['faster than eager']:.2f}"]
    assert ("nothing was captured" in output) == (result["steps"] == "eager")
    weights = torch.load(tmp_path / "gpu.pt", weights_only=True)
    assert all(value.isfinite().all() for value in weights.values())


def test_images(tmp_path):
    output = run("images.py", "--out", tmp_path, "--steps", "2", "--blocks", "1")
    table = rows(output)
    assert len(table["PixelCNN"]) == len(table["digits"])
    results = json.loads((tmp_path / "digits.json").read_text())
    for result in results.values():
        assert 0 < result["bits"] < 6
        assert 1 <= result["passes"] <= 64
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_bits_per_dimension_by_hand(example, margin):
    # A logistic density of logits is a uniform density of what they are the logits of: within the
    # margins, 1 - 2 margin of it are spread over the levels.
    images = example("images")
    parts = np.random.default_rng(0).integers(0, 17, (3, 20, 2, 3, 4))
    data, brightness = images.prepare(parts, levels=17, margin=margin)
    assert data.train.mean().abs() < 1e-6
    assert abs(data.train.std() - 1) < 1e-6
    restored = brightness(data.test)
    noise = restored.numpy() - parts[2]
    assert ((noise > -1e-3) & (noise < 1 + 1e-3)).all()

    uniform = Uniform(torch.zeros(2, 3, 4), torch.ones(2, 3, 4))
    standardize = torch.distributions.AffineTransform(data.mean, data.std).inv
    logistic = TransformedDistribution(uniform, [SigmoidTransform().inv, standardize])
    bits = images.bits_per_dimension(Independent(logistic, 3), data.test, brightness)
    assert bits.shape == (20,)
    assert torch.allclose(bits, torch.tensor(math.log2(17 / (1 - 2 * margin))), atol=1e-4)
