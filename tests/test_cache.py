"""The cache of transforms: when the latest pair counts, and when it does not."""

import copy
import io
import pickle
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from conftest import perturb
from torch import nn
from torch.nn.utils import parametrizations
from zuko.transforms import AdditiveTransform

from pyro_sinflow import (
    LDU,
    ConditionalLDU,
    LazyTriangular,
    LDUTransform,
    Sinusoidal,
    SinusoidalTransform,
    TriangularTransform,
    record_inversions,
)


def by_hand():
    parts = ConditionalLDU(3)()
    return LDUTransform(parts.upper, parts.diagonal, parts.lower, cache_size=1)


MAKE = {
    "LDU": lambda: perturb(LDU(3)),
    "Sinusoidal": lambda: perturb(Sinusoidal(3)),
    "condition": lambda: perturb(ConditionalLDU(3, 2)).condition(torch.randn(2)),
    "by hand": by_hand,
    "SinusoidalTransform": lambda: SinusoidalTransform(
        *torch.randn(3, 3, 4), *torch.randn(2, 3), cache_size=1
    ),
}


@pytest.fixture(params=MAKE)
def t(request):
    return MAKE[request.param]()


@pytest.fixture(params=["forward", "inverse"])
def f(request, t):
    return t if request.param == "forward" else t.inv


def test_a_tensor_that_was_returned_finds_its_pair(f):
    x = torch.randn(5, 3)
    y = f(x)
    with record_inversions() as inversions:
        assert f.inv(y) is x
        assert f(x) is y  # x has been returned now
    assert inversions == []


def test_a_log_determinant_is_kept(t):
    x = torch.randn(5, 3)
    y = t(x)
    ladj = t.log_abs_det_jacobian(x, y)
    assert t.log_abs_det_jacobian(x, y) is ladj
    assert t.log_abs_det_jacobian(x.clone(), y) is not ladj
    assert t.log_abs_det_jacobian(x, y.clone()) is not ladj
    assert t.inv.log_abs_det_jacobian(y, x).equal(-ladj)


def test_an_equal_tensor_finds_nothing(f):
    for other in (lambda y: y.view_as(y), torch.Tensor.detach, lambda y: y[:]):
        x = torch.randn(5, 3)
        y = f(x)
        assert f.inv(other(y)) is not x


def test_a_tensor_that_was_returned_is_no_output_of_the_inverse(f):
    y = f(torch.randn(5, 3))
    assert torch.equal(f(y), f(y.clone()))


def test_the_next_pair_replaces_the_latest(f):
    x, other = torch.randn(2, 5, 3)
    y = f(x)
    f(other)
    assert f.inv(y) is not x


def test_nothing_is_kept_without_a_cache(t):
    t = t.with_cache(0)
    x = torch.randn(5, 3)
    assert t.inv(t(x)) is not x


def test_clear_cache_forgets(f, t):
    x = torch.randn(5, 3)
    y = f(x)
    t.clear_cache()
    assert f.inv(y) is not x


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "autocast"],
)
def test_a_pair_of_another_mode_is_not_found(f, mode):
    x = torch.randn(5, 3)
    with mode():
        y = f(x)
    assert f.inv(y) is not x


def network(t):
    return t.block.lower.network.mlp


def unregister(t):
    """Makes the last weight of L a plain tensor, as hypernetworks do."""
    network(t)[-1].weight = network(t)[-1]._parameters.pop("weight").detach()


def normalize(t):
    parametrizations.weight_norm(network(t)[-1])


def change_in_place(t):
    with torch.no_grad():
        for p in network(t)[-1].parameters():
            p.mul_(2.0)


def set_weight(make):
    def change(t):
        network(t)[-1].weight = make(2 * network(t)[-1].weight.detach())

    return change


def change_without_parameters(t):
    weight = network(t)[-1]._parameters.pop("weight").detach()
    network(t)[-1].weight = 2 * weight


def set_mask(t):
    network(t)[-1].mask = torch.zeros_like(network(t)[-1].mask)


def replace_forward(t):
    forward = network(t)[-1].forward
    network(t)[-1].forward = lambda h: 2 * forward(h)


def double(module, args):
    return (2 * args[0],)


