"""Masked networks and their shortcuts."""

from functools import partial

import pytest
import torch
from conftest import perturb
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_sinflow import LDU, MaskedNetwork, SinusoidalFlow
from pyro_sinflow.networks import Shortcut


def make(shortcut, **options):
    torch.manual_seed(0)
    return MaskedNetwork((2, 3), 2, outputs=3, shortcut=shortcut, **options).double()


def test_a_shortcut_starts_at_zero():
    x, c = torch.randn(5, 2, 3).double(), torch.randn(5, 2).double()
    assert torch.equal(make(1.0)(x, c), make(0.0)(x, c))


def test_a_shortcut_reaches_the_first_output_of_each_feature_alone():
    network = make(1.0)
    torch.nn.init.normal_(network.shortcut.weight)
    x, c = torch.randn(5, 2, 3).double(), torch.randn(5, 2).double()
    change = network(x, c) - make(0.0)(x, c)
    expected = network.shortcut(torch.cat((x.flatten(1), c), dim=1)).view(5, 2, 3)
    assert torch.allclose(change[..., 0], expected)
    assert torch.equal(change[..., 1:], torch.zeros(5, 2, 3, 2).double())
    assert expected.abs().min() > 0  # the first feature sees the context


def test_a_shortcut_learns_as_many_times_faster_as_it_says():
    x, c = torch.randn(5, 2, 3).double(), torch.randn(5, 2).double()
    moved = []
    for rate in (1.0, 8.0):
        network = make(rate)
        network(x, c)[..., 0].sum().backward()
        torch.optim.Adam([network.shortcut.weight]).step()
        moved.append(network(x, c) - make(0.0)(x, c))
    assert moved[0].abs().max() > 0
    assert torch.allclose(moved[1], 8 * moved[0], rtol=1e-4)


@pytest.mark.parametrize("shortcut", [0.0, 1.0])
def test_the_jacobian_is_strictly_triangular(shortcut):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    network = perturb(make(shortcut, order=order), 1.0)
    c = torch.randn(2).double()
    jacobian = torch.func.jacrev(lambda x: network(x, c))(torch.randn(2, 3).double())
    depends = jacobian.flatten(0, 1).flatten(2).abs().sum(dim=1) > 0  # (features, features)
    assert torch.equal(depends, order[:, None] > order)


def test_a_single_layer_needs_no_shortcut():
    assert isinstance(make(1.0).shortcut, Shortcut)
    assert make(1.0, hidden_features=()).shortcut is None


def test_shortcuts_are_an_option():
    def shortcuts(module):
        return sum(isinstance(part, Shortcut) for part in module.modules())

    network = partial(MaskedNetwork, shortcut=1.0)
    for conditioner, count in (("autoregressive", 2), ("independent", 4)):  # 4: of L and U
        options = {"transforms": 2, "conditioner": conditioner}
        assert shortcuts(SinusoidalFlow(3, **options)) == 0
        assert shortcuts(SinusoidalFlow(3, network=network, **options)) == count
    assert shortcuts(LDU(3)) == 0
    assert shortcuts(LDU(3, shortcut=1.0)) == 2


class Operations(TorchDispatchMode):
    """Notes the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.overloadpacket.__name__)
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize(("scale", "joins"), [(False, 0), (True, 2)])
def test_gradients_of_outputs_are_few_operations(scale, joins):
    # Each costs a launch on a GPU: of a gradient to each output, or to each slice of them.
    block, x = LDU(3, scale=scale, shortcut=1.0), torch.randn(4, 3)
    y = block.upper(x)
    with Operations() as mode:
        y.sum().backward()
    assert "slice_backward" not in mode.names
    assert mode.names.count("stack") + mode.names.count("cat") == joins
