"""The example scripts run, with a budget too small to learn anything."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyro_sinflow import SinusoidalFlow

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script, *args):
    process = subprocess.run(
        [sys.executable, EXAMPLES / script, *args],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=120,
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
    for flow in ("SinusoidalFlow, autoregressive", "SinusoidalFlow, LDU blocks", "NSF", "MAF"):
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


@pytest.fixture
def training(monkeypatch):
    """The module that the examples share."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import training

    return training


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


def test_an_interrupted_fit_resumes(training, start, tmp_path, monkeypatch):
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
        ValueError, match=r"fit\.pt' should be of .*'steps': 9,.* got .*'steps': 8,"
    ):
        start(checkpoint, steps=9)
    with pytest.raises(RuntimeError, match="size mismatch"):
        start(checkpoint, features=3)
