"""The archive of the data sets of Papamakarios et al. (2017), and how each is prepared."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections import Counter
from pathlib import Path
from typing import IO
from urllib.request import urlopen

import numpy as np
from tqdm import tqdm

URL = "https://zenodo.org/records/1161203/files/data.tar.gz"
MD5 = "9b9c9b0375315ad270eba4ce80c093ab"
CHUNK = 2**20

Parts = list[np.ndarray]  # to train, validate and test


def check_md5(path: Path, md5: str) -> None:
    """Requires that a file has the published checksum.

    Raises:
        ValueError: If it has another.
    """
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != md5:
        raise ValueError(
            f"'{path}' should have the MD5 checksum {md5}, got {digest.hexdigest()}: it is damaged "
            "or another file. Delete it, and download it again."
        )


def download(path: Path, url: str = URL, md5: str = MD5) -> None:
    """Downloads the archive, unless it exists. A partial file has another name.

    Raises:
        ValueError: If the checksum is wrong.
        OSError: If the server cannot be reached.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with urlopen(url, timeout=60) as response, partial.open("wb") as file:
        size = int(response.headers.get("Content-Length", 0)) or None
        with tqdm(desc=path.name, total=size, unit="B", unit_scale=True) as bar:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    check_md5(partial, md5)
    partial.replace(path)


class Archive:
    """The published archive. Its files are read without unpacking it.

    Args:
        path: The path of the archive.
        md5: Its checksum. It is verified because one of the files is a pickle, which is safe to
            read only from a known source.

    Raises:
        FileNotFoundError: If the archive does not exist.
        ValueError: If its checksum is wrong.
    """

    def __init__(self, path: Path, md5: str = MD5) -> None:
        if not path.exists():
            raise FileNotFoundError(
                f"There should be 'data.tar.gz' in '{path.parent}': download it from {URL}, or "
                "with '--download', and pass its folder as '--data-root'. '--data patches' needs "
                "no archive."
            )
        check_md5(path, md5)
        self.path = path

    def read(self, name: str) -> IO[bytes]:
        """Returns the content of the file whose path ends with a name.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        with tarfile.open(self.path) as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(f"/{name}"):
                    file = archive.extractfile(member)
                    assert file is not None  # as it is a file
                    return io.BytesIO(file.read())
        raise FileNotFoundError(f"There should be '{name}' in '{self.path}'.")


def split(rows: np.ndarray) -> Parts:
    """Takes the last tenth for testing, and the last tenth of the rest for validation."""
    rest, test = np.split(rows, [len(rows) - len(rows) // 10])
    return [*np.split(rest, [len(rest) - len(rest) // 10]), test]


def normalize(parts: Parts, reference: np.ndarray) -> Parts:
    """Standardizes columns by the mean and standard deviation of the reference."""
    mean, std = reference.mean(axis=0), reference.std(axis=0)
    return [(part - mean) / std for part in parts]


def power(archive: Archive) -> Parts:
    """Electric power of a household: active power, voltage, three meters and the time of day.

    Date and reactive power are dropped. Uniform noise is added to the discrete values.
    """
    rng = np.random.RandomState(42)
    rows = np.load(archive.read("power/data.npy"))
    rng.shuffle(rows)
    rows = np.delete(rows, [1, 3], axis=1)
    voltage, active = 0.01 * rng.rand(len(rows), 1), 0.001 * rng.rand(len(rows), 1)
    meters, clock = rng.rand(len(rows), 3), np.zeros((len(rows), 1))
    parts = split(rows + np.hstack((active, voltage, meters, clock)))
    return normalize(parts, np.vstack(parts[:2]))


def gas(archive: Archive) -> Parts:
    """Chemical sensors. Sensors that are correlated with others are dropped."""
    import pandas as pd

    table = pd.read_pickle(archive.read("gas/ethylene_CO.pickle"))
    table = table.drop(columns=["Meth", "Eth", "Time"])
    while True:
        alike = (table.corr() > 0.98).sum().to_numpy() > 1
        if not alike.any():
            break
        table = table.drop(columns=table.columns[alike.argmax()])
    return split(((table - table.mean()) / table.std()).to_numpy())


def hepmass(archive: Archive) -> Parts:
    """Collisions of particles: the signal, without features that often repeat a value."""
    import pandas as pd

    train, test = (
        pd.read_csv(archive.read(f"hepmass/1000_{part}.csv"), index_col=False).to_numpy()
        for part in ("train", "test")
    )
    train, test = train[train[:, 0] == 1, 1:], test[test[:, 0] == 1, 1:-1]
    kept = [i for i, column in enumerate(train.T) if Counter(column)[column.min()] <= 5]
    train, test = (normalize([part], train)[0][:, kept] for part in (train, test))
    return [*np.split(train, [len(train) - len(train) // 10]), test]


def miniboone(archive: Archive) -> Parts:
    """Neutrinos: electron and muon events. Outliers have already been removed."""
    parts = split(np.load(archive.read("miniboone/data.npy")))
    return normalize(parts, np.vstack(parts[:2]))


def bsds300(archive: Archive) -> Parts:
    """Patches of photographs: 8 × 8 pixels, without their mean and the last pixel."""
    import h5py

    with h5py.File(archive.read("BSDS300/BSDS300.hdf5")) as file:
        return [file[part][:] for part in ("train", "validation", "test")]
