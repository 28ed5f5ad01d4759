"""The example scripts run, with a budget too small to learn anything."""

import gzip
import importlib
import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from torch.distributions import Independent, SigmoidTransform, TransformedDistribution, Uniform

from pyro_sinflow import SinusoidalFlow

EXAMPLES = Path(__file__).parent.parent / "examples"


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
def example(monkeypatch):
    """Imports one of the modules."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.fixture
def training(example):
    """The module that fits flows."""
    return example("training")


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


GPU = pytest.param(
    True,
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)


@pytest.mark.parametrize("captured", [False, GPU])
@pytest.mark.parametrize("conditioner", ["independent", "autoregressive"])
def test_a_step_is_that_of_the_optimiser(training, conditioner, captured):
    device = "cuda" if captured else "cpu"

    def flow_and_loss(batch):
        torch.manual_seed(0)
        flow = SinusoidalFlow(3, transforms=2, conditioner=conditioner, hidden_features=(8,))
        flow.to(device)
        return flow, lambda: -flow().log_prob(batch).mean()

    batch, rate = torch.empty(16, 3, device=device), torch.tensor(0.1, device=device)
    batches = [torch.randn(16, 3).to(device) for _ in range(5)]
    batch.copy_(batches[0])
    rates = [0.1, 0.1, 0.1, 0.05, 1e-3]
    with pyro.validation_enabled(False):
        flow, loss = flow_and_loss(batch)
        step = training.likelihood_step(flow, loss, rate, clip=0.1)
        if captured:  # the warm-up takes the first step
            step = training.captured(step, warm_up=1)
        else:
            step()
        found = []
        for rows, lr in list(zip(batches, rates, strict=True))[1:]:
            batch.copy_(rows)
            rate.fill_(lr)
            found.append(float(step()))

        flow, loss = flow_and_loss(batch)
        optimiser = torch.optim.AdamW(flow.parameters(), weight_decay=0.0)
        for i, (rows, lr) in enumerate(zip(batches, rates, strict=True)):
            batch.copy_(rows)
            optimiser.zero_grad()
            value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 0.1)
            optimiser.param_groups[0]["lr"] = lr
            optimiser.step()
            assert i == 0 or found[i - 1] == pytest.approx(float(value.detach()), rel=1e-4)


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
    standardise = torch.distributions.AffineTransform(data.mean, data.std).inv
    logistic = TransformedDistribution(uniform, [SigmoidTransform().inv, standardise])
    bits = images.bits_per_dimension(Independent(logistic, 3), data.test, brightness)
    assert bits.shape == (20,)
    assert torch.allclose(bits, torch.tensor(math.log2(17 / (1 - 2 * margin))), atol=1e-4)


def write_mnist(folder, suffix):
    sizes = {"train": 10_007, "t10k": 5}
    arrays = {}
    for name, n in sizes.items():
        arrays[name] = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        raw = bytes([0, 0, 8, 3]) + np.array([n, 28, 28], ">u4").tobytes() + arrays[name].tobytes()
        path = folder / f"{name}-images-idx3-ubyte{suffix}"
        path.write_bytes(gzip.compress(raw, 1) if suffix else raw)
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist(example, tmp_path, suffix):
    arrays = write_mnist(tmp_path, suffix)
    train, validation, test = example("files").mnist(tmp_path)
    assert np.array_equal(np.concatenate((train, validation))[:, 0], arrays["train"])
    assert np.array_equal(test[:, 0], arrays["t10k"])
    assert len(validation) == 10_000

    (tmp_path / f"t10k-images-idx3-ubyte{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=r"'t10k-images-idx3-ubyte' or .*'--data-root'"):
        example("files").mnist(tmp_path)


def test_mnist_as_arrays(example, tmp_path):
    arrays = np.random.default_rng(0).integers(0, 256, (10_012, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "mnist.npz", train_x=arrays[:-5], test_x=arrays[-5:])
    train, validation, test = example("files").mnist(tmp_path)
    assert np.array_equal(np.concatenate((train, validation, test))[:, 0], arrays)
    assert (len(validation), len(test)) == (10_000, 5)


@pytest.mark.parametrize(
    "raw", [b"", b"\0\0\x08\x03", b"\0\0\x08\x01\0\0\0\3ab", b"\0\0\x0d\1\0\0\0\0"]
)
def test_a_damaged_idx_file(example, tmp_path, raw):
    path = tmp_path / "idx"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"idx' should be an idx file"):
        example("files").read_idx(path)


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 does, with which the batches of CIFAR-10 were written."""

    def save_string(self, value):
        value = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    dispatch = pickle._Pickler.dispatch | {str: save_string, bytes: save_string}


def test_cifar10(example, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (4, 3072), dtype=np.uint8) for _ in names]
    for name, array in zip(names, arrays, strict=True):
        with (folder / name).open("wb") as file:
            Python2Pickler(file, protocol=2).dump({"data": array, "labels": [1] * 4})
    train, validation, test = example("files").cifar10(tmp_path)
    assert np.array_equal(
        np.concatenate((train, validation)).reshape(20, -1), np.vstack(arrays[:5])
    )
    assert train.shape == (18, 3, 32, 32)
    assert np.array_equal(test.reshape(4, -1), arrays[5])


