"""Masked networks."""

import pytest
import torch
from conftest import perturb
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_sinflow import LDU, MaskedNetwork


def test_the_jacobian_is_strictly_triangular():
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    network = perturb(MaskedNetwork((2, 3), 2, outputs=3, order=order).double(), 1.0)
    c = torch.randn(2).double()
    jacobian = torch.func.jacrev(lambda x: network(x, c))(torch.randn(2, 3).double())
    depends = jacobian.flatten(0, 1).flatten(2).abs().sum(dim=1) > 0  # (features, features)
    assert torch.equal(depends, order[:, None] > order)


class Operations(TorchDispatchMode):
    """Notes the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.overloadpacket.__name__)
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize(("scale", "joins"), [(False, 0), (True, 1)])
def test_gradients_of_outputs_are_few_operations(scale, joins):
    # Each costs a launch on a GPU: of a gradient to each output, or to each slice of them.
    block, x = LDU(3, scale=scale), torch.randn(4, 3)
    y = block.upper(x)
    with Operations() as mode:
        y.sum().backward()
    assert "slice_backward" not in mode.names
    assert mode.names.count("stack") + mode.names.count("cat") == joins
