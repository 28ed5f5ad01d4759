"""Activations: those that mix units are refused, and with all others maps are triangular."""

from functools import partial

import pytest
import torch
from conftest import perturb, slogdet
from torch import nn

from pyro_sinflow import (
    LDU,
    ConditionalLDU,
    MaskedNetwork,
    PixelCNN,
    SinusoidalFlow,
    conditional_ldu,
    ldu,
)

UNITS = 16


def sort_pairs(x):
    return x.unflatten(-1, (-1, 2)).sort(-1).values.flatten(-2)


class Function(nn.Module):
    """An activation of a user."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


MIXING = {
    "LayerNorm": lambda: nn.LayerNorm(UNITS),
    "Softmax": lambda: nn.Softmax(-1),
    "Softmin": lambda: nn.Softmin(-1),
    "LogSoftmax": lambda: nn.LogSoftmax(-1),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(3, alpha=1.0),
    "GroupNorm": lambda: nn.GroupNorm(4, UNITS),
    "Linear": lambda: nn.Linear(UNITS, UNITS),
    "BatchNorm1d": lambda: nn.BatchNorm1d(UNITS),
    "part of a sequence": lambda: nn.Sequential(nn.ReLU(), nn.LayerNorm(UNITS)),
    "mean": lambda: Function(lambda x: x - x.mean(-1, keepdim=True)),
    "norm": lambda: Function(lambda x: nn.functional.normalize(x, dim=-1)),
    "sort": lambda: Function(lambda x: x.sort(-1).values),
    "sorted pairs": lambda: Function(
        lambda x: x.unflatten(-1, (-1, 2)).sort(-1).values.flatten(-2)
    ),
    "shift of units": lambda: Function(lambda x: x.roll(1, -1)),
    "attention": lambda: Function(lambda x: x * x.softmax(-1)),
}
OTHER_SIZES = {
    "GLU": nn.GLU,
    "CReLU": lambda: Function(lambda x: torch.cat((x, -x), -1).relu()),
    "Maxout": lambda: Function(lambda x: x.unflatten(-1, (-1, 2)).amax(-1)),
    "sum": lambda: Function(lambda x: x.sum(-1, keepdim=True)),
}
MAKE = {
    "MaskedNetwork": partial(MaskedNetwork, 3),
    "LDU": partial(LDU, 3),
    "ConditionalLDU": partial(ConditionalLDU, 3, 2),
    "SinusoidalFlow": partial(SinusoidalFlow, 3),
    "independent": partial(SinusoidalFlow, 3, conditioner="independent"),
}
RESIDUAL = {"hidden_features": (UNITS, UNITS), "residual": True}


@pytest.mark.parametrize("activation", [*MIXING, *OTHER_SIZES])
@pytest.mark.parametrize("options", [{"hidden_features": (UNITS,)}, RESIDUAL], ids=["", "residual"])
def test_a_network_refuses_activations_that_mix_units(activation, options):
    make = {**MIXING, **OTHER_SIZES}[activation]
    with pytest.raises(ValueError, match=r"'activation' (should|fails)"):
        MaskedNetwork(3, activation=make, **options)


@pytest.mark.parametrize("name", MAKE)
def test_whoever_has_a_network_refuses_activations_that_mix_units(name):
    for dropout in (0.0, 0.5):
        with pytest.raises(ValueError, match=r"(?s)'activation' should act.*LayerNorm.* mixes"):
            MAKE[name](activation=MIXING["LayerNorm"], hidden_features=(UNITS,), dropout=dropout)


IMAGE_MIXING = {
    "over channels": lambda: nn.Softmax(-3),
    "over rows": lambda: nn.Softmax(-2),
    "over columns": lambda: nn.Softmax(-1),
    "Softmax2d": nn.Softmax2d,
    "LayerNorm": lambda: nn.LayerNorm([4, 3, 3]),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4),
    "BatchNorm2d": lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),
    "AvgPool2d": lambda: nn.AvgPool2d(3, 1, 1),
    "Conv2d": lambda: nn.Conv2d(4, 4, 1),
    "GLU": lambda: nn.GLU(-3),
    "Flatten": nn.Flatten,
}


@pytest.mark.parametrize("activation", IMAGE_MIXING)
@pytest.mark.parametrize("residual", [False, True])
def test_a_pixelcnn_refuses_activations_that_mix_units(activation, residual):
    with pytest.raises(ValueError, match=r"'activation' (should|fails)"):
        PixelCNN(
            (1, 3, 3),
            hidden_features=(4, 4),
            activation=IMAGE_MIXING[activation],
            residual=residual,
        )


ELEMENT_WISE = [
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU),
    *(nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish),
    *(nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.LogSigmoid, nn.ReLU6),
    *(nn.Identity, lambda: nn.Threshold(0.1, 0.0), lambda: Function(torch.sin)),
    lambda: nn.Sequential(nn.Tanh(), Function(torch.exp)),
]


@pytest.mark.parametrize("activation", ELEMENT_WISE, ids=lambda make: str(make())[:20])
def test_element_wise_activations_pass(activation):
    options = {"hidden_features": (UNITS,), "activation": activation}
    t = perturb(LDU(3, **options).double()).eval()
    x = torch.randn(2, 3).double()
    y, ladj = t.call_and_ladj(x)
    assert torch.allclose(ladj, slogdet(t, x, 1), atol=1e-10)
    assert torch.allclose(t.inv(y), x, atol=1e-9)
    PixelCNN((1, 2, 2), **options)


def test_a_check_of_an_activation_leaves_no_trace():
    made = []

    def make():
        made.append(nn.RReLU())
        return made[-1]

    state = torch.get_rng_state()
    MaskedNetwork(3, hidden_features=(UNITS,), activation=make)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    MaskedNetwork(3, hidden_features=(UNITS,))
    assert torch.equal(after, torch.get_rng_state())
    assert all(module.training for module in made)


@pytest.mark.parametrize("make", [ldu, conditional_ldu, SinusoidalFlow, MAKE["independent"]])
def test_residual_blocks_without_hidden_layers_are_a_linear_conditioner(make):
    features = () if isinstance(make, partial) else (3,)
    made = perturb(make(*features, hidden_features=(), residual=True).double(), 0.1)
    t = made().transform if isinstance(made, SinusoidalFlow) else made
    t = t() if isinstance(t, ConditionalLDU) else t
    x = torch.randn(4, 3).double()
    y, ladj = t.call_and_ladj(x)
    assert torch.allclose(ladj, slogdet(t, x, 1), atol=1e-10)
    assert torch.allclose(t.inv(y), x, atol=1e-9)
