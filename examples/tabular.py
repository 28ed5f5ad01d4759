"""Table 3 of the paper (Wei, 2021): the five data sets of Papamakarios et al. (2017).

They are read from 'data.tar.gz' of Zenodo record 1161203, in the folder '--data-root', where
'--download' puts it. With '--data patches' or '--data "breast cancer"', the same flow is fitted to
data that scikit-learn ships. Scores are negative log-likelihoods of the test rows, in nats, in the
units of the published preprocessing. A run that was interrupted goes on from there, if it is
started again with the same options.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.request import urlopen

import numpy as np
import torch
from data import Data, breast_cancer, patches, standardise
from torch import Tensor
from tqdm import tqdm
from training import Budget, arguments, count, evaluate, fit, print_table

from pyro_sinflow import SinusoidalFlow

URL = "https://zenodo.org/records/1161203/files/data.tar.gz"
MD5 = "9b9c9b0375315ad270eba4ce80c093ab"
CHUNK = 2**20

Parts = list[np.ndarray]  # to train, validate and test


def check_md5(path: Path, md5: str) -> None:
    """Requires that a file is the one that was published.

    Raises:
        ValueError: If its checksum is another.
    """
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != md5:
        raise ValueError(
            f"'{path}' should have the MD5 checksum {md5}, got {digest.hexdigest()}: it is damaged "
            "or another file. Delete it, and get it anew."
        )


def download(path: Path, url: str = URL, md5: str = MD5) -> None:
    """Gets the archive, unless it is there; the file appears when it is complete and checked.

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
    """The published archive, from which files are read without being unpacked.

    Args:
        path: The path of the archive.
        md5: Its checksum, which is verified: one of its files is a pickle, which may be read only
            if it is known where it comes from.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If its checksum is wrong.
    """

    def __init__(self, path: Path, md5: str = MD5) -> None:
        if not path.exists():
            raise FileNotFoundError(
                f"There should be 'data.tar.gz' in '{path.parent}': get it from {URL}, or with "
                "'--download', and name its folder in '--data-root'. Without it, "
                "'--data patches' runs on data that is there."
            )
        check_md5(path, md5)
        self.path = path

    def read(self, name: str) -> IO[bytes]:
        """Returns the content of the file whose path ends so.

        Raises:
            FileNotFoundError: If there is none.
        """
        with tarfile.open(self.path) as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(f"/{name}"):
                    file = archive.extractfile(member)
                    assert file is not None  # as it is a file
                    return io.BytesIO(file.read())
        raise FileNotFoundError(f"There should be '{name}' in '{self.path}'.")


