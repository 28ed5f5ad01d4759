"""Trained flows are densities: they integrate to 1, and samples follow them."""

import math
from typing import NamedTuple

import pytest
import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn

from pyro_sinflow import SinusoidalFlow

FLOWS = {
    "independent": {"conditioner": "independent"},
    "scale": {"conditioner": "independent", "scale": True},
    "autoregressive": {},
    "conditional": {"context": 1},
}


def rows(features, n=2000):
    """Standardized data with structure, and from which of its two parts each row comes."""
    if features == 2:
        x, label = map(torch.tensor, make_moons(n, noise=0.1, random_state=0))
        label = label[:, None].double()
    else:  # a narrow peak, and a skewed one beside it
        label = torch.arange(n, dtype=torch.float64)[:, None] % 2
        noise = torch.randn(n, 1, dtype=torch.float64)
        x = torch.where(label == 0, -1 + 0.2 * noise, (0.6 * noise).exp())
    return (x - x.mean(dim=0)) / x.std(dim=0), label


def fit(features, options, steps=200):
    """Trains a flow until it beats the normal density of the data's mean and variance."""
    x, label = rows(features)
    flow = SinusoidalFlow(features, transforms=3, hidden_features=(32, 32), **options).double()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(steps):
        batch = torch.randint(len(x), (128,))
        loss = -flow(label[batch] if "context" in options else None).log_prob(x[batch]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < features * math.log(2 * math.pi * math.e) / 2
    return flow


class Grid(NamedTuple):
    """A density on the points of a grid."""

    points: Tensor  # (*, D)
    density: Tensor  # (*)
    spacing: Tensor  # (D,)

    def mass(self, stride=1):
        """The integral, by the trapezoidal rule on every stride-th point along each axis."""
        part = self.density[(slice(None, None, stride),) * self.density.ndim]
        return float(part.sum() * (stride * self.spacing).prod())


def circle(angle, features):
    """Points of the unit circle, at some angles; for one feature, their first coordinate."""
    return torch.stack((angle.cos(), angle.sin())[:features], dim=-1)


def tabulate(distribution, points, radius=6.0):
    """Evaluates a flow of one or two features on a grid that covers its mass.

    All but exp(-radius² / 2) of the base distribution's mass lies within the radius, and a
    continuous bijection maps it to the inside of the circle's image: the grid is the box around
    that image.
    """
    (features,) = distribution.event_shape
    angle = torch.linspace(0, 2 * math.pi, 1001, dtype=torch.float64)
    image = distribution.transform.inv(radius * circle(angle, features))
    lower, upper = image.amin(dim=0), image.amax(dim=0)
    axes = torch.linspace(0, 1, points, dtype=torch.float64)[:, None] * (upper - lower) + lower
    grid = torch.stack(torch.meshgrid(*axes.unbind(dim=1), indexing="ij"), dim=-1)
    return Grid(grid, distribution.log_prob(grid).exp(), (upper - lower) / (points - 1))


def kolmogorov_smirnov(samples, values, weights):
    """The largest distance of the samples' distribution function to that of weighted values."""
    values, order = values.sort()
    cumulative = nn.functional.pad(weights[order].cumsum(dim=0), (1, 0))
    expected = cumulative[torch.searchsorted(values, samples.sort().values)]
    step = torch.arange(len(samples) + 1) / len(samples)
    return float(torch.maximum(step[1:] - expected, expected - step[:-1]).max())


@pytest.mark.parametrize("features", [1, 2])
@pytest.mark.parametrize("name", FLOWS)
def test_trained_density_integrates_to_1_and_samples_follow_it(name, features):
    flow, n = fit(features, FLOWS[name]), 20_000
    # Dvoretzky, Kiefer, Wolfowitz and Massart: the distance of n samples of the density exceeds
    # this with a probability of at most 1e-4.
    threshold = math.sqrt(math.log(2 / 1e-4) / (2 * n))
    # Cramér and Wold: projections determine a distribution. No points of the grid coincide here.
    projections = circle(torch.arange(1, 2 * features, dtype=torch.float64), features)
    for label in (0.0, 0.5, 1.0) if name == "conditional" else (None,):
        c = None if label is None else torch.tensor([label], dtype=torch.float64)
        with torch.no_grad():
            grid = tabulate(flow(c), points=4001 if features == 1 else 301)
            samples = flow(c).sample((n,))

        assert grid.mass() == pytest.approx(1, abs=1e-3)
        assert grid.mass() == pytest.approx(grid.mass(stride=2), abs=1e-3)
        weights = (grid.density * grid.spacing.prod()).flatten()
        for along in projections:
            values = (grid.points @ along).flatten()
            assert kolmogorov_smirnov(samples @ along, values, weights) <= threshold
