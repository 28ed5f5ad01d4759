"""Shapes: batches of parameters and of contexts leave events as they are, in mixtures too."""

import pyro.distributions as dist
import pytest
import torch
import zuko
from conftest import perturb
from zuko.distributions import Mixture, NormalizingFlow
from zuko.flows import ElementWiseTransform, Flow, MaskedAutoregressiveTransform
from zuko.transforms import (
    AdditiveTransform,
    ComposedTransform,
    MonotonicAffineTransform,
    MonotonicRQSTransform,
)

from pyro_sinflow import (
    LDU,
    ConditionalLDU,
    LazyTriangular,
    MaskedNetwork,
    SinusoidalFlow,
    SinusoidalTransform,
)

SHAPES = [(4,), (4,), (4,), (), ()]
SPLINE = {"univariate": MonotonicRQSTransform, "shapes": [(8,), (8,), (7,)]}
SINUSOID = {"univariate": SinusoidalTransform, "shapes": SHAPES}


def sinusoid(*batch):
    return SinusoidalTransform(*torch.randn(3, *batch, 4), *torch.randn(2, *batch))


def spline(*batch):
    return MonotonicRQSTransform(*torch.randn(2, *batch, 8), torch.randn(*batch, 7))


def standard(*shape):
    return dist.Normal(torch.zeros(shape), 1.0).to_event(1)


@pytest.mark.parametrize("shape", [(), (3,), (5, 3), (7, 3), (2, 7, 3)])
@pytest.mark.parametrize("batch", [(), (3,), (7, 3)])
@pytest.mark.parametrize("method", ["forward_shape", "inverse_shape"])
def test_shapes_of_a_sinusoid_are_those_of_zukos_transforms(method, batch, shape):
    expected = getattr(spline(*batch), method)(torch.Size(shape))
    for t in (sinusoid(*batch), sinusoid(*batch).inv):
        assert getattr(t, method)(torch.Size(shape)) == expected == shape


@pytest.mark.parametrize("lazy", [ElementWiseTransform, MaskedAutoregressiveTransform])
@pytest.mark.parametrize("options", [SPLINE, SINUSOID], ids=["spline", "sinusoid"])
@pytest.mark.parametrize("batch", [(), (7,), (2, 7)])
def test_a_flow_has_the_event_shape_of_its_base(lazy, options, batch):
    made = perturb(Flow([lazy(3, 2, **options)], zuko.flows.MAF(3).base))
    d = made(torch.randn(*batch, 2))
    assert d.event_shape == (3,)
    assert d.batch_shape == batch
    x = d.sample((5,))
    assert x.shape == (5, *batch, 3)
    z, ladj = d.transform.call_and_ladj(x)
    expected = d.base.log_prob(z) + (ladj.sum(-1) if ladj.shape == x.shape else ladj)
    assert expected.shape == (5, *batch)
    assert torch.allclose(d.log_prob(x), expected)


CONTEXT = torch.linspace(-1.0, 1.0, 8).view(4, 2)


def block():
    return perturb(ConditionalLDU(3, 2))


def flow(**options):
    return perturb(SinusoidalFlow(3, 2, transforms=2, **options), 0.1)


# Transforms to noise, which have a batch of four densities of vectors.
ZUKO = {
    "SinusoidalTransform": lambda: sinusoid(4, 3),
    "composed": lambda: ComposedTransform(sinusoid(3), sinusoid(4, 3)),
    "block": lambda: block()(CONTEXT),
    "inverse of a block": lambda: block().inv(CONTEXT),
    "flow": lambda: flow()(CONTEXT).transform,
    "independent": lambda: flow(conditioner="independent")(CONTEXT).transform,
}
PYRO = {
    "block.condition": lambda: block().condition(CONTEXT),
    "block.inv.condition": lambda: block().inv.condition(CONTEXT),
}


def log_probs(t, x):
    """The log-densities of each of the four, one after the other."""
    rows = x.unsqueeze(-2).expand(*x.shape[:-1], 4, 3)
    z = t(rows)
    ladj = t.log_abs_det_jacobian(rows, z)
    ladj = ladj.sum(-1) if ladj.shape == rows.shape else ladj
    return standard(3).log_prob(z) + ladj


@pytest.mark.parametrize("name", ZUKO)
def test_mixtures_of_zuko(name):
    t, logits, x = ZUKO[name](), torch.randn(4), torch.randn(6, 3)
    d = Mixture(NormalizingFlow(t, standard(4, 3)), logits)
    assert d.event_shape == (3,)
    assert d.batch_shape == ()
    expected = (logits.log_softmax(-1) + log_probs(t, x)).logsumexp(-1)
    assert torch.allclose(d.log_prob(x), expected, atol=1e-4)
    assert d.sample((5,)).shape == (5, 3)


@pytest.mark.parametrize("name", [*ZUKO, *PYRO])
@pytest.mark.parametrize("mixture", [dist.MixtureSameFamily, torch.distributions.MixtureSameFamily])
def test_mixtures_of_torch(name, mixture):
    t, logits, x = {**ZUKO, **PYRO}[name](), torch.randn(4), torch.randn(6, 3)
    d = mixture(
        dist.Categorical(logits=logits), dist.TransformedDistribution(standard(4, 3), [t.inv])
    )
    assert d.event_shape == (3,)
    assert d.batch_shape == ()
    expected = (logits.log_softmax(-1) + log_probs(t, x)).logsumexp(-1)
    assert torch.allclose(d.log_prob(x), expected, atol=1e-4)
    assert d.sample((5,)).shape == (5, 3)


def test_mixtures_of_one_flow_under_many_contexts():
    lazy, logits, x = flow(), torch.randn(4), torch.randn(6, 3)
    d = Mixture(lazy(CONTEXT), logits)
    each = torch.stack([lazy(c).log_prob(x) for c in CONTEXT], dim=-1)
    assert torch.allclose(d.log_prob(x), (logits.log_softmax(-1) + each).logsumexp(-1), atol=1e-4)
    assert d.sample((5,)).shape == (5, 3)


def test_a_batch_of_bases_needs_no_batch_of_parameters():
    d = dist.TransformedDistribution(standard(4, 3), [perturb(LDU(3))])
    assert d.batch_shape == (4,)
    assert d.event_shape == (3,)
    assert d.log_prob(d.sample((5,))).shape == (5, 4)


@pytest.mark.parametrize(
    ("univariate", "shapes"), [(AdditiveTransform, [()]), (MonotonicAffineTransform, [(), ()])]
)
def test_one_row_under_a_batch_of_contexts(univariate, shapes):
    lazy = LazyTriangular(MaskedNetwork(3, 2, len(shapes)), 3, univariate, shapes)
    x, c = torch.randn(3), torch.randn(5, 2)
    y, ladj = lazy(c).call_and_ladj(x)
    assert y.shape == (5, 3)
    assert ladj.shape == (5,)
    expected = [lazy(row).call_and_ladj(x) for row in c]
    assert torch.allclose(y, torch.stack([row for row, _ in expected]))
    assert torch.allclose(ladj, torch.stack([row for _, row in expected]))
    assert torch.allclose(lazy(c).inv(y), x.expand(5, 3), atol=1e-5)
