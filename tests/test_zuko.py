"""At home in zuko: mixed with its transforms, saved, pickled, and every option of the flow."""

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
import zuko
from conftest import perturb
from torch import nn
from zuko.flows import ElementWiseTransform, GeneralCouplingTransform, MaskedAutoregressiveTransform
from zuko.lazy import Flow, UnconditionalTransform

from pyro_sinflow import (
    LDU,
    ConditionalLDU,
    SinusoidalFlow,
    SinusoidalTransform,
    fast_inverse,
    record_inversions,
)

OPTIONS = [
    {},
    {"linear": False, "tails": False},
    {"conditioner": "independent"},
    {"conditioner": "independent", "scale": False},
    {"conditioner": "independent", "context_diagonal": True},
    {"randperm": True, "residual": True, "activation": nn.ELU, "hidden_features": (32,) * 3},
    {"sinusoids": 1, "components": 1, "transforms": 1},
    {"conditioner": "independent", "randperm": True, "residual": True, "sinusoids": 3},
]


def standard(features):
    return zuko.flows.MAF(features).base


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("features", [1, 5, (2, 3, 3)])
@pytest.mark.parametrize("context", [0, 4])
def test_stands_where_nsf_stands(options, features, context):
    flow = perturb(SinusoidalFlow(features, context, **options), 0.05)
    shape = (features,) if isinstance(features, int) else features
    c = torch.randn(7, context) if context else None
    batch = (7,) if context else ()
    d = flow(c)
    assert d.event_shape == shape
    assert d.batch_shape == batch
    x = d.rsample((3,))
    assert x.shape == (3, *batch, *shape)
    x, log_prob = d.rsample_and_log_prob((3,))
    assert torch.allclose(d.log_prob(x), log_prob, atol=1e-3)
    flow(c).log_prob(x.detach()).mean().neg().backward()
    for name, p in flow.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    assert "SinusoidalFlow(" in repr(flow)


def test_starts_near_the_base():
    flow = SinusoidalFlow(3, transforms=4)
    x = torch.randn(100, 3)
    tails, *parts, last = flow.transform.transforms
    assert ((tails()(x) - x).abs() <= (0.31 * x).square() * x.abs() / 6 + 1e-6).all()
    for linear, triangular in zip(parts[::2], parts[1::2], strict=True):
        assert torch.equal(linear()(x), x)
        triangular.network.mlp[-1].weight.data.zero_()  # of what the network sees, the bias is left
        assert torch.equal(triangular()(x), x)
    assert torch.equal(last()(x), x)


def test_blocks_start_near_the_base():
    flow = SinusoidalFlow(3, transforms=4, conditioner="independent")
    x = torch.randn(100, 3)
    _, *parts, last = flow.transform.transforms
    for linear, block in zip(parts[::2], parts[1::2], strict=True):
        assert torch.equal(linear()(x), x)
        assert torch.equal(block().diagonal(x), x)
    assert torch.equal(last()(x), x)


def test_mixes_with_zukos_transforms():
    flow = Flow(
        [
            ConditionalLDU(4, context=2),
            MaskedAutoregressiveTransform(4, 2),
            GeneralCouplingTransform(4, 2, mask=torch.arange(4) % 2 == 0),
            ConditionalLDU(4, context=2, scale=False).inv,
            UnconditionalTransform(zuko.transforms.RotationTransform, torch.randn(4, 4)),
            UnconditionalTransform(
                SinusoidalTransform, *torch.randn(3, 4, 3), torch.randn(4), torch.randn(4)
            ),
        ],
        standard(4),
    )
    c = torch.randn(5, 2)
    x = flow(c).sample((3,))
    assert x.shape == (3, 5, 4)
    log_prob = flow(c).log_prob(x)
    assert log_prob.shape == (3, 5)
    log_prob.sum().backward()
    z = flow(c).transform(x)
    assert torch.allclose(flow(c).transform.inv(z), x, atol=1e-3)


@pytest.mark.parametrize("lazy", [MaskedAutoregressiveTransform, ElementWiseTransform])
def test_sinusoid_as_univariate(lazy):
    shapes = [(4,), (4,), (4,), (), ()]
    t = lazy(3, 2, univariate=SinusoidalTransform, shapes=shapes)
    c, x = torch.randn(2), torch.randn(5, 3)
    assert "SinusoidalTransform(components: 4" in repr(t)
    assert torch.allclose(t(c).inv(t(c)(x)), x, atol=1e-4)
    triangular = lazy is MaskedAutoregressiveTransform
    with nullcontext() if triangular else pytest.warns(UserWarning, match="no MaskedAuto"):
        fast = fast_inverse(Flow([t], standard(3)))
    with record_inversions() as records:
        assert torch.allclose(fast(c).transform.inv(t(c)(x)), x, atol=1e-4)
    assert any(r.problem == "triangular" for r in records) == triangular


@pytest.mark.parametrize("options", OPTIONS)
def test_state_dict_and_pickle(options):
    flow = perturb(SinusoidalFlow(3, 2, **options), 0.05)
    c, x = torch.randn(2), torch.randn(5, 3)
    expected = flow(c).log_prob(x)

    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    again = SinusoidalFlow(3, 2, **options)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again(c).log_prob(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(flow))(c).log_prob(x), expected)
    assert torch.equal(copy.deepcopy(flow)(c).log_prob(x), expected)
    with pytest.warns(UserWarning, match="SinusoidalFlow has no MaskedAutoregressiveTransform"):
        fast = fast_inverse(flow)
    assert torch.equal(fast(c).log_prob(x), expected)

    file = io.BytesIO()
    torch.save(flow, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(c).log_prob(x), expected)


