"""PixelCNN: what each feature depends on, in flows over images."""

import re

import pytest
import torch
from conftest import perturb, residual, slogdet
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pyro_sinflow import (
    LDU,
    ConditionalLDU,
    InversionError,
    InversionWarning,
    PixelCNN,
    SinusoidalFlow,
    record_inversions,
)

AIM = {torch.float32: 1e-5, torch.float64: 1e-11}
SHAPES = [(1, 4, 5), (1, 6, 1), (1, 1, 6), (2, 3, 4), (2, 5, 1), (3, 3, 2), (3, 1, 1), (1, 1, 1)]
FLOWS = {
    "independent": {"conditioner": "independent", "residual": True},
    "scale": {"conditioner": "independent", "scale": True, "activation": nn.Tanh},
    "autoregressive": {},
}


def network(features, context=0, **options):
    """A network without ReLUs, whose derivatives are zero for structural reasons alone."""
    return PixelCNN(features, context, activation=nn.Tanh, **options).double()


def dependence(network, shape, output=0):
    """Which features (columns) the outputs of each feature (rows) depend on, in raster order."""
    x = torch.randn(shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x)[..., output], x)
    n = x.numel()
    return jacobian.permute(1, 2, 0, 4, 5, 3).reshape(n, n) != 0


def flow(shape, name, **options):
    return SinusoidalFlow(
        shape, transforms=2, network=PixelCNN, hidden_features=(16, 16), **FLOWS[name] | options
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("residual", [False, True])
def test_a_feature_depends_on_all_features_before_it_alone(shape, residual):
    n = torch.Size(shape).numel()
    hidden = (8,) * 4 if residual else (8, 9, 8, 9, 8)
    lower = torch.ones(n, n).tril(-1).bool()
    options = {"hidden_features": hidden, "residual": residual, "outputs": 2}
    for output in range(2):
        raster = network(shape, **options)
        assert torch.equal(dependence(raster, shape, output), lower)
        mirrored = network(shape, order=range(n)[::-1], **options)
        assert torch.equal(dependence(mirrored, shape, output), lower.T)


def test_the_order_is_loaded_with_the_weights():
    reverse = network((1, 3, 2), order=range(6)[::-1], hidden_features=(4,))
    other = network((1, 3, 2), hidden_features=(4,))
    other.load_state_dict(reverse.state_dict())
    x = torch.randn(1, 3, 2, dtype=torch.float64)
    assert torch.equal(other(x), reverse(x))


@pytest.mark.parametrize(("hidden", "kernel_size"), [((), 3), ((8,), 3), ((8, 8), 3), ((8,), 5)])
def test_receptive_field_has_no_blind_spot(hidden, kernel_size):
    shape, reach = (1, 12, 12), (len(hidden) + 1) * (kernel_size // 2)
    net = network(shape, hidden_features=hidden, kernel_size=kernel_size)
    row, column = torch.arange(144) // 12, torch.arange(144) % 12
    near = ((row - row[:, None]).abs() <= reach) & ((column - column[:, None]).abs() <= reach)
    assert torch.equal(dependence(net, shape), near.tril(-1))


def test_context_reaches_every_feature():
    net = network((2, 3, 4), 3, hidden_features=(8,) * 2)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    c = torch.randn(3, dtype=torch.float64)
    assert (torch.autograd.functional.jacobian(lambda c: net(x, c), c) != 0).all()


@pytest.mark.parametrize("batch", [(), (0,), (5,), (2, 3)])
@pytest.mark.parametrize("hidden", [(), (8, 8)])
def test_batches(batch, hidden):
    net = PixelCNN((2, 3, 4), 3, outputs=5, hidden_features=hidden)
    x, c = torch.randn(*batch, 2, 3, 4), torch.randn(*batch, 3)
    h = net(x, c)
    assert h.shape == (*batch, 2, 3, 4, 5)
    one_by_one = [net(x, c) for x, c in zip(x.reshape(-1, 2, 3, 4), c.reshape(-1, 3), strict=True)]
    for row, expected in zip(h.reshape(-1, 2, 3, 4, 5), one_by_one, strict=True):
        assert torch.allclose(row, expected, atol=1e-5)
    assert net(x, torch.randn(7, *[1] * len(batch), 3)).shape == (7, *batch, 2, 3, 4, 5)


@pytest.mark.parametrize("dtype", AIM)
@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 8), (3, 5, 4)])
def test_round_trip_takes_far_fewer_passes_than_features(dtype, name, shape):
    t = perturb(flow(shape, name).to(dtype), 0.02)().transform
    z = torch.randn(4, *shape, dtype=dtype)
    with torch.no_grad(), record_inversions() as inversions:
        x = t.inv(z)
    assert residual(t, x, z) <= AIM[dtype]
    passes = [i.iterations for i in inversions if i.problem == "triangular"]
    n = torch.Size(shape).numel()
    assert 1 <= max(passes) <= (n if n == 1 else n // 2)


def test_passes_never_exceed_features_whatever_the_weights():
    block = LDU((2, 3, 4), network=PixelCNN, activation=nn.Tanh).double()
    perturb(block, 0.5)
    y = 10 * torch.randn(8, 2, 3, 4, dtype=torch.float64)
    with torch.no_grad(), record_inversions() as inversions:
        x = block.inv(y)
    assert residual(block, x, y) <= AIM[torch.float64]
    passes = [i.iterations for i in inversions if i.problem == "triangular"]
    assert 4 < max(passes) <= 24


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 2, 2)])
def test_log_determinant(name, shape):
    t = perturb(flow(shape, name, activation=nn.Tanh).double(), 0.1)().transform
    x = torch.randn(2, *shape, dtype=torch.float64)
    with torch.no_grad():
        y, ladj = t.call_and_ladj(x)
        _, back = t.inv.call_and_ladj(y)
    assert torch.allclose(ladj, slogdet(t, x, 3), atol=1e-10)
    assert torch.allclose(back, slogdet(t.inv, y, 3), atol=1e-10)


