"""The example scripts run, with a budget too small to learn anything."""

import os
import re
import subprocess
import sys
from pathlib import Path

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
