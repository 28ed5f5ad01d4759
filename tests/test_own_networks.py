"""Networks of a user's own in LazyTriangular: their triangularity is checked at the first call."""

import pyro
import pytest
import torch
from torch import nn
from zuko.lazy import Flow
from zuko.transforms import MonotonicAffineTransform

from pyro_sinflow import LazyTriangular, MaskedNetwork, PixelCNN, SinusoidalFlow


class Recurrent(nn.Module):
    """A GRU over the features, whose input is shifted by one feature or by mistake is not."""

    def __init__(self, shifted=True, context=0, reverse=False):
        super().__init__()
        self.shifted, self.reverse = shifted, reverse
        self.cell = nn.GRU(1 + context, 8, batch_first=True)
        self.head = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 2))

    def forward(self, x, c=None):
        x = x.flip(-1) if self.reverse else x
        if self.shifted:
            x = nn.functional.pad(x[..., :-1], (1, 0))
        rows = x.reshape(-1, x.shape[-1], 1)
        if c is not None:
            c = c.expand(*x.shape[:-1], -1).reshape(len(rows), 1, -1)
            rows = torch.cat((rows, c.expand(-1, x.shape[-1], -1)), dim=-1)
        h = self.head(self.cell(rows)[0]).view(*x.shape, 2)
        return h.flip(-2) if self.reverse else h


def flow_of(network, features=5):
    t = LazyTriangular(network, features, MonotonicAffineTransform, shapes=[(), ()])
    return Flow([t], SinusoidalFlow(features).base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_triangular_network_passes_in_any_order(reverse, context, dtype):
    flow = flow_of(Recurrent(context=context, reverse=reverse)).to(dtype).eval()
    c = torch.randn(context, dtype=dtype) if context else None
    x = 30 * torch.randn(4, 5, dtype=dtype)
    assert flow(c).log_prob(x).isfinite().all()
    assert torch.allclose(flow(c).transform.inv(flow(c).transform(x)), x, rtol=1e-4)


@pytest.mark.parametrize("context", [0, 3])
def test_a_network_that_sees_the_feature_itself_is_refused(context):
    flow, x = flow_of(Recurrent(shifted=False, context=context)), torch.randn(4, 5)
    c = torch.randn(4, context) if context else None
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"in Recurrent those of the features \[0, 1, 2, 3, 4\]"
        ):
            flow(c).log_prob(x)


class Skips(MaskedNetwork):
    """Adds the feature itself to its parameters, by mistake."""

    def forward(self, x, c=None):
        return super().forward(x, c) + x.unsqueeze(-1)


class SkipsPixel(PixelCNN):
    def forward(self, x, c=None):
        return super().forward(x, c) + x.unsqueeze(-1)


@pytest.mark.parametrize(
    ("network", "features"),
    [(Skips, 1), (Skips, 3), (SkipsPixel, (1, 1, 1)), (SkipsPixel, (2, 2, 2))],
)
def test_subclasses_of_own_networks_are_checked_too(network, features):
    flow = SinusoidalFlow(features, network=network)
    message = f"but in {network.__name__} those of the features"
    with pytest.raises(ValueError, match=message):
        flow().log_prob(torch.zeros(4, *flow.base().event_shape))
    with pytest.raises(ValueError, match=message):
        flow().sample((4,))


class Linear(nn.Module):
    """Parameters that are linear functions of the features."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        self.calls = 0

    def forward(self, x, c):
        self.calls += 1
        return torch.stack((x @ self.weight.T, torch.zeros_like(x)), dim=-1)


def test_a_cycle_of_several_features_is_found():
    weight = torch.zeros(5, 5)
    weight[1, 0] = weight[3, 1] = weight[4, 3] = weight[1, 4] = 0.01  # 1 -> 3 -> 4 -> 1
    with pytest.raises(ValueError, match=r"of the features \[1, 3, 4\]"):
        flow_of(Linear(weight))().log_prob(torch.zeros(2, 5))
    weight[1, 4] = 0.0
    flow_of(Linear(weight))().log_prob(torch.zeros(2, 5))


def test_an_empty_batch_of_contexts_is_not_checked():
    class Given(Linear):
        def forward(self, x, c):
            return super().forward(x + 0 * c[..., :1], c)

    t = LazyTriangular(Given(torch.zeros(3, 3)), 3, MonotonicAffineTransform, shapes=[(), ()])(
        torch.zeros(0, 2)
    )
    assert t(torch.randn(1, 3)).shape == (0, 3)


def test_it_is_checked_once_and_only_with_validation():
    network = Linear(torch.randn(5, 5).tril(-1))
    flow = flow_of(network)
    for _ in range(3):
        flow().log_prob(torch.randn(2, 5))
    assert network.calls == 4
    with pyro.validation_enabled(False):
        flow_of(wrong := Linear(torch.ones(5, 5)))().log_prob(torch.randn(2, 5))
    assert wrong.calls == 1


def test_the_check_changes_neither_modes_nor_random_numbers():
    network = Recurrent()
    network.head[1].eval()
    flow, x = flow_of(network), torch.randn(4, 5)
    modes = [module.training for module in network.modules()]
    state = torch.get_rng_state()
    flow().log_prob(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.modules()] == modes


def test_images_and_masked_networks_in_other_modules():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = MaskedNetwork((2, 3), outputs=2)

        def forward(self, x, c):
            return self.network(x, c)

    t = LazyTriangular(Wrapped(), (2, 3), MonotonicAffineTransform, shapes=[(), ()])
    assert t()(torch.randn(7, 2, 3)).shape == (7, 2, 3)


def test_a_network_that_replaces_one_of_this_package_is_checked():
    flow = flow_of(MaskedNetwork(5, outputs=2))
    flow().log_prob(torch.randn(4, 5))
    flow.transform.transforms[0].network = Recurrent(shifted=False)
    with pytest.raises(ValueError, match="in Recurrent those of the features"):
        flow().log_prob(torch.randn(4, 5))
