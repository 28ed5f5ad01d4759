"""Forward substitution agrees with passes through the whole network, and knows its limits."""

import copy
from itertools import pairwise

import pytest
import torch
import zuko
from conftest import perturb, residual
from torch import nn
from torch.distributions import AffineTransform

from pyro_sinflow import (
    LDU,
    ConditionalLDU,
    FastInverse,
    InversionWarning,
    LazyTriangular,
    MaskedNetwork,
    SinusoidalFlow,
    autoregressive,
    fast_inverse,
    record_inversions,
)
from pyro_sinflow.sequential import StagedEvaluation, Stages

CASES = {
    "shift": lambda c: ConditionalLDU(11, c, scale=False),
    "scale": lambda c: ConditionalLDU(11, c, residual=True, hidden_features=(32,) * 4),
    "order": lambda c: ConditionalLDU(11, c, order=torch.randperm(11)),
    "linear": lambda c: ConditionalLDU(11, c, hidden_features=()),
    "dropout": lambda c: ConditionalLDU(11, c, dropout=0.5),
    "image": lambda c: ConditionalLDU((2, 3, 2), c),
    "one": lambda c: ConditionalLDU(1, c),
    "autoregressive": lambda c: SinusoidalFlow((11,), c, transforms=2, activation=nn.ELU).transform,
    "MAF": lambda c: fast_inverse(zuko.flows.MAF(11, c, transforms=2, randperm=True)).transform,
    "NSF": lambda c: fast_inverse(zuko.flows.NSF(11, c, transforms=2, residual=True)).transform,
    "coupling": lambda c: (
        fast_inverse(
            zuko.lazy.Flow(zuko.flows.MaskedAutoregressiveTransform(11, c, passes=2), None)
        ).transform
    ),
}


@pytest.fixture
def calls(monkeypatch):
    """Makes substitution the rule for batches of any size, and counts the networks it inverts."""
    made = []

    class Counted(StagedEvaluation):
        def __init__(self, *args):
            made.append(self)
            super().__init__(*args)

    monkeypatch.setattr(autoregressive, "_ROWS_PER_STAGE", 0)
    monkeypatch.setattr(autoregressive, "StagedEvaluation", Counted)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_whole_passes(name, context, dtype, calls, monkeypatch):
    lazy = perturb(CASES[name](context).to(dtype), 0.05).eval()
    features = {"image": (2, 3, 2), "one": (1,)}.get(name, (11,))
    t = lazy(torch.randn(4, 3, dtype=dtype) if context else None)
    y = torch.randn(6, 4, *features, dtype=dtype)
    with torch.no_grad():
        x = t.inv(y)
        constant = name == "one" and context == 0  # nothing to depend on, and no network
        assert len(calls) == (0 if constant else 1 if name == "coupling" else 2)
        monkeypatch.setattr(autoregressive, "_ROWS_PER_STAGE", 10**9)
        monkeypatch.setattr(autoregressive, "_ENOUGH_ROWS", 10**9)
        whole = t.inv(y)
        assert len(calls) <= 2
    eps = torch.finfo(dtype).eps
    assert residual(t, x, y) <= 32 * eps
    assert torch.allclose(x, whole, rtol=100 * eps, atol=100 * eps)
    assert x.shape == y.shape


