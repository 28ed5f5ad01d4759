"""Several processes fit the flow that one fits, and survive the loss of one of them."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import EXAMPLES
from test_examples import run

OPTIONS = ("--steps", "6", "--batch", "32", "--every", "2", "--samples", "7", "--timeout", "20")


def launch(out, *options):
    """Runs the example in two processes, again if gloo fails to connect them or hangs."""
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3")
    address = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")
    address += ("--local-addr", "127.0.0.1")
    script = (EXAMPLES / "distributed.py", "--out", out, *options)
    for _ in range(3):
        shutil.rmtree(out, ignore_errors=True)
        with subprocess.Popen(
            [sys.executable, *torchrun, *address, *script],
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                _, errors = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:  # gloo does not keep its own timeout
                os.killpg(process.pid, signal.SIGKILL)
                continue
        if process.returncode == 0:
            return errors
        assert "connectFullMesh failed" in errors, errors
    pytest.fail("The processes did not connect.")


def results(out):
    return json.loads((out / "losses.json").read_text()), torch.load(out / "samples.pt")


def test_two_processes_fit_what_one_fits(tmp_path):
    run("distributed.py", "--out", tmp_path / "one", *OPTIONS)
    losses, one = results(tmp_path / "one")
    launch(tmp_path / "two", *OPTIONS)
    in_two, two = results(tmp_path / "two")
    assert in_two == pytest.approx(losses, rel=1e-5)
    assert one.shape == two.shape == (7, 63)
    assert len(two.unique(dim=0)) == 7  # shares come from seeds of their own


@pytest.mark.slow
def test_lost_process(tmp_path):
    launch(tmp_path / "whole", *OPTIONS)
    # At its fifth step, a process is killed: all start anew, from the checkpoint after four.
    message = launch(tmp_path / "killed", *OPTIONS, "--fail-at", "4")
    assert "exitcode: -9" in message
    (losses, samples), (again, drawn) = results(tmp_path / "whole"), results(tmp_path / "killed")
    assert again == losses
    assert torch.equal(samples, drawn)
