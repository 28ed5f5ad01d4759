"""Nine posteriors of posteriordb: models in Pyro, their data, and reference draws.

Models, data and draws are those of stan-dev/posteriordb (BSD-3). The sites of a model have the
names of the reference's parameters. Models support batches of particles.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def flat(size: int, positive: bool = False) -> dist.Distribution:
    """Returns an improper flat prior of a vector, or of a number if the size is 0.

    Guides sample each site once to find its shape, and Pyro's ``ImproperUniform`` has no samples.
    Therefore another distribution is sampled, and its density is masked.
    """
    prior = (dist.LogNormal if positive else dist.Normal)(torch.zeros(size or ()), 1.0)
    return (prior.to_event(1) if size else prior).mask(False)


def observe(name: str, distribution: dist.Distribution, value: Tensor) -> None:
    """Observes a vector whose entries are independent given the parameters."""
    pyro.sample(name, distribution.to_event(1), obs=value)


def regress(y: Tensor, x: Tensor, beta: Tensor, sigma: Tensor) -> None:
    """Observes a linear regression: x has a row for each entry of y."""
    observe("y", dist.Normal(beta @ x.T, sigma.unsqueeze(-1)), y)


def eight_schools(y: Tensor, sigma: Tensor, **_: Any) -> None:
    """Effects of coaching in eight schools, in the centered form."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    effects = dist.Normal(mu.unsqueeze(-1), tau.unsqueeze(-1)).expand((*mu.shape, len(y)))
    theta = pyro.sample("theta", effects.to_event(1))
    observe("y", dist.Normal(theta, sigma), y)


def ar_k(y: Tensor, K: int, **_: Any) -> None:  # noqa: N803
    """An autoregressive time series."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(K), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    past = torch.stack([y[K - k : len(y) - k] for k in range(1, K + 1)], dim=-1)
    mean = alpha.unsqueeze(-1) + beta @ past.T
    observe("y", dist.Normal(mean, sigma.unsqueeze(-1)), y[K:])


def kidscore_interaction(kid_score: Tensor, mom_hs: Tensor, mom_iq: Tensor, **_: Any) -> None:
    """Test scores of children, by education and IQ of their mothers."""
    beta = pyro.sample("beta", flat(4))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    x = torch.stack((torch.ones_like(mom_iq), mom_hs, mom_iq, mom_hs * mom_iq), dim=-1)
    regress(kid_score, x, beta, sigma)


def diamonds(Y: Tensor, X: Tensor, **_: Any) -> None:  # noqa: N803
    """Prices of diamonds, by 24 correlated columns."""
    x = X[:, 1:] - X[:, 1:].mean(0)
    b = pyro.sample("b", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    intercept = pyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = pyro.sample("sigma", flat(0, positive=True))
    # A Student-t prior, truncated at zero: twice the density of the whole.
    pyro.factor("prior", dist.StudentT(3.0, 0.0, 10.0).log_prob(sigma) + np.log(2.0))
    observe("y", dist.Normal(intercept.unsqueeze(-1) + b @ x.T, sigma.unsqueeze(-1)), Y)


def gp_regr(x: Tensor, y: Tensor, **_: Any) -> None:
    """Hyperparameters of a Gaussian process."""
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    rho, alpha, sigma = (t[..., None, None] for t in (rho, alpha, sigma))
    square = (x[:, None] - x).square()
    covariance = alpha.square() * (-0.5 * square / rho.square()).exp() + sigma * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance), obs=y)


def lotka_volterra(y: Tensor, y_init: Tensor, ts: Tensor, **_: Any) -> None:
    """Numbers of hares and lynxes, which follow an ordinary differential equation."""
    location, scale = torch.tensor([1.0, 0.05, 1.0, 0.05]), torch.tensor([0.5, 0.05, 0.5, 0.05])
    theta = pyro.sample("theta", dist.LogNormal(location.log(), 1.0).to_event(1).mask(False))
    prior = dist.Normal(location, scale)  # truncated at zero
    above_zero = 1 - prior.cdf(torch.zeros(()))
    pyro.factor("prior", (prior.log_prob(theta) - above_zero.log()).sum(-1))
    sigma = pyro.sample("sigma", dist.LogNormal(torch.full((2,), -1.0), 1.0).to_event(1))
    start = torch.full((2,), 10.0).log()
    z_init = pyro.sample("z_init", dist.LogNormal(start, 1.0).to_event(1))
    observe("y_init", dist.LogNormal(z_init.log(), sigma), y_init)
    states = solve_lotka_volterra(theta, z_init.log(), ts)
    pyro.sample("y", dist.LogNormal(states, sigma.unsqueeze(-2)).to_event(2), obs=y)


def solve_lotka_volterra(theta: Tensor, z: Tensor, times: Tensor, steps: int = 4) -> Tensor:
    """Solves the equations of Lotka and Volterra by the classical method of Runge and Kutta.

    Four steps a year leave errors below 3e-4, where the observations have noise of 0.25.

    Args:
        theta: The four rates, with shape (*, 4).
        z: The logarithms of both numbers at time 0, with shape (*, 2).
        times: When to return them, with shape (T).
        steps: The number of steps between two times.

    Returns:
        The logarithms of the numbers, with shape (*, T, 2).
    """
    a, b, c, d = theta.unbind(-1)
    rate, effect = torch.stack((a, -c), dim=-1), torch.stack((b, -d), dim=-1)

    def slope(z: Tensor) -> Tensor:
        return rate - effect * z.flip(-1).clamp(max=10.0).exp()  # against overflow

    states, now = [], 0.0
    for time in times.tolist():
        h, now = (time - now) / steps, time
        for _ in range(steps):
            k1 = slope(z)
            k2 = slope(z + h / 2 * k1)
            k3 = slope(z + h / 2 * k2)
            k4 = slope(z + h * k3)
            z = z + h / 6 * (k1 + 2 * (k2 + k3) + k4)
        states.append(z)
    return torch.stack(states, dim=-2)


def nes(partyid7: Tensor, age_discrete: Tensor, **columns: Any) -> None:
    """Party identification in the American National Election Study of 1972."""
    beta = pyro.sample("beta", flat(9))
    sigma = pyro.sample("sigma", flat(0, positive=True))
    c = columns
    ages = [(age_discrete == k).to(partyid7) for k in (2, 3, 4)]
    parts = (c["real_ideo"], c["race_adj"], *ages, c["educ1"], c["gender"], c["income"])
    regress(partyid7, torch.stack((torch.ones_like(partyid7), *parts), dim=-1), beta, sigma)


def blr(X: Tensor, y: Tensor, **_: Any) -> None:  # noqa: N803
    """A linear regression of simulated data."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(X.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    regress(y, X, beta, sigma)