def test_gradients_of_both_directions():
    options = {"network": PixelCNN, "activation": nn.Tanh, "hidden_features": (6,)}
    block = perturb(ConditionalLDU((2, 2, 2), 2, **options).double(), 0.1)
    x = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    c = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, c: block(c)(x), (x, c))
    assert torch.autograd.gradcheck(lambda x, c: block(c).inv(x), (x, c))


def test_devices_and_dtypes():
    x, c = torch.randn(5, 2, 3, 4), torch.randn(3)
    net = PixelCNN((2, 3, 4), 3, order=range(24)[::-1])
    h = net(x, c)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(x, c).dtype == torch.float32
        assert torch.allclose(net(x, c), h, atol=0.05)
    assert net.double()(x.double(), c.double()).dtype == torch.float64
    assert net.to("meta")(*(t.double().to("meta") for t in (x, c))).device.type == "meta"


def test_dropout_in_training_alone():
    net = PixelCNN((1, 4, 4), dropout=0.5)
    x = torch.randn(1, 4, 4)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def test_network_may_be_any_constructor():
    class Shift(nn.Module):
        def __init__(self, features, context, outputs, order, **options):
            super().__init__()
            self.weight = nn.Parameter((order[:, None] > order).float())

        def forward(self, x, c=None):
            return (x @ self.weight.T)[..., None]

    block = LDU(3, scale=False, network=Shift)
    x = torch.randn(5, 3)
    after = x.flip(-1).cumsum(-1).flip(-1)  # each feature and the sum of those after it
    assert torch.allclose(block(x), after.cumsum(-1), atol=1e-5)
    assert torch.allclose(block.inv(block(x)), x, atol=1e-5)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("features", (3, 4), r"'features' should be channels, height and width, got (3, 4)."),
        ("features", 12, "'features' should be channels, height and width, got (12,)."),
        ("features", (1, 0, 4), "'features' should be at least 1, got 0."),
        ("context", -1, "'context' should be at least 0, got -1."),
        ("outputs", 0, "'outputs' should be at least 1, got 0."),
        ("order", [0, 1], "'order' should hold 24 integers, got [0, 1]."),
        (
            "order",
            [1, 0, *range(2, 24)],
            "'order' should be ascending or descending for a PixelCNN, without 'randperm', got 1",
        ),
        ("hidden_features", (8, 2), "'hidden_features' should be at least 3, got 2."),
        ("kernel_size", 4, "'kernel_size' should be odd, got 4."),
        ("kernel_size", 1, "'kernel_size' should be at least 3, got 1."),
        ("kernel_size", 3.0, "'kernel_size' should be an integer, got 3.0."),
        ("dropout", 1.0, "'dropout' should be at least 0.0 and less than 1.0, got 1.0."),
        ("residual", 1, "'residual' should be True or False, got 1."),
    ],
)
def test_wrong_arguments(argument, value, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        PixelCNN(**{"features": (2, 3, 4), argument: value})


@pytest.mark.parametrize("conditioner", ["independent", "autoregressive"])
@pytest.mark.parametrize("network", [None, "pixelcnn", nn.Conv2d(1, 1, 1).weight])
def test_wrong_network(conditioner, network):
    with pytest.raises(TypeError, match="'network' should be callable, got"):
        SinusoidalFlow((1, 3, 4), conditioner=conditioner, network=network)


def test_random_order_is_not_for_images():
    with pytest.raises(ValueError, match="'order' should be ascending or descending"):
        SinusoidalFlow((1, 3, 4), network=PixelCNN, randperm=True)


def test_wrong_input():
    net = PixelCNN((2, 3, 4), context=3)
    x, c = torch.zeros(2, 3, 4), torch.zeros(3)
    with pytest.raises(ValueError, match=r"'x' should have shape \(\*, 2, 3, 4\), got \(2, 4, 3\)"):
        net(torch.zeros(2, 4, 3), c)
    with pytest.raises(TypeError, match=r"'x' should have the parameters' dtype torch\.float32"):
        net(x.double(), c)
    with pytest.raises(
        ValueError, match=r"'context' should be a tensor of shape \(\*, 3\), got None"
    ):
        net(x)
    with pytest.raises(ValueError, match=r"'context' should have shape \(\*, 3\), got \(2,\)"):
        net(x, torch.zeros(2))
    with pytest.raises(ValueError, match="'context' should be None"):
        PixelCNN((2, 3, 4))(x, c)


def test_extreme_slopes_may_take_more_passes_than_there_are_features():
    # A feature that has converged still changes by rounding errors, which the next ones amplify.
    torch.manual_seed(7)
    flow = SinusoidalFlow((1, 4, 4), network=PixelCNN, tails=False).double()
    t = perturb(flow, 0.135)().transform
    z = torch.randn(200, 1, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        assert residual(t, t.inv(z), z) <= 1e-8


def test_dropout_in_training_gets_no_more_passes():
    block = perturb(LDU((1, 2, 3), network=PixelCNN, hidden_features=(8,), dropout=0.5))
    with torch.no_grad(), record_inversions() as inversions:
        with pytest.raises(InversionError, match=r"Call '.eval\(\)' if it has dropout"):
            block.inv(torch.randn(5, 1, 2, 3))
        assert inversions[0].iterations == 6


def test_an_event_out_of_range_takes_no_more_passes():
    block = perturb(LDU((1, 2, 3), network=PixelCNN, hidden_features=(8,)), 0.1)
    y = torch.randn(5, 1, 2, 3)
    y[2, 0, 0, 0] = 1e30
    with torch.no_grad(), record_inversions() as inversions:
        with pytest.warns(InversionWarning, match="leaves the range"):
            x = block.inv(y)
        assert max(i.iterations for i in inversions if i.problem == "triangular") <= 6
    assert x[2].isnan().all()
    assert x[[0, 1, 3, 4]].isfinite().all()


def test_averaged_weights_keep_the_order():
    reverse = network((1, 3, 2), order=range(6)[::-1], hidden_features=(4,))
    averaged = AveragedModel(reverse, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(reverse)
    x = torch.randn(1, 3, 2, dtype=torch.float64)
    assert torch.allclose(averaged(x), reverse(x))
    other = network((1, 3, 2), hidden_features=(4,))
    other.load_state_dict(averaged.module.state_dict())
    assert torch.allclose(other(x), reverse(x))
