"""Data sets that come with scikit-learn, and synthetic ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.datasets import (
    load_breast_cancer,
    load_digits,
    load_sample_images,
    make_circles,
    make_moons,
    make_swiss_roll,
)
from torch import Tensor

GREY = np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601


class Data(NamedTuple):
    """Rows for training, validation and test, standardized by the statistics of the first.

    Args:
        train: The rows to fit, with shape :math:`(N, D)`.
        validation: The rows for early stopping and for the choice of options.
        test: The rows for the reported scores.
        mean: The mean of each feature before it was standardized.
        std: The standard deviation of each feature before it was standardized.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    mean: Tensor
    std: Tensor

    def to(self, device: torch.device) -> Data:
        """Returns the data on a device."""
        return Data(*(part.to(device) for part in self))

    def restore(self, x: Tensor) -> Tensor:
        """Returns standardized rows in their original units."""
        return x * self.std + self.mean


def split(rows: np.ndarray) -> list[np.ndarray]:
    """Divides shuffled rows 60 : 20 : 20."""
    return np.split(rows, [len(rows) * 3 // 5, len(rows) * 4 // 5])


def standardize(train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> Data:
    """Standardizes rows by the mean and standard deviation of the training rows."""
    mean, std = train.mean(axis=0), train.std(axis=0)
    parts = ((part - mean) / std for part in (train, validation, test))
    return Data(*(torch.as_tensor(a, dtype=torch.float32) for a in (*parts, mean, std)))


def patches(seed: int = 0, size: int = 8, stride: int = 2, tile: int = 32) -> Data:
    """Cuts grey patches from two photographs, and prepares them as BSDS300 is.

    Uniform noise is added to the 256 levels of grey, the mean of each patch is subtracted, and the
    last pixel is dropped, because the others determine it (Papamakarios et al., 2017). The
    photographs are first cut into tiles, which are split 60 : 20 : 20, so that no pixel is in two
    splits.

    Args:
        seed: The seed of the split and of the noise.
        size: The height and width of a patch.
        stride: The distance between neighboring patches of a tile.
        tile: The height and width of a tile.
    """
    rng = np.random.default_rng(seed)
    # Axes: photograph, row and column of the tile, row and column in the tile.
    grey = np.rint(np.stack(load_sample_images().images) @ GREY)
    tiles = sliding_window_view(grey, (tile, tile), axis=(1, 2))[:, ::tile, ::tile]
    tiles = rng.permutation(tiles.reshape(-1, tile, tile))

    def prepare(tiles: np.ndarray) -> np.ndarray:
        cut = sliding_window_view(tiles, (size, size), axis=(1, 2))[:, ::stride, ::stride]
        pixels = cut.reshape(-1, size * size)
        pixels = (pixels + rng.random(pixels.shape)) / 256
        return (pixels - pixels.mean(axis=1, keepdims=True))[:, :-1]

    return standardize(*map(prepare, split(tiles)))


def breast_cancer(seed: int = 0) -> Data:
    """Returns 30 measurements of cell nuclei from each of 569 biopsies, split 60 : 20 : 20.

    Args:
        seed: The seed of the split.
    """
    rows = np.random.default_rng(seed).permutation(load_breast_cancer().data)
    return standardize(*split(rows))


def eight_gaussians(n: int, rng: np.random.RandomState) -> np.ndarray:
    """Eight normal distributions around a circle."""
    angle = np.pi / 4 * rng.randint(8, size=n)
    return np.stack((np.cos(angle), np.sin(angle)), axis=1) * 4 + 0.5 * rng.randn(n, 2)


def two_spirals(n: int, rng: np.random.RandomState) -> np.ndarray:
    """Two spirals of one and a half turns, reflected at the origin."""
    angle = 3 * np.pi * np.sqrt(rng.rand(n))
    arm = np.stack((-np.cos(angle), np.sin(angle)), axis=1) * angle[:, None] + rng.rand(n, 2) / 2
    return rng.choice((-1, 1), size=(n, 1)) * arm / 3 + 0.1 * rng.randn(n, 2)


def checkerboard(n: int, rng: np.random.RandomState) -> np.ndarray:
    """The squares of one color of a 4 × 4 checkerboard."""
    column = rng.randint(4, size=n)
    row = 2 * rng.randint(2, size=n) + column % 2
    return np.stack((column, row), axis=1) - 2 + rng.rand(n, 2)


def circles(n: int, rng: np.random.RandomState) -> np.ndarray:
    """Two noisy circles, one inside the other."""
    return make_circles(n, noise=0.08, factor=0.5, random_state=rng)[0]


def moons(n: int, rng: np.random.RandomState) -> np.ndarray:
    """Two noisy half circles."""
    return make_moons(n, noise=0.1, random_state=rng)[0]


def pinwheel(n: int, rng: np.random.RandomState) -> np.ndarray:
    """Five arms, which bend more with the distance from the center."""
    radius, across = 1 + 0.3 * rng.randn(n), 0.1 * rng.randn(n)
    angle = 2 * np.pi / 5 * rng.randint(5, size=n) + np.exp(radius) / 4
    blade = np.stack((np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)))
    return (radius * blade[:2] + across * blade[2:]).T


def rings(n: int, rng: np.random.RandomState) -> np.ndarray:
    """Four noisy rings around one center, with the same number of points each."""
    radius, angle = rng.randint(1, 5, size=n) / 4, 2 * np.pi * rng.rand(n)
    ring = np.stack((np.cos(angle), np.sin(angle)), axis=1) * radius[:, None]
    return ring + 0.08 / 3 * rng.randn(n, 2)


def swiss_roll(n: int, rng: np.random.RandomState) -> np.ndarray:
    """A noisy spiral of one and a half turns."""
    return make_swiss_roll(n, noise=1.0, random_state=rng)[0][:, [0, 2]]


# The densities of Grathwohl et al. (2019).
TOYS = {
    "8 Gaussians": eight_gaussians,
    "2 spirals": two_spirals,
    "checkerboard": checkerboard,
    "circles": circles,
    "moons": moons,
    "pinwheel": pinwheel,
    "rings": rings,
    "swiss roll": swiss_roll,
}


def toy(name: str, n: int = 100_000, seed: int = 0) -> Data:
    """Draws from a density in the plane, and splits 60 : 20 : 20.

    Args:
        name: One of ``TOYS``.
        n: The number of draws.
        seed: The seed of the draws.
    """
    rng = np.random.RandomState(seed)
    return standardize(*split(rng.permutation(TOYS[name](n, rng))))


def digits(seed: int = 0) -> list[np.ndarray]:
    """Returns 1,797 digits of 8 by 8 pixels, with levels from 0 to 16, split 60 : 20 : 20.

    Args:
        seed: The seed of the split.
    """
    return split(np.random.default_rng(seed).permutation(load_digits().images[:, None]))