# What is done before a pair is computed, and after.
CHANGES = {
    "in place": (None, change_in_place),
    "parameter": (None, set_weight(nn.Parameter)),
    "plain weight": (unregister, set_weight(lambda weight: weight)),
    "plain weight at first": (None, change_without_parameters),
    "parametrization": (normalize, change_in_place),
    "parametrization at first": (None, lambda t: (normalize(t), change_in_place(t))),
    "layer": (None, lambda t: network(t).__setitem__(-1, perturb(copy.deepcopy(network(t)[-1])))),
    "activation": (None, lambda t: network(t).__setitem__(1, nn.Tanh())),
    "mask": (None, set_mask),
    "forward": (None, replace_forward),
    "hook": (None, lambda t: network(t)[-1].register_forward_hook(lambda m, args, h: 2 * h)),
    "pre-hook": (None, lambda t: network(t)[-1].register_forward_pre_hook(double)),
    "block": (None, lambda t: setattr(t, "block", perturb(ConditionalLDU(3)))),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_weights_that_changed_find_nothing(change, direction):
    t = perturb(LDU(3))
    f = t if direction == "forward" else t.inv
    prepare, change = CHANGES[change]
    if prepare is not None:
        prepare(t)
    x = torch.randn(5, 3)
    y = f(x)
    assert f.inv(y) is x
    change(t)
    back = f.inv(y)
    assert back is not x
    assert torch.equal(back, f.inv(y.clone()))


@pytest.mark.parametrize("change", CHANGES)
def test_log_determinants_follow_weights_that_changed(change):
    t, x = perturb(LDU(3)), torch.randn(5, 3)
    prepare, change = CHANGES[change]
    if prepare is not None:
        prepare(t)
    y = t(x)
    before = t.log_abs_det_jacobian(x, y)
    change(t)
    after = t.log_abs_det_jacobian(x, y)
    assert not torch.allclose(after, before)
    assert torch.equal(after, t.with_cache(0).call_and_ladj(x)[1])


class Shift:
    """Shifts each feature by a linear map of those before it."""

    def __init__(self, weight):
        self.weight = weight

    def at(self, x):
        return shifted(self.weight, x)


def shifted(weight, x):
    return AdditiveTransform(x @ weight.tril(-1).T)


def with_attribute(weight):
    def f(x):
        return shifted(f.weight, x)

    f.weight = weight
    return f


def method(weight):
    class Holder:
        def at(self, x, w=weight):
            return shifted(w, x)

    return Holder().at


CLOSURES = {
    "default of a method": method,
    "function": lambda weight: lambda x: shifted(weight, x),
    "default": lambda weight: lambda x, w=weight: shifted(w, x),
    "keyword": lambda weight: lambda x, *, w=weight: shifted(w, x),
    "attribute": with_attribute,
    "set": lambda weight: lambda x, s=frozenset({weight}): shifted(*s, x),
    "partial": lambda weight: partial(shifted, weight),
    "method": lambda weight: Shift(weight).at,
    "module": lambda weight: LazyTriangular(Linear(weight), 3, AdditiveTransform, [()])().map,
}


class Linear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x, c):
        return (x @ self.weight.tril(-1).T).unsqueeze(-1)


@pytest.mark.parametrize("kind", CLOSURES)
def test_what_a_conditioner_depends_on_may_change(kind):
    weight, x = torch.randn(3, 3), torch.randn(5, 3)
    t = TriangularTransform(CLOSURES[kind](weight), cache_size=1)
    y = t(x)
    weight.mul_(2.0)
    assert torch.allclose(t(t.inv(y)), y, atol=1e-5)
    assert not torch.allclose(t.inv(y), x, atol=1e-5)


class Inverse(nn.Module):
    def __init__(self, t):
        super().__init__()
        self.t = t

    def forward(self, y):
        return self.t.inv(y)


def test_parameters_of_a_functional_call_are_others():
    t, x = perturb(LDU(3)), torch.randn(5, 3)
    module = Inverse(t)
    others = {name: p + 0.1 for name, p in module.named_parameters()}
    y = t(x)
    inside = torch.func.functional_call(module, others, (y,))
    assert not torch.allclose(inside, x, atol=1e-5)
    assert t.inv(y) is not inside
    assert torch.allclose(t.inv(y), x, atol=1e-5)


@pytest.mark.parametrize("what", ["features", "parameters"])
def test_what_requires_gradients_later_finds_nothing(what):
    t = perturb(LDU(3)).requires_grad_(False)
    d = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [t])
    x = d.rsample((5,))
    leaves = [*t.parameters()] if what == "parameters" else [x]
    for leaf in leaves:
        leaf.requires_grad_()
    given = d.log_prob(x)
    t.clear_cache()
    expected = d.log_prob(x)
    for a, b in zip(
        *(torch.autograd.grad(p.sum(), leaves) for p in (given, expected)), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))]
)
def test_copies_do_not_carry_the_pair(t, again):
    x = torch.randn(5, 3)
    y = t(x)
    other = again(t)
    assert t.inv(y) is x  # the original keeps it
    assert other._cached is None
    assert other.inv(y) is not x
    assert other._cache_size == 1
    assert torch.allclose(other.inv(y), x, atol=1e-5)


def test_a_saved_module_does_not_carry_the_pair():
    t, x = perturb(LDU(3)), torch.randn(5, 3)
    y = t(x)
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).inv(y) is not x


def test_with_cache_shares_parameters_and_no_pair():
    t, x = perturb(LDU(3)), torch.randn(5, 3)
    y = t(x)
    other = t.with_cache(0).with_cache(1)
    assert other.inv(y) is not x
    assert [*other.parameters()] == [*t.parameters()]
