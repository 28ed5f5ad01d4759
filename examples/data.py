"""Real data sets that scikit-learn ships, so that the examples download nothing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.datasets import load_breast_cancer, load_sample_images
from torch import Tensor

GREY = np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601


class Data(NamedTuple):
    """Rows for training, validation and test, standardised by the statistics of the first.

    Args:
        train: The rows to fit, with shape :math:`(N, D)`.
        validation: The rows that decide when to stop.
        test: The rows to report.
        mean: The mean of each feature before it was standardised.
        std: The standard deviation of each feature before it was standardised.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    mean: Tensor
    std: Tensor

    def restore(self, x: Tensor) -> Tensor:
        """Returns standardised rows in their original units."""
        return x * self.std + self.mean


def split(rows: np.ndarray) -> list[np.ndarray]:
    """Divides shuffled rows 60 : 20 : 20."""
    return np.split(rows, [len(rows) * 3 // 5, len(rows) * 4 // 5])


def standardise(train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> Data:
    """Makes standardised tensors of raw rows."""
    mean, std = train.mean(axis=0), train.std(axis=0)
    parts = ((part - mean) / std for part in (train, validation, test))
    return Data(*(torch.as_tensor(a, dtype=torch.float32) for a in (*parts, mean, std)))


def patches(seed: int = 0, size: int = 8, stride: int = 2, tile: int = 32) -> Data:
    """Cuts grey patches from two photographs, and prepares them as BSDS300 is.

    That is: uniform noise on the 256 levels of grey, the mean of each patch subtracted, and the
    last pixel dropped, which the others determine (Papamakarios et al., 2017). The photographs are
    cut into tiles, of which 60 % train and 20 % each validate and test, so that no pixel is in two
    splits.

    Args:
        seed: The seed of the split and of the noise.
        size: The height and width of a patch.
        stride: The distance between neighbouring patches of a tile.
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

    return standardise(*map(prepare, split(tiles)))


def breast_cancer(seed: int = 0) -> Data:
    """Returns 30 measurements of cell nuclei from each of 569 biopsies, split 60 : 20 : 20.

    Args:
        seed: The seed of the split.
    """
    rows = np.random.default_rng(seed).permutation(load_breast_cancer().data)
    return standardise(*split(rows))
