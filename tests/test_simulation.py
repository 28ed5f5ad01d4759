"""The recipe for simulation-based inference: its simulators, its test of samples, its table."""

import json
import math

import numpy as np
import pytest
import torch
from test_examples import rows, run
from torch.distributions import MultivariateNormal

from pyro_sinflow import SinusoidalFlow

TINY = ("--steps", "3", "--simulations", "100", "--batch", "50", "--tests", "10")
FLOWS = ("Sinusoidal, default", "Sinusoidal, independent", "NSF")


@pytest.mark.parametrize("client", ["lampe", "sbi"])
def test_simulation(tmp_path, client):
    pytest.importorskip(client)
    options = ("--out", tmp_path, "--client", client, "--flows", *FLOWS[:1], *TINY)
    table = rows(run("simulation.py", *options))
    for task in ("two moons", "SLCP"):
        assert len(table[f"{client}, {task}, 100, {FLOWS[0]}"]) == 3


def write_reference(root, task, name, observations):
    """References that are those of the prior."""
    arrays = {}
    for i in range(1, observations + 1):
        theta, x = task.draw(60)
        arrays |= {f"{name}_{i}_observation": x[0].numpy(), f"{name}_{i}_posterior": theta.numpy()}
    np.savez(root / "sbibm.npz", **arrays)


