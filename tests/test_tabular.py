"""Table 3: the archive of Papamakarios et al. (2017), in small files of the same formats."""

import hashlib
import io
import json
import tarfile
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from statistics import mean

import numpy as np
import pytest
from test_examples import rows, run


@pytest.fixture
def tabular(example):
    return example("tabular")


@pytest.fixture
def archives(example):
    return example("archive")


def pack(folder, **files):
    """Writes an archive, and returns its path and checksum."""
    path = folder / "data.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"data/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path, hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def npy(array):
    np.save(buffer := io.BytesIO(), array)
    return buffer.getvalue()


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    path, md5 = pack(folder, **{"power/data.npy": npy(np.zeros((3, 9)))})
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/data.tar.gz", md5, path.read_bytes()
        server.shutdown()


def test_download(archives, server, tmp_path):
    url, md5, content = server
    path = tmp_path / "new" / "data.tar.gz"
    with pytest.raises(ValueError, match=f"should have the MD5 checksum 0, got {md5}"):
        archives.download(path, url, "0")
    assert not path.exists()
    archives.download(path, url, md5)
    assert path.read_bytes() == content
    archives.download(path, "http://127.0.0.1:1/", md5)  # it is there


def test_archive_refuses_what_was_not_published(archives, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There should be 'data\.tar\.gz' in"):
        archives.Archive(tmp_path / "data.tar.gz")
    path, md5 = pack(tmp_path, a=b"")
    with pytest.raises(ValueError, match="damaged or another file"):
        archives.Archive(path)
    with pytest.raises(FileNotFoundError, match=r"There should be 'power/data\.npy' in"):
        archives.power(archives.Archive(path, md5))


def test_power(archives, tmp_path):
    table = np.arange(900.0).reshape(100, 9)[:, :8]
    archive = archives.Archive(*pack(tmp_path, **{"power/data.npy": npy(table)}))
    parts = archives.power(archive)
    assert [part.shape for part in parts] == [(81, 6), (9, 6), (10, 6)]
    seen = np.vstack(parts[:2])
    assert np.allclose(seen.mean(axis=0), 0)
    assert np.allclose(seen.std(axis=0), 1)
    # All columns of a row grow alike, so that any two stay in step, but for the noise.
    assert np.allclose(parts[0][:, 0], parts[0][:, -1], atol=1e-2)
    assert all(np.array_equal(a, b) for a, b in zip(parts, archives.power(archive), strict=True))


def test_gas_drops_sensors_that_repeat_others(archives, tmp_path):
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 200))
    table = pd.DataFrame({"Time": a, "Meth": a, "Eth": a, "A": a, "B": b, "C": a + 1e-3 * b})
    table.to_pickle(buffer := io.BytesIO())
    archive = archives.Archive(*pack(tmp_path, **{"gas/ethylene_CO.pickle": buffer.getvalue()}))
    parts = archives.gas(archive)
    assert [part.shape for part in parts] == [(162, 2), (18, 2), (20, 2)]
    rest = np.vstack(parts)
    assert np.allclose(rest[:, 0], (b - b.mean()) / b.std(ddof=1))  # A went, as C repeats it


def test_hepmass_keeps_the_signal(archives, tmp_path):
    pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    train = np.column_stack((np.arange(60) % 2, rng.normal(size=60), np.zeros(60)))
    test = np.column_stack((np.arange(20) % 2, rng.normal(size=20), np.zeros(20), np.ones(20)))
    files = {}
    for name, table in (("train", train), ("test", test)):
        header = ",".join(map(str, range(table.shape[1])))
        np.savetxt(buffer := io.BytesIO(), table, delimiter=",", header=header, comments="")
        files[f"hepmass/1000_{name}.csv"] = buffer.getvalue()
    with np.errstate(invalid="ignore"):  # the constant column, before it is dropped
        parts = archives.hepmass(archives.Archive(*pack(tmp_path, **files)))
    assert [part.shape for part in parts] == [(27, 1), (3, 1), (10, 1)]
    signal = train[1::2, 1]
    assert np.allclose(parts[2][:, 0], (test[1::2, 1] - signal.mean()) / signal.std())


