"""Linear maps and the compression of tails as options of 'SinusoidalFlow'."""

import copy
import math

import pytest
import torch
from conftest import perturb, slogdet
from torch import nn
from torch.autograd.functional import jacobian
from zuko.lazy import UnconditionalTransform

from pyro_sinflow import PixelCNN, SinusoidalFlow
from pyro_sinflow.element_wise import Asinh
from pyro_sinflow.linear import Linear

BATCHES = [(), (5,), (2, 3)]
TREE = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]])


def kinds(flow):
    return [type(part) for part in flow().transform.transforms]


@pytest.mark.parametrize("conditioner", ["autoregressive", "independent"])
@pytest.mark.parametrize(
    ("options", "linear", "tails"),
    [
        ({}, True, True),
        ({"linear": None}, True, True),
        ({"linear": True, "tails": False}, True, False),
        ({"linear": False, "tails": True}, False, True),
        ({"linear": False, "tails": False}, False, False),
    ],
)
def test_what_a_flow_of_vectors_is_made_of(options, linear, tails, conditioner):
    flow = SinusoidalFlow(3, transforms=2, conditioner=conditioner, **options)
    first, *rest = kinds(flow) if tails else (Asinh, *kinds(flow))
    assert first is Asinh
    assert Asinh not in rest
    assert [kind is Linear for kind in rest] == [True, False] * 2 * linear + (
        [False] if linear else [False] * 3
    )


@pytest.mark.parametrize(
    ("features", "options"),
    [
        ((1, 2, 2), {}),
        ((1, 2, 2), {"network": PixelCNN, "hidden_features": (4,)}),
        ((2, 3), {}),
        (3, {"adjacency": TREE}),
    ],
)
def test_linear_maps_are_off_for_images_and_with_adjacency(features, options):
    for linear in (None, False):
        flow = SinusoidalFlow(features, linear=linear, **options)
        assert Linear not in kinds(flow)
        assert kinds(flow)[0] is Asinh
    with pytest.raises(ValueError, match="'linear' should be False"):
        SinusoidalFlow(features, linear=True, **options)


def test_wrong_options():
    with pytest.raises(ValueError, match=r"'linear' .* not vectors, got \(1, 2, 2\)"):
        SinusoidalFlow((1, 2, 2), linear=True)
    with pytest.raises(ValueError, match=r"'linear' .* 'adjacency'"):
        SinusoidalFlow(3, linear=True, adjacency=TREE)
    for value in (1, 0, "yes", None):
        with pytest.raises(TypeError, match="'tails' should be True or False, got"):
            SinusoidalFlow(3, tails=value)
    for value in (1, 0, "yes"):
        with pytest.raises(TypeError, match="'linear' should be True or False, got"):
            SinusoidalFlow(3, linear=value)


@pytest.mark.parametrize("conditioner", ["autoregressive", "independent"])
def test_an_adjacency_is_kept(conditioner):
    if conditioner == "independent":  # whose blocks have none
        with pytest.raises(TypeError, match="'adjacency'"):
            SinusoidalFlow(3, conditioner=conditioner, adjacency=TREE)
        return
    flow = perturb(SinusoidalFlow(3, transforms=1, adjacency=TREE), 0.3)
    found = sum(jacobian(flow().transform, x).abs() for x in torch.randn(20, 3)) > 0
    assert torch.equal(found, TREE.bool())


@pytest.mark.parametrize("features", [1, 3, (1, 2, 2)])
@pytest.mark.parametrize("conditioner", ["autoregressive", "independent"])
@pytest.mark.parametrize("batch", BATCHES)
def test_conditional_flows_pass_the_context(batch, conditioner, features):
    options = {"transforms": 2, "conditioner": conditioner, "activation": nn.Tanh}
    flow = perturb(SinusoidalFlow(features, 2, **options).double(), 0.2)
    shape = (features,) if isinstance(features, int) else features
    c, x = torch.randn(*batch, 2).double(), torch.randn(*batch, *shape).double()
    d = flow(c)
    assert d.batch_shape == batch
    log_prob = d.log_prob(x)
    assert log_prob.shape == batch
    assert not torch.allclose(flow(c + 1).log_prob(x), log_prob)
    z, ladj = d.transform.call_and_ladj(x)
    assert torch.allclose(d.transform.inv(z), x, atol=1e-9)
    rows = zip(c.view(-1, 2), x.view(-1, *shape), ladj.view(-1), strict=True)
    for row_c, row_x, row_ladj in rows:
        t = flow(row_c).transform
        assert torch.allclose(row_ladj, slogdet(t, row_x, len(shape)), atol=1e-9)
    for c, message in ((None, "should be a tensor"), (torch.zeros(3).double(), "should have")):
        with pytest.raises(ValueError, match=message):
            flow(c).log_prob(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_flow_scores_outliers(dtype):
    flow = perturb(SinusoidalFlow(2), 0.03).to(dtype)
    x = torch.tensor([[0.0, 1e-6], [1e4, -1e4], [1e19, -1e19], [1e30, 0.0]], dtype=dtype)
    x.requires_grad_()
    log_prob = flow().log_prob(x)
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in flow.parameters())
    expected = copy.deepcopy(flow).double()().log_prob(x.double())
    assert torch.allclose(log_prob.double(), expected, rtol=1e-3)


def test_all_parameters_learn():
    flow = SinusoidalFlow(3, transforms=2)
    flow().log_prob(torch.randn(100, 3)).mean().backward()
    for part in flow.transform.transforms:
        if isinstance(part, UnconditionalTransform):
            (parameter,) = part.parameters()
            assert (parameter.grad != 0).all()


def test_a_linear_map_learns_a_correlation():
    mix = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.5, 0.0], [-0.5, 0.8, 0.5]])
    x = torch.randn(2000, 3) @ mix.T
    lazy = UnconditionalTransform(Linear, torch.zeros(3, 3))
    optimizer = torch.optim.Adam(lazy.parameters(), lr=0.05)
    normal = torch.distributions.Normal(0.0, 1.0)
    for _ in range(500):
        z, ladj = lazy().call_and_ladj(x)
        loss = -(normal.log_prob(z).sum(dim=-1) + ladj).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    entropy = 1.5 * math.log(2 * math.pi * math.e) + mix.det().log()
    assert abs(loss - entropy) < 0.1