def results(folder):
    return {path: json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")}


def test_table(tmp_path, example):
    tasks = example("simulators").TASKS
    write_reference(tmp_path, tasks["two moons"], "two_moons", 1)
    out = tmp_path / "out"
    options = ("--out", out, "--tasks", "two moons", *TINY)
    references = ("--data-root", tmp_path, "--draws", "10", "--observations", "1", "--seeds", "2")
    table = rows(run("simulation.py", *options, *references, "--jobs", "2"))
    found = results(out)
    assert len(found) == 6
    for flow in FLOWS:
        seeds = [r for path, r in found.items() if f"_100_{flow}_" in path.name]
        score, c2st, calibration, _ = table[f"zuko, two moons, 100, {flow}"]
        for cell, values in (
            (score, [r["score"] for r in seeds]),
            (c2st, [float(np.mean(r["c2st"])) for r in seeds]),
        ):
            mean, half = sum(values) / 2, abs(values[0] - values[1]) / 2
            assert [*map(float, cell.split(" ± "))] == pytest.approx([mean, half], abs=6e-4)
        assert calibration == f"{max(r['calibration'] for r in seeds):.3f}"
        assert all(0 < r["calibration"] < 1 and r["error"] > 0 for r in seeds)
        assert all(len(r["c2st"]) == 1 and 0 <= min(r["c2st"]) <= 1 for r in seeds)
    for name in ("coverage.png", "c2st.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")

    # Finished fits are read from their files, the one that is missing is run to the same result.
    first, *_, last = found
    first.write_text(json.dumps(found[first] | {"calibration": 9.0}))
    last.unlink()
    again = rows(run("simulation.py", *options, *references))
    assert "9.000" in {row[2] for row in again.values()}
    assert {name: row[:2] for name, row in again.items()} == {
        name: row[:2] for name, row in table.items()
    }


def test_arguments(tmp_path, example, capsys):
    parse = example("simulation").parse
    for option, value, expected in (
        ("--seeds", "0", "at least 1, got 0"),
        ("--simulations", "5", "at least 20, got 5"),
        ("--observations", "11", "from 1 to 10, got 11"),
        ("--flows", "MAF", "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            parse(["--out", str(tmp_path), option, value])
        assert expected in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"'sbibm\.npz' in .*'--data-root'"):
        example("simulation").main(["--out", str(tmp_path), "--data-root", str(tmp_path)])
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "github.com/sbi-benchmark/sbibm" in capsys.readouterr().out


def test_two_moons_is_that_of_sbibm(example):
    """Parameters rotated by 45 degrees move a half circle, to the left whatever their sign."""
    tasks = example("simulators").TASKS
    assert tasks["two moons"].bound == 1
    theta, x = tasks["two moons"].draw(20_000)
    assert theta.shape == x.shape == (20_000, 2)
    assert theta.abs().max() <= 1
    turn = math.pi / 4
    first = math.cos(turn) * theta[:, 0] + math.sin(turn) * theta[:, 1]
    second = -math.sin(turn) * theta[:, 0] + math.cos(turn) * theta[:, 1]
    moon = x - torch.stack((0.25 - first.abs(), second), dim=1)
    radius, angle = moon.norm(dim=1), torch.atan2(moon[:, 1], moon[:, 0])
    assert radius.mean().item() == pytest.approx(0.1, abs=5e-4)
    assert radius.std().item() == pytest.approx(0.01, abs=5e-4)
    assert (-math.pi / 2 - 1e-3 < angle.min()) & (angle.max() < math.pi / 2 + 1e-3)
    assert angle.std().item() == pytest.approx(math.pi / 12**0.5, abs=0.02)
    assert angle.mean().item() == pytest.approx(0, abs=0.03)


def test_slcp_is_that_of_sbibm(example):
    """Four draws from a normal distribution, whose deviations are squares of parameters."""
    task = example("simulators").TASKS["SLCP"]
    assert (task.parameters, task.bound) == (5, 3)
    m1, m2, a, b, r = 0.7, -2.9, -1.5, 1.2, 0.6
    x = task.simulate(torch.tensor([m1, m2, a, b, r]).expand(50_000, 5))
    assert x.shape == (50_000, 8)
    s1, s2, rho = a**2, b**2, math.tanh(r)
    covariance = torch.tensor([[s1**2, rho * s1 * s2], [rho * s1 * s2, s2**2]])
    # Standardized by sbibm's mean and covariance, draws are standard normal and independent.
    expected = MultivariateNormal(torch.tensor([m1, m2]), covariance)
    z = torch.linalg.solve_triangular(
        expected.scale_tril, (x.view(-1, 4, 2) - expected.loc).mT, upper=False
    ).mT.flatten(1)
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(8), atol=0.03, rtol=0)
    torch.testing.assert_close(z.T.cov(), torch.eye(8), atol=0.03, rtol=0)


def test_c2st(example):
    c2st = example("simulators").c2st
    torch.manual_seed(0)
    units = torch.tensor([1.0, 1e-4])  # which should not matter, because it standardizes
    x, y = torch.randn(2, 100, 2)
    assert c2st(x * units, y * units) == pytest.approx(0.5, abs=0.12)
    assert c2st(x * units, (y + torch.tensor([0.0, 6.0])) * units) > 0.97


def test_files_hold_the_options(tmp_path, example):
    simulation = example("simulation")
    cell = simulation.Cell("zuko", "SLCP", 1000, "NSF", 0)
    names = set()
    for options in ("", "--data-root .", "--data-root . --draws 50", "--space box", "--lr 2e-3"):
        args = simulation.parse(["--out", str(tmp_path), *options.split()])
        names.add(simulation.file_of(cell, args))
    assert len(names) == 5
    assert simulation.budget_of(cell, args).batch == 50
    assert simulation.budget_of(cell._replace(simulations=100_000), args).batch == 500


@pytest.mark.parametrize("real", [False, True])
def test_units(example, real):
    estimators = example("estimators")
    theta = (6 * torch.rand(50_000, 2) - 3).double()
    x = torch.zeros(50_000, 1)
    units = estimators.Units(3.0, real, torch.zeros(1), torch.ones(1))
    z, _ = units.encode(theta, x)
    torch.testing.assert_close(units.decode(z), theta, atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(dim=0), torch.ones(2).double(), atol=0.02, rtol=0)
    # The prior, whose density in its standard deviations is known, seen through the encoding.
    one = theta[:1].requires_grad_()
    jacobian = torch.autograd.functional.jacobian(lambda t: units.encode(t, x[:1])[0], one)
    expected = jacobian.reshape(2, 2).logdet() - 2 * math.log(3**0.5 / 3)
    assert units.log_scale(one).item() == pytest.approx(expected.item(), abs=1e-6)


def test_rejection(example):
    estimators = example("estimators")
    units = estimators.Units(1.0, False, torch.zeros(3), torch.ones(3))
    x = torch.zeros(3)
    posterior = estimators.Posterior(
        lambda theta, x: theta.sum(dim=-1), lambda n, x: torch.randn(n, len(x), 2), units
    )
    theta = posterior.accepted(500, x)
    assert theta.shape == (500, 2)
    assert theta.abs().max() <= 1
    outside = estimators.Posterior(
        posterior.score, lambda n, x: torch.full((n, len(x), 2), 9.0), units
    )
    with pytest.raises(
        RuntimeError, match="Of 60 draws, 20 should be in the prior's bounds, got 0"
    ):
        outside.accepted(20, x, rounds=3)


def test_training_stops_early(example):
    """Noise is all that there is to learn: the fit stops, with the weights that validated best."""
    estimators = example("estimators")
    torch.manual_seed(0)
    theta, x = torch.randn(100, 2), torch.randn(100, 2)
    flow = SinusoidalFlow(2, 2)
    values = []

    def score(theta, x):
        value = flow(x).log_prob(theta)
        if not flow.training:
            values.append(value.mean().item())
        return value

    budget = estimators.Budget(steps=1000, epochs=100, batch=50, lr=1e-2, patience=3)
    epochs = estimators.train(score, flow, (theta, x), budget)
    assert epochs == len(values) < 100
    assert max(values) == values[-4]
    with torch.no_grad():
        last = score(theta[-10:], x[-10:]).mean().item()
    assert last == pytest.approx(max(values[:-1]), abs=1e-5)
