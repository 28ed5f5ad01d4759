"""The parameters of AutoLDU: copies, files, Pyro's store, frozen and replaced parameters."""

import copy
import pickle
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, init_to_sample
from test_guides import Small, correlated, fit

from pyro_sinflow import AutoLDU


def test_guides_of_local_models_can_be_pickled():
    def model():
        pyro.sample("x", dist.Normal(scale, 1.0))

    scale = torch.ones(())  # a closure cannot be pickled
    guide = Small(model)
    pickled(guide)  # leaves out the model, as Pyro does
    guide = Small(model)
    guide()
    z = torch.randn(5, 1)
    expected = guide.get_transform()(z)
    for copied in (pickled(guide), copy.deepcopy(guide)):
        assert torch.equal(copied.get_transform()(z), expected)


def test_copies_pickles_and_state_dicts():
    guide = Small(correlated)
    fit(correlated, guide, steps=3)
    x = torch.randn(5, 3)
    expected = guide.get_transform()(x)
    assert torch.equal(copy.deepcopy(guide).get_transform()(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(guide)).get_transform()(x), expected)
    other = Small(correlated)
    pyro.clear_param_store()
    other()
    other.load_state_dict(guide.state_dict())
    assert torch.equal(other.get_transform()(x), expected)


@pytest.mark.parametrize("listed", [False, True])
def test_the_parameter_store_restores_a_guide(listed, tmp_path):
    """Without clearing or after loading, a new guide takes and trains the stored values."""

    def make():
        guide = Small(correlated, init_loc_fn=init_to_sample)
        if listed:
            guides = AutoGuideList(correlated)
            guides.append(guide)
            return guides, guide
        return guide, guide

    outer, guide = make()
    fit(correlated, outer, steps=5)
    x = torch.randn(5, 3)
    expected = guide.get_transform()(x).detach()
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    outer, guide = make()
    outer()
    assert torch.equal(guide.get_transform()(x), expected)
    before = copy.deepcopy(guide.state_dict())
    fit(correlated, outer, steps=2)
    assert [n for n, p in guide.named_parameters() if torch.equal(p, before[n])] == []


def pickled(guide):
    return pickle.loads(pickle.dumps(guide))


@pytest.mark.parametrize("change", [copy.deepcopy, pickled, "roll back"])
def test_the_parameter_store_and_a_used_guide_agree(change, tmp_path):
    """Copies, and guides whose parameters were loaded into the store, are trained."""
    guide = Small(correlated)
    guide()
    x = torch.randn(5, 3)
    start = guide.get_transform()(x)
    store = pyro.get_param_store()
    store.save(tmp_path / "store")
    fit(correlated, guide, steps=3)
    if callable(change):
        start = guide.get_transform()(x)
        guide = change(guide)
    else:
        store.load(tmp_path / "store")
    guide.median()
    assert torch.equal(guide.get_transform()(x), start)
    before = {name: value.clone() for name, value in store.items()}
    fit(correlated, guide, steps=2)
    assert not any(torch.equal(value, before[name]) for name, value in store.items())
    assert not torch.equal(guide.get_transform()(x), start)


def test_local_parameters_do_not_reach_the_store():
    with pyro.settings.context(module_local_params=True):
        guide = Small(correlated)
        loss = Trace_ELBO().differentiable_loss(correlated, guide)
        loss.backward()
        assert all(p.grad is not None for p in guide.parameters())
        before = copy.deepcopy(guide.state_dict())
        fit(correlated, guide, steps=2)
    assert [n for n, p in guide.named_parameters() if torch.equal(p, before[n])] == []
    assert len(pyro.get_param_store()) == 0


def test_a_frozen_guide_keeps_its_parameters():
    guide = Small(correlated)
    guide()
    guide.requires_grad_(False)
    before = copy.deepcopy(guide.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide()
    assert all(torch.equal(p, before[n]) for n, p in guide.named_parameters())


def test_stored_parameters_of_another_guide_are_refused():
    def model(size):
        pyro.sample("x", dist.Normal(torch.zeros(size), 1.0).to_event(1))

    Small(model)(2)
    cases = [(Small, 3), (partial(AutoLDU, hidden_features=(8,)), 2)]
    for make, size in cases:
        with pytest.raises(ValueError, match=r"parameter store has 'AutoLDU.* of shape"):
            make(model)(size)
    pyro.clear_param_store()
    for make, size in cases:
        guide = make(model)
        guide(size)
        pyro.get_param_store().clear()
        Small(model)(2)
        with pytest.raises(ValueError, match=r"parameter store has 'AutoLDU.* of shape"):
            guide(size)
        pyro.clear_param_store()
        make(model)(size)
        pyro.clear_param_store()


def test_a_partly_frozen_guide_trains_the_others():
    guide = Small(correlated)
    guide()
    guide._flow().affine.requires_grad_(False)
    before = copy.deepcopy(guide.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(correlated, guide, steps=2)
    same = [name for name, p in guide.named_parameters() if torch.equal(p, before[name])]
    assert same == ["flow.affine"]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("cleared", [False, True])
def test_lifted_parameters_are_used_once(first, cleared):
    """A handler may replace parameters in a call, and the next call has the guide's own."""
    guide = Small(correlated)
    keys = ["affine", "blocks.0.diagonal.parameter"]
    shapes = [(5, 3), (3, 4, 14)]
    priors = {
        key: dist.Normal(torch.zeros(shape), 0.1).to_event()
        for key, shape in zip(keys, shapes, strict=True)
    }
    if not first:
        guide()
        own = dict(guide._flow().named_parameters())
    lifted = poutine.trace(poutine.lift(guide, prior=priors)).get_trace()
    used = dict(guide._flow().named_parameters())
    for key in keys:
        (node,) = (n for name, n in lifted.nodes.items() if name.endswith(f"$$${key}"))
        assert node["type"] == "sample"
        assert used[key] is node["value"]
    if cleared:
        pyro.clear_param_store()
    trace = poutine.trace(guide).get_trace()
    now = dict(guide._flow().named_parameters())
    assert sum(node["type"] == "param" for node in trace.nodes.values()) == len(now)
    assert all(isinstance(p, torch.nn.Parameter) for p in now.values())
    if not first:
        assert all(p is own[key] for key, p in now.items())


@pytest.mark.parametrize("kind", ["frozen", "local"])
def test_a_functional_call_takes_its_parameters(kind):
    with pyro.settings.context(module_local_params=kind == "local"):
        guide = Small(correlated)
        guide()
        guide.requires_grad_(kind == "local")
        moved = {name: p.detach().clone() for name, p in guide.named_parameters()}
        moved["flow.affine"][0] += 10.0  # in units of the whitening, a shift of 100
        before = guide()["x"]
        after = torch.func.functional_call(guide, moved, ())["x"]
        again = guide()["x"]
    assert (after - before).abs().max() > 30
    assert (again - before).abs().max() < 15


def test_a_converted_guide_keeps_its_map():
    guide = Small(correlated)
    guide()
    z = torch.randn(5, 3)
    expected = guide.get_transform()(z)
    guide.double()
    guide.median()  # also takes the parameters from the store
    assert guide._flow().affine.dtype == torch.float64
    assert torch.allclose(guide.get_transform()(z.double()).float(), expected, atol=1e-5)
    guide.float()
    guide.median()
    assert torch.allclose(guide.get_transform()(z), expected, atol=1e-5)
