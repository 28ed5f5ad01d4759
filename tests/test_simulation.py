"""The recipe for simulation-based inference runs with the clients that are installed."""

import json

import pytest
from test_examples import rows, run


@pytest.mark.parametrize("client", ["lampe", "sbi"])
def test_simulation(tmp_path, client):
    pytest.importorskip(client)
    options = ("--steps", "3", "--simulations", "100", "--batch", "50", "--tests", "10")
    table = rows(run("simulation.py", "--out", tmp_path, "--client", client, *options))
    results = json.loads((tmp_path / "simulation.json").read_text())
    assert len(results) == 6
    for name, r in results.items():
        assert table[name] == [f"{r['score']:.2f} ± {r['error']:.2f}", f"{r['calibration']:.3f}"]
        assert 0 < r["calibration"] < 1
        assert r["error"] > 0
    assert (tmp_path / "coverage.png").read_bytes().startswith(b"\x89PNG")
