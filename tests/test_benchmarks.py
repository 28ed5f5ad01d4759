"""Benchmarks run, at small sizes where they measure times, and counts are within their aims."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import EXAMPLES
from test_examples import rows

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.mark.parametrize("data", ["patches of BSDS300", "synthetic rows"])
@pytest.mark.filterwarnings("ignore::pyro_sinflow.InversionWarning")
def test_gpu(tmp_path, data, capsys, monkeypatch):
    options = ["--quick", "--steps", "2"]
    if data != "synthetic rows":
        pixels = np.random.default_rng(0).integers(0, 256, (50, 64), dtype=np.uint8)
        np.savez(tmp_path / "bsds300.npz", train=pixels)
        options += ["--data-root", str(tmp_path)]
    monkeypatch.syspath_prepend(EXAMPLES)  # which also undoes what the script does to the path
    runpy.run_path(str(BENCHMARKS / "gpu.py"))["main"](options)

    output = capsys.readouterr().out
    assert f"trained for 2 steps on {data}." in output
    table = rows(output)
    assert table.pop("what") == ["measured", "aim"]
    assert len(table) == 2 * 4 + 3 * 4 + 2 * 4
    for start, count in (("gradient of LDU", 8), ("6 samples of", 10), ("16 samples of", 10)):
        assert sum(what.startswith(start) for what in table) == count
    for measured, _ in table.values():
        assert measured == "needs a GPU" or float(measured) > 0


def test_speed():
    """Those benchmarks that need no training, and all flows of the others."""
    script = BENCHMARKS / "bench_speed.py"
    chosen = (
        "-k",
        "floor or eager or four_sinusoids",
        "--benchmark-disable",
        "-p",
        "no:cacheprovider",
    )
    process = subprocess.run(
        [sys.executable, "-m", "pytest", script, "-o", "python_files=bench_*.py", "-q", *chosen],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert re.search(r"^6 passed", process.stdout, re.MULTILINE), process.stdout
    for make in runpy.run_path(str(script))["FLOWS"].values():
        make()


def test_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    options = ["--data", "breast cancer", "--flows", "MAF", "--steps", "2", "--rows", "3"]
    runpy.run_path(str(BENCHMARKS / "rows.py"))["main"](["--out", str(tmp_path), *options])
    table = rows(capsys.readouterr().out)
    assert table.pop("data, flow") == ["mean of rows", "slowest row", "could be saved"]
    ((of_row, of_batch, *_),) = table.values()
    assert 1 <= float(of_row) <= float(of_batch) <= 9


def test_counts_of_calls_are_within_their_aims():
    for what, count, aim in runpy.run_path(str(BENCHMARKS / "calls.py"))["count_calls"]():
        assert count > 0
        if aim and not what.startswith("lines"):
            assert count <= aim, what
