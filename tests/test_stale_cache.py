"""The cache of transforms does not go stale: whatever changes, values are computed anew."""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyro
import pytest
import torch
from conftest import perturb
from torch import nn
from torch.distributions import AffineTransform, ComposeTransform
from torch.fx.experimental.proxy_tensor import make_fx
from zuko.transforms import AdditiveTransform

from pyro_sinflow import (
    LDU,
    LDUTransform,
    MaskedNetwork,
    Sinusoidal,
    SinusoidalTransform,
    TriangularTransform,
    conditional_ldu,
)


def test_loading_parameters_invalidates_the_cache():
    t, other = perturb(LDU(3)), perturb(LDU(3))
    x = torch.randn(3)
    with torch.no_grad():
        before = t(x)
        t.load_state_dict(other.state_dict())
        assert not torch.equal(t(x), before)
        assert torch.equal(t(x), other(x))


def pairs():
    """Transforms that cache, each with a parameter that it depends on."""
    module, lazy = perturb(LDU(3)), perturb(conditional_ldu(3, 1))
    yield module, module.block.lower.network.bias
    yield lazy.condition(torch.zeros(1)), lazy.lower.network.bias
    shift = torch.randn(3, requires_grad=True)
    yield SinusoidalTransform(*torch.randn(3, 3, 4), torch.ones(3), shift, cache_size=1), shift
    loc = torch.randn(3, requires_grad=True)
    part = TriangularTransform(lambda x: AdditiveTransform(torch.zeros(3)))
    yield LDUTransform(part, AffineTransform(loc, 1.0), part, cache_size=1), loc


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("case", range(4))
def test_the_cache_never_goes_stale(case, inverse):
    t, parameter = [*pairs()][case]
    f = t.inv if inverse else t
    x = torch.randn(5, 3)
    with torch.no_grad():
        y = f(x)
        assert f.inv(y) is x
        assert f(x) is y
    assert f.inv(y).requires_grad  # what was computed without a graph is not enough
    for changed in ("parameter", "x", "y"):
        with torch.no_grad():
            y = f(x)
            assert f.inv(y) is x
            {"parameter": parameter, "x": x, "y": y}[changed].add_(1.0)
            back = f.inv(y)
            assert back is not x
            assert torch.equal(back, f.inv(y.clone()))
    y = f(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert f.inv(y) is not x
    with torch.inference_mode():
        assert f.inv(y) is not x


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.Adam, lr=0.1),
        partial(torch.optim.Adam, lr=0.1, fused=True),
        partial(torch.optim.SGD, lr=0.1, fused=True),
        partial(pyro.optim.clipped_adam.ClippedAdam, lr=0.1),
    ],
)
def test_the_cache_sees_steps_of_optimizers(optimizer):
    """Some of them change parameters without a new version."""
    t = perturb(LDU(3))
    step = optimizer(t.parameters())
    with torch.no_grad():
        y = t(x := torch.randn(5, 3))
        assert t.inv(y) is x
    for p in t.parameters():
        p.grad = torch.ones_like(p)
    step.step()
    with torch.no_grad():
        assert t.inv(y) is not x
        assert torch.equal(t.inv(y), t.inv(y.clone()))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("record", [make_fx, lambda f: lambda y: torch.jit.trace(f, (y,))])
def test_the_cache_is_not_recorded(record):
    t = perturb(LDU(3, sinusoids=1)).requires_grad_(False)
    with torch.no_grad():
        y, other = t(torch.randn(5, 3)), torch.randn(5, 3)
        recorded = record(lambda y: 1.0 * t.inv(y))(y)
        assert torch.allclose(recorded(other), t.inv(other), atol=1e-5)


def test_the_cache_knows_none_but_its_own_tensors():
    t, x = perturb(LDU(3)), torch.randn(3)
    y = t(x)
    assert t(x) is not y  # it was given x, and has not returned it
    y = t(x)
    assert t.inv(y) is x
    assert t(x) is y  # now it has
    assert t.inv(y.clone()) is not x


def test_what_does_not_tell_that_it_changes_is_not_cached():
    t = perturb(LDU(3))
    with torch.inference_mode():
        x = torch.randn(5, 3)
        before = t(x).clone()
        x.add_(1.0)
        assert not torch.allclose(t(x), before)


def test_the_cache_sees_the_parts_of_a_block():
    scale = torch.ones(3)
    part = TriangularTransform(lambda x: AdditiveTransform(torch.zeros(3)))
    diagonal = ComposeTransform([AffineTransform(0.0, scale), AffineTransform(0.0, 2.0).inv])
    t = LDUTransform(part, diagonal, part, cache_size=1)
    x = torch.randn(5, 3)
    before = t(x).clone()
    scale.mul_(2.0)
    assert torch.allclose(t(x), 2 * before)


def test_the_cache_sees_what_a_conditioner_holds():
    shifts, listed, count = {"of": torch.zeros(3)}, [torch.zeros(3)], 0.0

    def conditioner(x):
        return AdditiveTransform(shifts["of"] + listed[0] + count)

    t = TriangularTransform(conditioner, cache_size=1)
    x = torch.randn(5, 3)
    y = t(x)
    assert t.inv(y) is x
    shifts["of"].add_(1.0)
    assert torch.allclose(t(x), x + 1)
    listed[0] = torch.ones(3)
    assert torch.allclose(t(x), x + 2)
    shifts["of"] = torch.zeros(3)
    assert torch.allclose(t(x), x + 1)
    count = 1.0
    assert torch.allclose(t(x), x + 2)


def test_the_cache_sees_numbers():
    t = perturb(Sinusoidal(3))
    x = torch.randn(5, 3)
    y = t(x)
    t.min_slope = 0.5
    assert torch.equal(t.log_abs_det_jacobian(x, y), t.with_cache(0).log_abs_det_jacobian(x, y))


def test_threads_share_a_cache():
    t = perturb(LDU(3))
    inputs = torch.randn(4, 3).unbind()
    expected = [t.with_cache(0).call_and_ladj(x) for x in inputs]

    @torch.no_grad()
    def wrong(i):
        count = 0
        for _ in range(200):
            y = t(inputs[i])
            ladj = t.log_abs_det_jacobian(inputs[i], y)
            count += not all(map(torch.allclose, (y, ladj), expected[i]))
            count += not torch.allclose(t.inv(y), inputs[i], atol=1e-5)
        return count

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(wrong, range(4))) == 0
    finally:
        sys.setswitchinterval(interval)


class Conditioner(nn.Module):
    """Shifts by what a network returns, times its buffer."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return AdditiveTransform(self.network.factor * self.network(x).squeeze(-1))


def test_the_cache_sees_buffers_and_modes():
    x = torch.randn(64, 3)
    module = MaskedNetwork(3, hidden_features=(64,), dropout=0.5)
    module.register_buffer("factor", torch.ones(()))
    with torch.no_grad():
        module.set_bias(torch.ones(3, 1))
    t = TriangularTransform(Conditioner(module), cache_size=1)
    before = t(x)
    module.factor.mul_(2.0)
    assert not torch.equal(t(x), before)
    before = t(x)
    module.eval()
    assert not torch.equal(t(x), before)
    block = perturb(LDU(3, dropout=0.5))
    before = block(x)
    block.block.eval()
    assert not torch.equal(block(x), before)
