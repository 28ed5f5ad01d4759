"""The scripts of the page of examples run, and their tables hold what they say."""

import json

import pytest
from test_examples import rows, run


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_hierarchical_regression(tmp_path):
    options = ("--steps", "3", "--draws", "50", "--nuts", "6")
    table = rows(run("hierarchical.py", "--out", tmp_path, *options))
    results = json.loads((tmp_path / "hierarchical.json").read_text())
    assert len(results) == 4
    for guide, r in results.items():
        elbo = f"{r['elbo']:.2f} ± {r['error']:.2f}"
        assert table[guide] == [elbo, f"{r['mean']:.2f}", f"{r['std']:.0%}"]
        assert r["error"] > 0
    assert is_picture(tmp_path / "hierarchical.png")


def test_funnel(tmp_path):
    table = rows(run("funnel.py", "--out", tmp_path, "--steps", "3", "--draws", "8"))
    results = json.loads((tmp_path / "funnel.json").read_text())
    assert table["NUTS"][-1] == "1.00"
    assert len(results) == 4
    for name, r in results.items():
        assert r["gradients"] >= 8  # each draw takes at least one
        assert table[name][3] == f"{1000 * r['size'] / r['gradients']:.1f}"
    assert is_picture(tmp_path / "funnel.png")


def test_vae(tmp_path):
    table = rows(run("vae.py", "--out", tmp_path, "--steps", "2", "--draws", "4"))
    results = json.loads((tmp_path / "vae.json").read_text())
    assert table["normal"][-1] == "+0.00 ± 0.00"
    for prior, r in results.items():
        assert table[prior][:2] == [f"{r['elbo']:.2f}", f"{r['evidence']:.2f}"]
        assert r["evidence"] > r["elbo"]  # by Jensen's inequality
    assert is_picture(tmp_path / "vae.png")


def test_ablation(tmp_path):
    options = ("--steps", "2", "--seeds", "2", "--data", "breast cancer", "--conditioners")
    change = ("--changes", "no affine map", "scales in L and U", "the paper, literally")
    name = "the paper's LDU blocks"
    table = rows(run("ablation.py", "--out", tmp_path, *options, name, *change))
    scores = json.loads((tmp_path / "ablation.json").read_text())[name]
    assert [*scores] == ["no change", *change[1:]]
    for name in change[1:]:
        first, second = (
            b - a
            for a, b in zip(
                scores["no change"]["breast cancer"], scores[name]["breast cancer"], strict=True
            )
        )
        cell, time = table[name]
        assert cell == f"{(first + second) / 2:+.2f} ± {abs(first - second) / 2:.2f}"
        assert float(time) > 0


def test_reconstruction(tmp_path):
    table = rows(run("reconstruction.py", "--out", tmp_path, "--steps", "1", "--images", "4"))
    results = json.loads((tmp_path / "reconstruction.json").read_text())
    for found in results.values():
        distances = [r["distance"] for r in found["iterations"]]
        assert distances[-1] < 1e-4 < distances[0]
    assert float(table["1e-06"][-1]) == pytest.approx(
        results["default"]["tolerance"][-1]["distance"], rel=0.1
    )
    assert is_picture(tmp_path / "reconstruction.png")
    assert is_picture(tmp_path / "reconstructed.png")


@pytest.mark.parametrize("script", ["funnel", "hierarchical", "images", "vae"])
@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_bad_numbers_are_named(script, value, tmp_path, example, capsys):
    with pytest.raises(SystemExit):
        example(script).main(["--out", str(tmp_path), "--steps", value])
    expected = f"argument --steps: should be an integer of at least 1, got {value}"
    assert expected in capsys.readouterr().err
