"""Masked networks and their shortcuts."""

import pytest
import torch
from conftest import perturb

from pyro_sinflow import LDU, SinusoidalFlow
from pyro_sinflow.networks import MaskedNetwork, Shortcut


def make(shortcut, **options):
    torch.manual_seed(0)
    return MaskedNetwork((2, 3), 2, outputs=3, shortcut=shortcut, **options).double()


def test_a_shortcut_starts_at_zero():
    x, c = torch.randn(5, 2, 3).double(), torch.randn(5, 2).double()
    assert torch.equal(make(True)(x, c), make(False)(x, c))


def test_a_shortcut_reaches_the_first_output_of_each_feature_alone():
    network = make(True)
    linear = network.network.linear
    torch.nn.init.normal_(linear.weight)
    x, c = torch.randn(5, 2, 3).double(), torch.randn(5, 2).double()
    change = network(x, c) - make(False)(x, c)
    expected = linear(torch.cat((x.flatten(1), c), dim=1)).view(5, 2, 3)
    assert torch.allclose(change[..., 0], expected)
    assert torch.equal(change[..., 1:], torch.zeros(5, 2, 3, 2).double())
    assert expected.abs().min() > 0  # the first feature sees the context


@pytest.mark.parametrize("shortcut", [False, True])
def test_the_jacobian_is_strictly_triangular(shortcut):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    network = perturb(make(shortcut, order=order), 1.0)
    c = torch.randn(2).double()
    jacobian = torch.func.jacrev(lambda x: network(x, c))(torch.randn(2, 3).double())
    depends = jacobian.flatten(0, 1).flatten(2).abs().sum(dim=1) > 0  # (features, features)
    assert torch.equal(depends, order[:, None] > order)


def test_a_single_layer_needs_no_shortcut():
    assert isinstance(make(True).network, Shortcut)
    assert not isinstance(make(True, hidden_features=()).network, Shortcut)


def test_densities_have_shortcuts_and_guides_have_none():
    def shortcuts(module):
        return sum(isinstance(part, Shortcut) for part in module.modules())

    assert shortcuts(SinusoidalFlow(3, transforms=2)) == 4  # of L and U
    assert shortcuts(SinusoidalFlow(3, transforms=2, conditioner="autoregressive")) == 2
    assert shortcuts(LDU(3)) == 0