def test_miniboone_and_the_check_of_shapes(tabular, archives, tmp_path):
    table = np.random.default_rng(0).normal(3.0, 2.0, size=(50, 43))
    archive = archives.Archive(*pack(tmp_path, **{"miniboone/data.npy": npy(table)}))
    parts = archives.miniboone(archive)
    assert [len(part) for part in parts] == [41, 4, 5]
    preset = tabular.PRESETS["MINIBOONE"]
    with pytest.raises(ValueError, match=r"should have shapes .*29556.* got .*41, 43"):
        preset.load(archive)
    assert len(preset._replace(rows=(41, 4, 5)).load(archive)) == 3


def test_bsds300(archives, tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(buffer := io.BytesIO(), "w") as file:
        for i, part in enumerate(("train", "validation", "test")):
            file[part] = np.full((i + 1, 63), i)
    archive = archives.Archive(*pack(tmp_path, **{"BSDS300/BSDS300.hdf5": buffer.getvalue()}))
    parts = archives.bsds300(archive)
    assert [part.shape for part in parts] == [(1, 63), (2, 63), (3, 63)]
    assert (parts[2] == 2).all()


@pytest.mark.parametrize("budget", [("--steps", "1"), ("--seconds", "0.1")])
def test_script_on_data_that_is_there(tmp_path, budget):
    options = ("--data", "breast cancer", "--flows", "Sinusoidal", "MAF", "--hidden", "8")
    table = rows(run("tabular.py", "--out", tmp_path, *options, *budget))
    results = json.loads((tmp_path / "tabular.json").read_text())
    assert [*results] == ["breast cancer, Sinusoidal", "breast cancer, MAF"]
    for name, result in results.items():
        assert table[name][0] == "{score:.2f} ± {error:.2f}".format(**result)
        assert budget[0] != "--steps" or table[name][2] == "1"
    assert results["breast cancer, MAF"]["passes"] == []  # zuko's inverse is not this package's
    taken = results["breast cancer, Sinusoidal"]["passes"]
    assert table["breast cancer, Sinusoidal"][4] == f"{mean(taken):.1f}, at most {max(taken)}"


def test_a_finished_fit_keeps_its_time(tmp_path):
    options = ("--out", tmp_path, "--data", "breast cancer", "--flows", "MAF", "--hidden", "8")
    seconds = []
    for _ in range(2):
        run("tabular.py", *options, "--steps", "1")
        results = json.loads((tmp_path / "tabular.json").read_text())
        seconds.append(results["breast cancer, MAF"]["seconds"])
    assert seconds[0] == seconds[1] > 0


def test_a_checkpoint_of_another_budget_is_not_taken_for_this_one(tmp_path):
    options = ("--out", tmp_path, "--data", "breast cancer", "--flows", "MAF", "--hidden", "8")
    run("tabular.py", *options, "--steps", "1")
    with pytest.raises(AssertionError, match=r"should have the budget .*'steps': 2"):
        run("tabular.py", *options, "--steps", "2")


def test_rebuilt_patches_are_scored_in_their_own_units(tabular, tmp_path):
    rng = np.random.default_rng(0)
    parts = {"train": 5000, "validation": 10, "test": 20}
    pixels = {name: rng.integers(0, 256, (n, 64), np.uint8) for name, n in parts.items()}
    np.savez(tmp_path / "bsds300.npz", **pixels)
    data, _, unit = tabular.load("BSDS300, rebuilt", None, tmp_path)
    assert [len(part) for part in data[:3]] == [*parts.values()]
    # Uniform noise between 0 and 1 less the mean of 64 pixels.
    assert float(unit) == pytest.approx(63 / 2 * np.log(1 / 12 * 63 / 64), rel=0.01)
