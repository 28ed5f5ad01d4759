"""The readers of the original files of MNIST and CIFAR-10."""

import gzip
import os
import pickle
import struct

import numpy as np
import pytest


def write_mnist(folder, suffix):
    sizes = {"train": 10_007, "t10k": 5}
    arrays = {}
    for name, n in sizes.items():
        arrays[name] = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        raw = bytes([0, 0, 8, 3]) + np.array([n, 28, 28], ">u4").tobytes() + arrays[name].tobytes()
        path = folder / f"{name}-images-idx3-ubyte{suffix}"
        path.write_bytes(gzip.compress(raw, 1) if suffix else raw)
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist(example, tmp_path, suffix):
    arrays = write_mnist(tmp_path, suffix)
    train, validation, test = example("files").mnist(tmp_path)
    assert np.array_equal(np.concatenate((train, validation))[:, 0], arrays["train"])
    assert np.array_equal(test[:, 0], arrays["t10k"])
    assert len(validation) == 10_000

    (tmp_path / f"t10k-images-idx3-ubyte{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=r"'t10k-images-idx3-ubyte' or .*'--data-root'"):
        example("files").mnist(tmp_path)


def test_mnist_as_arrays(example, tmp_path):
    # Sorted, as the digits are in some files.
    arrays = np.arange(20_000, dtype=np.uint16).repeat(28 * 28).reshape(-1, 28, 28)
    np.savez(tmp_path / "mnist.npz", train_x=arrays[:-50], test_x=arrays[-50:])
    train, validation, test = (x[:, 0, 0, 0] for x in example("files").mnist(tmp_path))
    assert (len(validation), len(test)) == (10_000, 50)
    assert np.array_equal(np.sort(np.concatenate((train, validation))), np.arange(19_950))
    assert np.array_equal(np.sort(test), np.arange(19_950, 20_000))
    for part in (validation, test):
        assert part.min() < np.median(part) < part.max()
        assert not (np.diff(part.astype(int)) > 0).all()
    assert np.median(validation) < 15_000  # and not the last rows alone


@pytest.mark.parametrize(
    "raw", [b"", b"\0\0\x08\x03", b"\0\0\x08\x01\0\0\0\3ab", b"\0\0\x0d\1\0\0\0\0"]
)
def test_a_damaged_idx_file(example, tmp_path, raw):
    path = tmp_path / "idx"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"idx' should be an idx file"):
        example("files").read_idx(path)


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 does, with which the batches of CIFAR-10 were written."""

    def save_string(self, value):
        value = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    dispatch = pickle._Pickler.dispatch | {str: save_string, bytes: save_string}


def test_cifar10(example, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (4, 3072), dtype=np.uint8) for _ in names]
    for name, array in zip(names, arrays, strict=True):
        with (folder / name).open("wb") as file:
            Python2Pickler(file, protocol=2).dump({"data": array, "labels": [1] * 4})
    train, validation, test = example("files").cifar10(tmp_path)
    assert np.array_equal(
        np.concatenate((train, validation)).reshape(20, -1), np.vstack(arrays[:5])
    )
    assert train.shape == (18, 3, 32, 32)
    assert np.array_equal(test.reshape(4, -1), arrays[5])


def test_a_batch_cannot_run_anything(example, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    path = tmp_path / "test_batch"
    path.write_bytes(pickle.dumps({b"data": Attack()}))
    with pytest.raises(
        pickle.UnpicklingError, match=r"arrays only, got a call of '(posix|nt)\.mkdir'"
    ):
        example("files").read_batch(path)
    assert not (tmp_path / "attacked").exists()
