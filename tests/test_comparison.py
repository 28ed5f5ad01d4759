"""The comparison of flows runs, and its tables hold what they say."""

import json

import pytest
from test_examples import rows, run

FLOWS = ("Sinusoidal, scale", "MAF", "B-NAF")


def test_comparison(tmp_path):
    options = ("--steps", "2", "--data", "breast cancer", "--flows", *FLOWS)
    table = rows(run("comparison.py", "--out", tmp_path, *options))
    results = json.loads((tmp_path / "comparison.json").read_text())["breast cancer"]
    for flow in FLOWS:
        assert table[flow][0] == "{NLL:.2f} ± {error:.2f}".format(**results[flow])
        assert results[flow]["error"] > 0
        assert table[flow][-1] == "exact"
    assert table["MAF"][3] == "1.0"
    assert table["B-NAF"][4] == "none"
    assert 0 <= results["MAF"]["round trip"] < 1e-4


def test_the_same_time_for_each_flow(tmp_path):
    options = ("--seconds", "0.5", "--data", "breast cancer", "--flows", "Sinusoidal, scale", "MAF")
    table = rows(run("comparison.py", "--out", tmp_path, *options))
    assert int(table["Sinusoidal, scale"][1]) > 0
    assert rows(run("comparison.py", "--out", tmp_path, *options))["MAF"][1] == table["MAF"][1]


def test_normflows(tmp_path):
    pytest.importorskip("normflows")
    options = ("--steps", "2", "--data", "breast cancer", "--flows", "Glow", "i-ResNet")
    table = rows(run("comparison.py", "--out", tmp_path, *options))
    assert table["Glow"][-1] == "exact"
    assert table["i-ResNet"][-1] == "estimated"