@pytest.mark.parametrize("size", [1, 2, 5, 11, 20])
def test_stages_agree_with_the_network_whatever_their_size(size):
    network = perturb(MaskedNetwork(11, 3, 2, hidden_features=(16, 16)).double())
    x, c = torch.randn(7, 11).double(), torch.randn(7, 3).double()
    stages = Stages(network, 11, size)
    assert torch.cat(stages.stages).tolist() == [*range(11)]
    assert [i for block in stages.blocks for i in block] == [*range(12)]
    assert [len(block) for block in stages.blocks[1:-1]] == [size] * (-(-11 // size) - 1)
    with torch.no_grad():
        evaluation = StagedEvaluation(stages, c, 7)
        whole = network(x, c)
        for known, following in pairwise(stages.stages):
            h = evaluation.advance(x[:, known].t())
            expected = whole[:, following]
            assert torch.allclose(h.t().reshape(expected.shape), expected, atol=1e-12)


def test_a_coupling_has_two_stages():
    network = zuko.flows.MaskedAutoregressiveTransform(12, passes=2).hyper
    stages = Stages(network, 12)
    assert [len(features) for features in stages.stages] == [0, 6, 6]
    assert [*map(len, stages.blocks)] == [1, 2]


def test_sees_new_weights_and_new_masks(calls):
    flow = SinusoidalFlow(9, transforms=1, randperm=True)
    y = torch.randn(5, 9)
    with torch.no_grad():
        flow().transform.inv(y)
        flow.load_state_dict(
            perturb(SinusoidalFlow(9, transforms=1, randperm=True), 0.1).state_dict()
        )
        assert residual(flow().transform, flow().transform.inv(y), y) <= 1e-5
        other = copy.deepcopy(flow)
        assert torch.equal(other().transform.inv(y), flow().transform.inv(y))


def test_gradients_do_not_depend_on_it(calls, monkeypatch):
    t = perturb(LDU(7).double())
    y = torch.randn(5, 7).double()
    grads = []
    monkeypatch.setattr(autoregressive, "_ENOUGH_ROWS", 10**9)
    for least in (0, 10**9):
        monkeypatch.setattr(autoregressive, "_ROWS_PER_STAGE", least)
        grads.append(torch.autograd.grad(t.inv(y).sin().sum(), [*t.parameters()]))
        t.clear_cache()
    assert len(calls) == 2
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


class Own(nn.Module):
    """An activation of the user's."""

    def forward(self, x):
        return x.sin()


ACTIVATIONS = {"activation with parameters": nn.PReLU, "activation of the user's": Own}
CHANGES = {
    "hook": lambda network: network.mlp[0].register_forward_hook(lambda *_: None),
    "pre-hook": lambda network: network.mlp[0].register_forward_pre_hook(lambda *_: None),
    "forward": lambda network: setattr(network.mlp[0], "forward", network.mlp[0].forward),
    "softmax": lambda network: network.mlp.__setitem__(1, nn.Softmax(-1)),
}


@pytest.mark.parametrize("change", ["dropout", "autocast", "global hook", *CHANGES, *ACTIVATIONS])
def test_leaves_other_networks_alone(change, calls):
    options = {"activation": ACTIVATIONS[change]} if change in ACTIVATIONS else {}
    network = MaskedNetwork(6, dropout=0.5 if change == "dropout" else 0.0, **options)
    t = LazyTriangular(network, 6, zuko.transforms.AdditiveTransform, [()])()
    if change in CHANGES:
        CHANGES[change](network)
    hook = None
    if change == "global hook":
        hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
            assert t.map.frozen(torch.randn(5, 6)) is None
        assert not calls
    finally:
        if hook is not None:
            hook.remove()


def test_a_batch_keeps_the_events_that_stay_in_range(calls, monkeypatch):
    t = LDU(4, hidden_features=(8,)).block.lower()
    with torch.no_grad():
        for p in t.map.network.parameters():
            p.fill_(1.0)
    y = torch.randn(5, 4)
    y[2] = 1e30
    monkeypatch.setattr(autoregressive, "_ENOUGH_ROWS", 10**9)
    for least in (0, 10**9):
        monkeypatch.setattr(autoregressive, "_ROWS_PER_STAGE", least)
        with pytest.warns(InversionWarning, match="leaves the range of torch.float32 in 1 of 5"):
            x = t.inv(y)
        keep = torch.tensor([0, 1, 3, 4])
        assert x[keep].isfinite().all()
        assert x[2].isnan().all()
        assert residual(t, x[keep], y[keep]) <= 1e-5


def test_leaves_modules_alone_that_are_not_as_they_were_made(calls):
    class Embedded(zuko.flows.MaskedAutoregressiveTransform):
        def forward(self, c):
            return super().forward((c - 1) / 2)

    hooked = perturb(ConditionalLDU(5, 2)).lower
    hooked.network.register_forward_hook(lambda module, args, h: h / 2)
    c, y = torch.randn(2), torch.randn(50, 5)
    with torch.no_grad():
        for t in (FastInverse(perturb(Embedded(5, 2), 0.1))(c), hooked(c)):
            assert residual(t, t.inv(y), y) <= 1e-5
    assert not calls


def test_leaves_transforms_alone_that_know_their_feature(calls):
    flow = fast_inverse(zuko.flows.NAF(5, transforms=1))
    with torch.no_grad():
        flow().transform.inv(torch.randn(3, 5))
    assert not calls


def test_settles_all_in_one_pass(calls):
    t = perturb(LDU(32), 0.1).block.lower()
    with torch.no_grad(), record_inversions() as inversions:
        t.inv(torch.randn(5, 32))
    assert inversions == [("triangular", 1, 160)]


def test_is_for_batches_that_are_large_enough(calls, monkeypatch):
    monkeypatch.setattr(autoregressive, "_ROWS_PER_STAGE", 3)
    # There is a stage for each feature, if there are enough hidden units, and one for the context.
    for features, least in [(8, 27), (200, 384)]:
        t = perturb(LDU(features, hidden_features=(200,)), 0.01).block.lower()
        for rows in (least - 1, least):
            made = len(calls)
            with torch.no_grad():
                t.inv(torch.randn(rows, features))
            assert len(calls) == made + (rows == least)


@pytest.mark.parametrize("name", ["shift", "scale", "MAF"])
def test_wrong_sizes_are_not_its_business(name, calls):
    t = CASES[name](0)()
    with torch.no_grad():
        assert t.inv(torch.randn(50, 11)).shape == (50, 11)
        made = len(calls)
        with pytest.raises((ValueError, RuntimeError), match=r"\(50, 12\)|50x12"):
            t.inv(torch.randn(50, 12))
        assert len(calls) == made


@pytest.mark.parametrize("rows", [2, 500])
@pytest.mark.parametrize("c", [None, torch.zeros(3)])
def test_a_missing_or_wrong_context_is_an_error(c, rows):
    """Not the samples of a context of zeros."""
    flow = zuko.flows.MAF(3, context=2)
    for wrapped in (flow, fast_inverse(flow)):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            wrapped(c).sample((rows,))


def test_a_function_gets_the_parameters_of_all_features(calls):
    scale = torch.tensor([0.5, 1.0, 2.0])
    network = perturb(MaskedNetwork(3))
    t = LazyTriangular(network, 3, lambda shift: AffineTransform(shift, scale), [()])()
    for rows in (2, 3, 1000):
        y = torch.randn(rows, 3)
        with torch.no_grad():
            assert residual(t, t.inv(y), y) <= 1e-5
    assert not calls


def test_a_subclass_with_another_constructor():
    class Twice(zuko.lazy.LazyComposedTransform):
        def __init__(self, features):
            make = zuko.flows.MaskedAutoregressiveTransform
            super().__init__(make(features), make(features))

    flow = zuko.lazy.Flow(perturb(Twice(3), 0.1), zuko.flows.MAF(3).base)
    fast = fast_inverse(flow)
    assert type(fast.transform) is Twice
    assert all(isinstance(part, FastInverse) for part in fast.transform.transforms)
    assert not any(isinstance(part, FastInverse) for part in flow.transform.transforms)
    x = torch.randn(5, 3)
    assert torch.equal(fast().log_prob(x), flow().log_prob(x))


def test_runs_in_inference_mode():
    with torch.inference_mode():
        flow = SinusoidalFlow(4, transforms=1)
        assert flow().sample((50,)).shape == (50, 4)


def test_takes_a_context_of_half_precision(calls):
    block = perturb(ConditionalLDU(4, context=2))
    c, y = torch.randn(50, 2).bfloat16(), torch.randn(50, 4)
    with torch.no_grad():
        x = block.lower(c).inv(y)
        assert len(calls) == 1
        assert residual(block.lower(c), x, y) <= 1e-5


def test_skips_carry_what_masks_do_not(calls):
    network = perturb(MaskedNetwork(6, hidden_features=(16, 16), residual=True), 0.5)
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, zuko.nn.Residual):
                part[-1].mask.zero_()
        t = LazyTriangular(network, 6, zuko.transforms.AdditiveTransform, [()])()
        y = torch.randn(20, 6)
        assert residual(t, t.inv(y), y) <= 1e-6
    assert len(calls) == 1


def test_residual_branches_that_see_more_are_left_to_passes():
    network = MaskedNetwork((3,), outputs=1, hidden_features=(8, 8), residual=True)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.5 * torch.randn_like(p))
    network.mlp[0].mask[5:] = 0.0  # a map as triangular as before
    t = LazyTriangular(network, 3, zuko.transforms.AdditiveTransform, [()])()
    y = torch.randn(400, 3)
    with pytest.raises(NotImplementedError, match="residual branch"):
        Stages(network, 3)
    assert torch.allclose(t(t.inv(y)), y, atol=1e-4)
