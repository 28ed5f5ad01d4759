"""The pictures of this site, drawn while it is built."""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
import zuko
from matplotlib.axes import Axes
from torch import Tensor

from pyro_sinflow import LDU, SinusoidalFlow, SinusoidalTransform, fast_inverse, record_inversions

plt.rcParams |= {"figure.dpi": 150, "figure.constrained_layout.use": True}


def sinusoid() -> None:
    """Draws a sinusoid and its slope, for three residual weights."""
    x = torch.linspace(-3, 3, 601)
    frequency, phase, weight = torch.tensor([1.5]), torch.tensor([0.3]), torch.zeros(1)
    _, (left, right) = plt.subplots(1, 2, figsize=(6.5, 2.8))
    for alpha in (0.0, 0.5, 0.95):
        residual = torch.tensor(alpha / 0.999).atanh()
        t = SinusoidalTransform(frequency, phase, weight, residual, torch.zeros(()))
        y, log_slope = t.call_and_ladj(x)
        left.plot(x, y, label=f"α = {alpha}")
        right.plot(x, log_slope.exp())
    left.set(xlabel="x", ylabel="f(x)", title="a sinusoid")
    left.legend()
    right.set(xlabel="x", ylabel="f′(x)", title="its slope", ylim=(0, 2))


def components() -> None:
    """Draws the slopes of three components and of their sum, and the density that it gives."""
    x = torch.linspace(-4, 4, 801)
    a = torch.tensor([0.6, 1.1, 2.3])
    frequency, phase = a.expm1().log(), torch.tensor([0.2, -0.9, 0.5])
    weight = torch.tensor([0.5, 0.3, 0.2]).log()
    residual = torch.tensor(1.5)
    _, axes = plt.subplots(1, 3, figsize=(7.5, 2.6))
    for k in range(3):
        part = (frequency[k : k + 1], phase[k : k + 1], weight[k : k + 1])
        t = SinusoidalTransform(*part, residual, torch.zeros(()))
        axes[0].plot(x, t.log_abs_det_jacobian(x, x).exp())
    t = SinusoidalTransform(frequency, phase, weight, residual, torch.zeros(()))
    z, log_slope = t.call_and_ladj(x)
    normal = torch.distributions.Normal(0.0, 1.0)
    axes[1].plot(x, log_slope.exp(), color="black")
    axes[2].plot(x, normal.log_prob(x).exp(), color="0.7", label="noise")
    axes[2].plot(x, (normal.log_prob(z) + log_slope).exp(), color="black", label="data")
    axes[2].legend()
    for ax, title in zip(axes, ("three slopes", "their weighted sum", "density"), strict=True):
        ax.set(xlabel="x", title=title, ylim=(0, None))


def block() -> None:
    """Draws the Jacobians of an LDU block and of its parts."""
    torch.manual_seed(0)
    t = LDU(8, scale=False)
    with torch.no_grad():
        for parameter in t.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(8)
    jacobians, value = {}, x
    for name, part in zip(("U", "D", "L"), t.transforms, strict=True):
        jacobians[name] = torch.autograd.functional.jacobian(part, value)
        value = part(value).detach()
    product = torch.autograd.functional.jacobian(t, x)
    panels = {"block": product, **dict(reversed(jacobians.items()))}
    _, axes = plt.subplots(1, 4, figsize=(7, 2))
    for ax, (name, jacobian), sign in zip(axes, panels.items(), ("", "=", "·", "·"), strict=True):
        ax.imshow(jacobian.abs() ** 0.5, cmap="Blues", vmin=0, vmax=1.5)
        ax.set(title=name, xticks=[], yticks=[])
        ax.text(-0.14, 0.5, sign, transform=ax.transAxes, fontsize=16, ha="center", va="center")


def walks(n: int, features: int) -> Tensor:
    """Draws random walks whose steps have two modes; each feature has unit variance."""
    steps = torch.randn(n, features).sign() + 0.5 * torch.randn(n, features)
    walk = steps.cumsum(dim=1)
    return walk / (1.25 * torch.arange(1, features + 1)) ** 0.5


def passes() -> None:
    """Trains flows on random walks of several lengths, and counts the passes of their inverses."""
    torch.manual_seed(0)
    sizes = (8, 16, 32, 64, 128)
    flows = {
        "SinusoidalFlow": lambda n: SinusoidalFlow(n),
        "zuko's MAF, fast_inverse": lambda n: fast_inverse(zuko.flows.MAF(n)),
    }
    _, ax = plt.subplots(figsize=(5, 3.2))
    ax.plot(sizes, sizes, color="0.7", linestyle="--", label="one pass for each feature")
    for name, make in flows.items():
        worst = []
        for features in sizes:
            flow = make(features)
            optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
            for _ in range(200):
                optimizer.zero_grad()
                loss = -flow().log_prob(walks(128, features)).mean()
                loss.backward()
                optimizer.step()
            with torch.no_grad(), record_inversions() as inversions:
                flow().sample((10,))
            worst.append(max(i.iterations for i in inversions if i.problem == "triangular"))
        ax.plot(sizes, worst, marker="o", label=name)
    ax.set(xlabel="features", ylabel="passes", xscale="log", yscale="log")
    ax.set_xticks(sizes, sizes, minor=False)
    ax.set_yticks((4, *sizes), (4, *sizes))
    ax.minorticks_off()
    ax.legend()


def directions() -> None:
    """Draws which way each transform is explicit."""
    rows = {
        "guide: LDU(D)": ("one pass", "a few passes", "C0"),
        "prior or density: LDU(D).inv, SinusoidalFlow(D)": ("a few passes", "one pass", "C1"),
    }
    _, axes = plt.subplots(2, 1, figsize=(5, 3.4))
    for ax, (title, (sampling, scoring, color)) in zip(axes, rows.items(), strict=True):
        ax.set(title=title, xlim=(0, 10), ylim=(0, 3))
        ax.axis("off")
        for x, text in ((1, "noise"), (9, "sample")):
            box = {"boxstyle": "round", "facecolor": "0.95"}
            ax.text(x, 1.5, text, ha="center", va="center", bbox=box)
        _arrow(ax, 2, 8, 2.1, f"to sample: {sampling}", color)
        _arrow(ax, 8, 2, 0.9, f"to score: {scoring}", color)


def _arrow(ax: Axes, start: float, end: float, height: float, text: str, color: str) -> None:
    explicit = "one pass" in text
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 3 if explicit else 1}
    style["linestyle"] = "-" if explicit else "--"
    ax.annotate("", (end, height), (start, height), arrowprops=style)
    ax.text(5, height + 0.15, text, ha="center", va="bottom")
