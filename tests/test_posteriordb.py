"""The posteriors of posteriordb: their files, a solver, and the comparison of guides."""

import json
import re
import zipfile

import numpy as np
import torch
from test_examples import run

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
    for guide in ("AutoLDU", "AutoIAFNormal", "AutoMultivariateNormal"):
        cells = [line.split("|") for line in output.splitlines() if f"| {guide} " in line]
        elbos = [c[3] for c in cells if "eight schools" in c[1]]
        assert len(elbos) == 2  # for equal steps, and for equal time
        assert all(re.fullmatch(r" -[\d.]+ ± [\d.]+ *", elbo) for elbo in elbos)
    assert "NeuTra, AutoLDU" in output
    assert (tmp_path / "out" / "posteriordb.png").exists()
    assert (
        len([*(tmp_path / "out" / "fits").glob("*.json")]) == 2 * 3 * 4 + 1
    )  # each with three rates, and one for the second seed
    again = run("posteriordb.py", *options, *budget)  # from the files
    assert [row for row in again.splitlines() if row.startswith("| eight")] == [
        row for row in output.splitlines() if row.startswith("| eight")
    ]


def test_a_posterior_is_read_from_either_format(example, tmp_path):
    posteriors = example("posteriors")
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


def test_lotka_volterra_is_solved(example):
    """The quantity that the equations conserve, and the solver of half the step."""
    posteriors = example("posteriors")
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


def test_a_fit_that_failed_has_a_row_of_the_table(example):
    posteriordb = example("posteriordb")
    pairs = {key: [0.1, 0.1] for key in ("means", "log stds")}
    fit = {"elbo": -1.0, "error": 0.1, "k": 0.3, "effective per second": 9.0, **pairs}
    cells = posteriordb.cells([fit, {"failed": "NaN"}])
    assert cells[0] == "1 of 2 failed"
    assert len(cells) == len(posteriordb.cells([fit, fit]))