def test_a_batch_cannot_run_anything(example, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    path = tmp_path / "test_batch"
    path.write_bytes(pickle.dumps({b"data": Attack()}))
    with pytest.raises(pickle.UnpicklingError, match=r"should not call '(posix|nt)\.mkdir'"):
        example("files").read_batch(path)
    assert not (tmp_path / "attacked").exists()


SCHOOLS = "eight_schools-eight_schools_noncentered"


def write_posterior(root, *, zipped):
    """Writes data and made-up draws of the eight schools, in either format that is read."""
    effects = {"J": 8, "y": [28, 8, -3, 7, -1, 1, 18, 12], "sigma": [15, 10, 16, 11, 9, 11, 10, 18]}
    names = [*(f"theta[{i}]" for i in range(1, 9)), "mu", "tau"]
    draws = np.abs(np.random.default_rng(0).normal(size=(2, 50, len(names))))
    if not zipped:
        (root / "eight_schools.json").write_text(json.dumps(effects))
        np.savez(root / f"{SCHOOLS}.npz", names=names, draws=draws)
        return
    chains = [dict(zip(names, chain.T.tolist(), strict=True)) for chain in draws]
    database = root / "posterior_database"
    for path, content in (
        (database / "data" / "data" / "eight_schools.json.zip", effects),
        (database / "reference_posteriors" / "draws" / "draws" / f"{SCHOOLS}.json.zip", chains),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(path.stem, json.dumps(content))


def test_posteriordb(tmp_path):
    write_posterior(tmp_path, zipped=False)
    options = ("--out", tmp_path / "out", "--data-root", tmp_path, "--only", SCHOOLS)
    budget = ("--seeds", "2", "--steps", "2", "--seconds", "0.05", "--draws", "200", "--nuts", "4")
    output = run("posteriordb.py", *options, *budget)
    for guide in ("AutoLDU", "AutoIAFNormal", "AutoMultivariateNormal", "AutoDiagonalNormal"):
        cells = [line.split("|") for line in output.splitlines() if f"| {guide} " in line]
        elbos = [c[3] for c in cells if "eight schools" in c[1]]
        assert len(elbos) == 2  # for equal steps, and for equal time
        assert all(re.fullmatch(r" -[\d.]+ ± [\d.]+ *", elbo) for elbo in elbos)
    assert "NeuTra, AutoLDU" in output
    assert (tmp_path / "out" / "posteriordb.png").exists()
    assert len([*(tmp_path / "out" / "fits").glob("*.json")]) == 2 * 2 * 4 + 1
    again = run("posteriordb.py", *options, *budget)  # from the files
    assert [row for row in again.splitlines() if row.startswith("| eight")] == [
        row for row in output.splitlines() if row.startswith("| eight")
    ]


def test_a_posterior_is_read_from_either_format(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    posteriors = importlib.import_module("posteriors")
    found = []
    for zipped in (False, True):
        folder = tmp_path / str(zipped)
        folder.mkdir()
        write_posterior(folder, zipped=zipped)
        found.append(posteriors.read(folder, SCHOOLS))
    plain, database = found
    assert plain.draws["theta"].shape == (100, 8)
    assert plain.draws["mu"].shape == (100,)
    assert {k: v.shape for k, v in plain.draws.items()} == {
        k: v.shape for k, v in database.draws.items()
    }
    assert all(torch.equal(plain.draws[k], database.draws[k]) for k in plain.draws)


def test_lotka_volterra_is_solved(monkeypatch):
    """The quantity that the equations conserve, and the solver of half the step."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    posteriors = importlib.import_module("posteriors")
    theta = torch.tensor([[0.55, 0.028, 0.8, 0.024], [0.6, 0.03, 0.7, 0.02]], dtype=torch.float64)
    start = torch.tensor([[34.0, 6.0], [30.0, 8.0]], dtype=torch.float64).log()
    times = torch.arange(1.0, 21.0)
    states = posteriors.solve_lotka_volterra(theta, start, times)
    assert states.shape == (2, 20, 2)
    a, b, c, d = theta.unsqueeze(1).unbind(-1)
    u, v = states.unbind(-1)
    conserved = d * u.exp() - c * u + b * v.exp() - a * v
    assert float((conserved - conserved[:, :1]).abs().max()) < 1e-3
    finer = posteriors.solve_lotka_volterra(theta, start, times, steps=8)
    assert float((states - finer).abs().max()) < 1e-3


def test_a_fit_that_failed_has_a_row_of_the_table(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    posteriordb = importlib.import_module("posteriordb")
    pairs = {key: [0.1, 0.1] for key in ("means", "log stds")}
    fit = {"elbo": -1.0, "error": 0.1, "k": 0.3, "effective per second": 9.0, **pairs}
    cells = posteriordb.cells([fit, {"failed": "NaN"}])
    assert cells[0] == "1 of 2 failed"
    assert len(cells) == len(posteriordb.cells([fit, fit]))
