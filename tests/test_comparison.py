"""The comparison of flows runs, and its tables hold what they say."""

import json

import numpy as np
import pytest
import torch
from test_examples import rows, run

FLOWS = ("Sinusoidal", "MAF", "B-NAF")
CANCER = ("--data", "breast cancer", "--rates", "0.002", "0.006", "--seeds", "2")


def table(output, title):
    """The cells of a printed table by row and column."""
    part = output[output.index(f"| {title} ") :].split("\n\n")[0]
    _, *found = rows(part).items()
    head = part.splitlines()[0]
    names = [name.strip() for name in head.strip("| ").split("|")][1:]
    return {line: dict(zip(names, cells, strict=True)) for line, cells in found}


def test_comparison(tmp_path):
    options = ("--steps", "2", *CANCER, "--flows", *FLOWS)
    output = run("comparison.py", "--out", tmp_path, *options)
    scores, rates = table(output, "test NLL"), table(output, "learning rate")
    results = json.loads((tmp_path / "comparison.json").read_text())["breast cancer"]
    for flow in FLOWS:
        fits = results[flow]
        assert [f["rate"] for f in fits] == 2 * [float(rates["breast cancer"][flow])]
        tried = [
            json.loads(path.read_text())
            for path in (tmp_path / "fits").glob(f"breast cancer, {flow}, * seed 0.json")
        ]
        assert {f["rate"] for f in tried} == {0.002, 0.006}
        assert fits[0] == min(tried, key=lambda f: f["validation"])
        mean, gap = sum(f["NLL"] for f in fits) / 2, abs(fits[0]["NLL"] - fits[1]["NLL"])
        assert scores["breast cancer"][flow].strip("*") == f"{mean:.2f} ± {gap / 2:.2f}"
    best = min(FLOWS, key=lambda flow: sum(f["NLL"] for f in results[flow]))
    assert scores["breast cancer"][best].startswith("**")
    assert scores["first or level"][best] == "1 of 1"
    assert table(output, "time of a step")["breast cancer"]["MAF"] == "1.0"
    assert table(output, "1,000 samples")["breast cancer"]["B-NAF"] == "none"
    # What is there is read.
    again = run("comparison.py", "--out", tmp_path, *options)
    assert table(again, "test NLL") == scores


def test_the_width_that_validates_best(tmp_path):
    options = ("--steps", "2", *CANCER[:4], "--seeds", "1", "--widths", "4", "64", "--flows", "MAF")
    output = run("comparison.py", "--out", tmp_path, *options)
    (fit,) = json.loads((tmp_path / "comparison.json").read_text())["breast cancer"]["MAF"]
    tried = [json.loads(path.read_text()) for path in (tmp_path / "fits").glob("*.json")]
    assert len(tried) == 2
    assert [f["units"] for f in tried].count(4) == 1
    assert fit == min(tried, key=lambda f: f["validation"])
    assert table(output, "units")["breast cancer"]["MAF"] == str(fit["units"])


def test_widths_of_flows_that_have_one(example, tmp_path, capsys):
    options = ["--out", str(tmp_path), "--widths", "128", "--flows", "MAF", "B-NAF"]
    with pytest.raises(SystemExit):
        example("comparison").main(options)
    assert "--widths is not an option of B-NAF." in capsys.readouterr().err


def test_the_same_time_for_each_flow(tmp_path):
    options = ("--seconds", "0.3", *CANCER, "--flows", "MAF")
    output = run("comparison.py", "--out", tmp_path, *options, "--jobs", "2")
    results = json.loads((tmp_path / "comparison.json").read_text())["breast cancer"]
    steps = [f["steps"] for f in results["MAF"]]
    assert min(steps) > 0
    assert table(output, "steps")["breast cancer"]["MAF"] == f"{sum(steps) / 2:,.0f}"


def test_normflows(tmp_path):
    pytest.importorskip("normflows")
    options = ("--steps", "2", *CANCER, "--flows", "Glow", "i-ResNet")
    output = run("comparison.py", "--out", tmp_path, *options)
    assert output.count("is an estimate for i-ResNet.") == 1


@pytest.fixture
def files(example):
    return example("files")


def test_uci(files, tmp_path):
    rng = np.random.default_rng(0)
    n = 1000
    whole, real, constant = rng.integers(0, 5, n), rng.standard_normal(n), np.full(n, 3.0)
    np.savez(tmp_path / "uci.npz", protein=np.stack((whole * 2.0, constant, real), axis=1))
    data = files.uci("protein", tmp_path)
    assert [len(part) for part in data[:3]] == [600, 200, 200]
    table = data.restore(torch.cat(data[:3])).double().numpy()
    assert table.shape == (n, 2)  # without the constant column
    assert np.array_equal(np.sort(table[:, 0] // 2), np.sort(whole))  # noise as wide as a step
    assert len(np.unique(table[:, 0])) == n
    assert np.allclose(np.sort(table[:, 1]), np.sort(real), atol=1e-5)
    assert torch.equal(data.train, files.uci("protein", tmp_path).train)
    with pytest.raises(ValueError, match=r"should hold the arrays magic, but it has no magic"):
        files.uci("magic", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'uci\.npz' in .*'--data-root'"):
        files.uci("magic", tmp_path / "nowhere")


def test_bsds300(files, tmp_path):
    rng = np.random.default_rng(0)
    parts = {
        name: rng.integers(0, 256, (n, 64), np.uint8)
        for name, n in (("train", 50), ("validation", 5), ("test", 9))
    }
    np.savez(tmp_path / "bsds300.npz", **parts)
    data = files.bsds300(tmp_path)
    for part, pixels in zip(data, parts.values(), strict=False):
        assert part.shape == (len(pixels), 63)
        grey = data.restore(part).double().numpy() * 256
        centered = pixels - pixels.mean(axis=1, keepdims=True)
        assert np.abs(grey - centered[:, :-1]).max() < 1.01