def test_random_orders_survive_a_state_dict():
    flow = perturb(SinusoidalFlow(6, transforms=2, randperm=True).double())
    torch.manual_seed(123)
    other = SinusoidalFlow(6, transforms=2, randperm=True).double()
    other.load_state_dict(flow.state_dict())
    x = torch.randn(5, 6).double()
    assert torch.equal(other().log_prob(x), flow().log_prob(x))
    z = flow().transform(x)
    assert torch.allclose(other().transform.inv(z), x, atol=1e-3)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_context_may_have_a_larger_batch_than_features(options):
    flow = perturb(SinusoidalFlow(3, 2, **{"transforms": 2, **options}), 0.1)
    for c, x in ((torch.randn(4, 2), torch.randn(3)), (torch.randn(4, 5, 2), torch.randn(5, 3))):
        rows = x.expand(*c.shape[:-1], 3)
        assert torch.allclose(flow(c).log_prob(x), flow(c).log_prob(rows), atol=1e-5)
        t = flow(c).transform
        for direction in (t, t.inv):
            few, many = direction.call_and_ladj(x), direction.call_and_ladj(rows)
            assert torch.allclose(few[0], many[0], atol=1e-5)
            assert torch.allclose(few[1], many[1], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fast_inverse_of_a_flow_in_half_precision(dtype):
    flow = zuko.flows.MAF(3, 2).to(dtype)
    c = torch.randn(2, dtype=dtype)
    fast = fast_inverse(flow)(c)
    x = fast.sample((100,))
    assert torch.allclose(fast.transform.inv(fast.transform(x)), x, atol=1e-5)
    ours, zukos = fast.log_prob(x.to(dtype)), flow(c).log_prob(x.to(dtype))
    assert torch.allclose(ours, zukos.to(ours), atol=0.5)


class Embedded(zuko.flows.MAF):
    """A flow with a method of its own, as users write them."""

    def __init__(self):
        super().__init__(3, 2)
        self.net = torch.nn.Linear(4, 2)

    def forward(self, c):
        return super().forward(self.net(c))


def test_fast_inverse_keeps_the_class_of_a_flow():
    flow, c, x = Embedded().eval(), torch.randn(5, 4), torch.randn(5, 3)
    fast = fast_inverse(flow)
    assert torch.allclose(fast(c).log_prob(x), flow(c).log_prob(x))
    assert {*map(id, fast.parameters())} == {*map(id, flow.parameters())}
    assert not fast.training
    assert isinstance(flow.transform.transforms[0], zuko.flows.MaskedAutoregressiveTransform)
    fast.register_forward_hook(lambda *_: pytest.fail("This is another module."))
    flow(c)


def test_order():
    order = [2, 0, 1]
    block = perturb(ConditionalLDU(3, order=order))
    jacobian = torch.autograd.functional.jacobian(block().lower, torch.randn(3))
    rank = torch.tensor(order)
    assert torch.equal(jacobian != 0, rank[:, None] >= rank)
    jacobian = torch.autograd.functional.jacobian(block().upper, torch.randn(3))
    assert torch.equal(jacobian != 0, rank[:, None] <= rank)


def test_zuko_transforms_compose_with_a_module():
    t = zuko.transforms.ComposedTransform(LDU(3), zuko.transforms.SoftclipTransform(bound=9.0))
    x = torch.randn(5, 3)
    y, ladj = t.call_and_ladj(x)
    assert ladj.shape == (5,)
    assert torch.allclose(t.inv(y), x, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_distribution_follows_its_flow(options, context, dtype):
    flow = perturb(SinusoidalFlow(3, context, **options), 0.05).to(dtype)
    c = torch.randn(5, context, dtype=dtype) if context else None
    d, x = flow(c), torch.randn(5, 3)
    for _ in range(2):  # each use has a graph of its own
        d.log_prob(x).mean().backward()
        d.rsample().mean().backward()
    assert all(p.grad is not None for p in flow.parameters())
    before = d.log_prob(x)
    perturb(flow)
    assert torch.equal(d.log_prob(x), flow(c).log_prob(x))
    assert not torch.equal(d.log_prob(x), before)


@pytest.mark.parametrize("options", OPTIONS)
def test_contexts_of_half_precision(options):
    flow = perturb(SinusoidalFlow(3, 2, **options), 0.05)
    c, x = torch.randn(5, 2).half(), torch.randn(5, 3)
    assert torch.allclose(flow(c).log_prob(x), flow(c.float()).log_prob(x))


def test_records_inside_of_records():
    flow = SinusoidalFlow(3, transforms=1)
    with record_inversions() as outer:
        flow().sample((2,))
        with record_inversions() as inner:
            flow().sample((2,))
    assert len(outer) == 2 * len(inner) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": False}, "'scale' should be True for conditioner='autoregressive', got False"),
        (
            {"context_diagonal": True},
            "'context_diagonal' should be False for conditioner='autoregressive', got True",
        ),
        ({"network": lambda *args, **kwargs: nn.Identity()}, r"'set_bias\(bias\)'.*got Identity"),
        ({"residual": "no"}, "'residual' should be True or False, got 'no'"),
        ({"dropout": -0.1}, "'dropout' should be at least 0.0 and less than 1.0, got -0.1"),
    ],
)
def test_options_of_the_autoregressive_conditioner(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SinusoidalFlow(3, **options)
