"""Simulators with a uniform prior, the reference posteriors of sbibm, and the C2ST."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from files import find, read_arrays
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits
from torch import Tensor

SOURCE = """\
Where the reference posteriors come from:

  'sbibm.npz', in the folder '--data-root', holds arrays 'two_moons_1_observation', with shape
  (L), and 'two_moons_1_posterior', with shape (N, D), and so on for ten observations and for
  'slcp'. They are the files 'num_observation_*/observation.csv' and
  'num_observation_*/reference_posterior_samples.csv.bz2' in the folders
  'sbibm/tasks/two_moons/files' and 'sbibm/tasks/slcp/files' of github.com/sbi-benchmark/sbibm.
"""

OBSERVATIONS = 10  # of each task

Pairs = tuple[Tensor, Tensor]  # parameters, with shape (N, D), and observations, with shape (N, L)


def two_moons(theta: Tensor) -> Tensor:
    """Simulates a point on a half circle, whose position depends on two parameters."""
    angle = math.pi * (torch.rand(len(theta)) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(len(theta))
    moon = torch.stack((radius * angle.cos() + 0.25, radius * angle.sin()), dim=1)
    place = torch.stack((-theta.sum(dim=1).abs(), theta[:, 1] - theta[:, 0]), dim=1)
    return moon + place / 2**0.5


def slcp(theta: Tensor) -> Tensor:
    """Simulates four draws from a normal distribution in the plane with five parameters."""
    mean, scale, rho = theta[:, :2], theta[:, 2:4].square(), theta[:, 4].tanh()
    noise = torch.randn(len(theta), 4, 2)
    second = rho[:, None] * noise[..., 0] + (1 - rho[:, None].square()).sqrt() * noise[..., 1]
    noise = torch.stack((noise[..., 0], second), dim=-1)
    return (mean[:, None] + scale[:, None] * noise).flatten(1)


class Task(NamedTuple):
    """A simulator, and its prior: uniform between plus and minus ``bound``.

    With ``logits``, flows are fitted to the logits of the parameters, otherwise to the parameters.
    The choice is the one with the higher held-out log-posterior of all flows after 1,000
    simulations.
    """

    simulate: Callable[[Tensor], Tensor]
    parameters: int
    bound: float
    logits: bool

    def draw(self, n: int) -> Pairs:
        """Draws parameters from the prior, and simulates an observation for each."""
        theta = self.bound * (2 * torch.rand(n, self.parameters) - 1)
        return theta, self.simulate(theta)

    def reference(self, root: Path | None, i: int) -> Pairs:
        """Reads an observation, with shape (L), and draws from its posterior, with shape (N, D)."""
        name = f"{self.simulate.__name__}_{i}"
        x, theta = read_arrays(find(root, "sbibm.npz"), f"{name}_observation", f"{name}_posterior")
        return torch.as_tensor(theta).float(), torch.as_tensor(x).float()


TASKS = {
    "two moons": Task(two_moons, 2, 1.0, logits=False),
    "SLCP": Task(slcp, 5, 3.0, logits=True),
}


def c2st(x: Tensor, y: Tensor, seed: int = 1) -> float:
    """Returns the accuracy of a classifier that tells two sets of samples apart.

    It is 0.5 for samples that have the same distribution, and 1 for those that do not overlap
    (Lopez-Paz and Oquab, 2017). The classifier and its cross-validation are those of sbibm
    (Lueckmann et al., 2021).

    Args:
        x: Samples with shape (N, D). Both sets are standardized by their mean and deviation.
        y: Samples with shape (M, D).
        seed: The seed of the classifier and of the folds.
    """
    std, mean = torch.std_mean(x, dim=0)
    rows = ((torch.cat((x, y)) - mean) / std).numpy()
    labels = np.repeat((0.0, 1.0), (len(x), len(y)))
    classifier = MLPClassifier(2 * (10 * x.shape[1],), max_iter=10_000, random_state=seed)
    folds = KFold(5, shuffle=True, random_state=seed)
    with threadpool_limits(1):  # more threads are slower for such small matrices
        scores = cross_val_score(classifier, rows, labels, cv=folds, scoring="accuracy")
    return float(scores.mean())