def logmesquite_logvash(weight: Tensor, **columns: Any) -> None:
    """Weights of mesquite bushes, by the logarithms of their sizes."""
    beta = pyro.sample("beta", flat(6))
    sigma = pyro.sample("sigma", flat(0, positive=True))
    d1, d2, height = columns["diam1"], columns["diam2"], columns["canopy_height"]
    sizes = (d1 * d2 * height, d1 * d2, d1 / d2, columns["total_height"])
    x = torch.stack((torch.ones_like(d1), *(s.log() for s in sizes), columns["group"]), dim=-1)
    regress(weight.log(), x, beta, sigma)


# By the names of the posteriors: a short name, the name of the data, and the model.
MODELS: dict[str, tuple[str, str, Callable[..., None]]] = {
    "eight_schools-eight_schools_noncentered": ("eight schools", "eight_schools", eight_schools),
    "arK-arK": ("AR(5)", "arK", ar_k),
    "kidiq-kidscore_interaction": ("kidscore", "kidiq", kidscore_interaction),
    "diamonds-diamonds": ("diamonds", "diamonds", diamonds),
    "gp_pois_regr-gp_regr": ("Gaussian process", "gp_pois_regr", gp_regr),
    "hudson_lynx_hare-lotka_volterra": ("Lotka-Volterra", "hudson_lynx_hare", lotka_volterra),
    "nes1972-nes": ("nes1972", "nes1972", nes),
    "sblrc-blr": ("sblrc", "sblrc", blr),
    "mesquite-logmesquite_logvash": ("mesquite", "mesquite", logmesquite_logvash),
}


@dataclass(frozen=True)
class Posterior:
    """A model with its data, and draws of the reference.

    Args:
        name: A short name.
        model: The model, without arguments.
        draws: The draws of each site, with shape (draws, *event).
    """

    name: str
    model: Callable[[], None]
    draws: dict[str, Tensor]


def read(root: Path, name: str) -> Posterior:
    """Reads a posterior.

    Args:
        root: A copy of posteriordb, or a folder with the data as JSON and with the draws as arrays
            of numpy ("names", and "draws" with shape (chains, draws, parameters)).
        name: The name of the posterior.

    Raises:
        FileNotFoundError: If the folder has neither.
    """
    title, data, model = MODELS[name]
    if (root / "posterior_database").is_dir():
        root = root / "posterior_database"
        numbers = _unzip(root / "data" / "data" / f"{data}.json.zip")
        chains = _unzip(root / "reference_posteriors" / "draws" / "draws" / f"{name}.json.zip")
        columns = {c: np.concatenate([chain[c] for chain in chains]) for c in chains[0]}
    else:
        numbers = json.loads((root / f"{data}.json").read_text())
        file = np.load(root / f"{name}.npz")
        draws = file["draws"].reshape(-1, len(file["names"]))
        columns = dict(zip(map(str, file["names"]), draws.T, strict=True))
    sites: dict[str, list[np.ndarray]] = {}
    for column, values in columns.items():
        sites.setdefault(column.split("[")[0], []).append(values)
    draws = {k: np.stack(v, axis=-1) if len(v) > 1 else v[0] for k, v in sites.items()}
    numbers = {k: _tensor(v) if isinstance(v, list) else v for k, v in numbers.items()}
    return Posterior(title, lambda: model(**numbers), {k: _tensor(v) for k, v in draws.items()})


def _unzip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        return json.load(io.BytesIO(archive.read(archive.namelist()[0])))


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.get_default_dtype())