def split(rows: np.ndarray) -> Parts:
    """Takes the last tenth to test, and of the others the last tenth to validate."""
    rest, test = np.split(rows, [len(rows) - len(rows) // 10])
    return [*np.split(rest, [len(rest) - len(rest) // 10]), test]


def normalise(parts: Parts, reference: np.ndarray) -> Parts:
    """Brings each column of the reference to mean 0 and standard deviation 1."""
    mean, std = reference.mean(axis=0), reference.std(axis=0)
    return [(part - mean) / std for part in parts]


def power(archive: Archive) -> Parts:
    """Electric power of a household: active power, voltage, three meters and the time of day.

    Date and reactive power are gone, and noise fills the gaps between recorded values.
    """
    rng = np.random.RandomState(42)
    rows = np.load(archive.read("power/data.npy"))
    rng.shuffle(rows)
    rows = np.delete(rows, [1, 3], axis=1)
    voltage, active = 0.01 * rng.rand(len(rows), 1), 0.001 * rng.rand(len(rows), 1)
    meters, clock = rng.rand(len(rows), 3), np.zeros((len(rows), 1))
    parts = split(rows + np.hstack((active, voltage, meters, clock)))
    return normalise(parts, np.vstack(parts[:2]))


def gas(archive: Archive) -> Parts:
    """Chemical sensors, of which those that repeat another are left out."""
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
    """Collisions of particles: the signal, without features that repeat one value."""
    import pandas as pd

    train, test = (
        pd.read_csv(archive.read(f"hepmass/1000_{part}.csv"), index_col=False).to_numpy()
        for part in ("train", "test")
    )
    train, test = train[train[:, 0] == 1, 1:], test[test[:, 0] == 1, 1:-1]
    kept = [i for i, column in enumerate(train.T) if Counter(column)[column.min()] <= 5]
    train, test = (normalise([part], train)[0][:, kept] for part in (train, test))
    return [*np.split(train, [len(train) - len(train) // 10]), test]


def miniboone(archive: Archive) -> Parts:
    """Neutrinos: electron against muon, with outliers already removed."""
    parts = split(np.load(archive.read("miniboone/data.npy")))
    return normalise(parts, np.vstack(parts[:2]))


def bsds300(archive: Archive) -> Parts:
    """Patches of photographs, of 8 by 8 pixels without their mean and the last one."""
    import h5py

    with h5py.File(archive.read("BSDS300/BSDS300.hdf5")) as file:
        return [file[part][:] for part in ("train", "validation", "test")]


class Preset(NamedTuple):
    """A data set, its published shape, and the paper's options for it."""

    read: Callable[[Archive], Parts]
    features: int
    rows: tuple[int, int, int]
    hidden: int
    dropout: float
    budget: Budget

    def load(self, archive: Archive) -> Parts:
        """Reads the data set, and checks its shape.

        Raises:
            ValueError: If the shape is not the published one.
        """
        parts = self.read(archive)
        given = [part.shape for part in parts]
        expected = [(n, self.features) for n in self.rows]
        if given != expected:
            raise ValueError(f"The data should have shapes {expected}, got {given}.")
        return parts


# Every learning rate falls along a cosine here; the paper's falls exponentially for GAS and
# HEPMASS.
PRESETS = {
    "POWER": Preset(
        power, 6, (1_659_917, 184_435, 204_928), 256, 0.0, Budget(1_200_000, 512, 5e-4, every=5000)
    ),
    "GAS": Preset(
        gas, 8, (852_174, 94_685, 105_206), 256, 0.0, Budget(2_000_000, 128, 1e-3, 1e-5, every=5000)
    ),
    "HEPMASS": Preset(
        hepmass,
        21,
        (315_123, 35_013, 174_987),
        512,
        0.0,
        Budget(1_000_000, 128, 1e-3, 5e-4, every=5000),
    ),
    "MINIBOONE": Preset(
        miniboone, 43, (29_556, 3_284, 3_648), 256, 0.3, Budget(125_000, 128, 5e-4, 1e-3, every=500)
    ),
    "BSDS300": Preset(
        bsds300, 63, (1_000_000, 50_000, 250_000), 512, 0.1, Budget(400_000, 512, 5e-4, every=5000)
    ),
}
SHIPPED: dict[str, Callable[[], Data]] = {"patches": patches, "breast cancer": breast_cancer}


def main(argv: Sequence[str] | None = None) -> None:
    """Fits the flow, and prints the table."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--data", nargs="+", choices=[*PRESETS, *SHIPPED], default=[*PRESETS], help="data sets"
    )
    parser.add_argument(
        "--data-root", type=Path, default=Path("data"), help="folder of the archive"
    )
    parser.add_argument("--download", action="store_true", help="get the archive first")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of the optimiser (default: the paper's)")
    parser.add_argument("--scale", action="store_true", help="blocks that scale as well as shift")
    args = parser.parse_args(argv)

    published = [name for name in args.data if name in PRESETS]
    if published:
        path = args.data_root / "data.tar.gz"
        if args.download:
            download(path)
        archive = Archive(path)
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for name in args.data:
        # Data that is not the paper's takes the options of its own patches, for a few steps.
        preset = PRESETS.get(name, PRESETS["BSDS300"])
        budget = preset.budget
        if name in PRESETS:
            data = standardise(*preset.load(archive))
            unit: Tensor | float = data.std.log().sum()
        else:
            data, unit = SHIPPED[name](), 0.0
            budget = Budget(1000, 128, 1e-3)
        budget = replace(budget, steps=args.steps or budget.steps)
        torch.manual_seed(args.seed)
        flow = SinusoidalFlow(
            data.train.shape[1],
            transforms=12,
            hidden_features=(preset.hidden, preset.hidden),
            dropout=preset.dropout,
            scale=args.scale,
        )
        said = f"{name}{', scale' if args.scale else ''}"
        flow = fit(said, flow, data, budget, args.out / f"{said}, seed {args.seed}.pt")
        score, error = evaluate(flow, data.test)
        results[name] = {
            "NLL": float(unit) - score,
            "error": error,
            "parameters": count(flow),
            "steps": budget.steps,
        }
        (args.out / "tabular.json").write_text(json.dumps(results, indent=2))
    print_table(
        ("data", "test NLL", "parameters", "steps"),
        [
            [name, f"{r['NLL']:.2f} ± {r['error']:.2f}", f"{r['parameters']:,}", f"{r['steps']:,}"]
            for name, r in results.items()
        ],
    )
    print("\nWritten to", args.out)


if __name__ == "__main__":
    main()
