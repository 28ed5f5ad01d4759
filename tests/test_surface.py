"""What users see: messages that say what to do instead, signatures, representations, reference."""

import inspect
import re
from functools import partial
from math import isfinite
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from conftest import perturb
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.nn import PyroModule
from pyro.nn.module import to_pyro_module_
from pyro.optim import Adam
from torch import nn

import pyro_sinflow
from pyro_sinflow import (
    LDU,
    ConditionalLDU,
    FastInverse,
    LazyTriangular,
    MaskedNetwork,
    PixelCNN,
    Sinusoidal,
    SinusoidalFlow,
    SinusoidalTransform,
    Solver,
    TriangularTransform,
    conditional_ldu,
    fast_inverse,
    ldu,
    sinusoidal,
)

BASE = zuko.flows.MAF(3).base
ADDITIVE = zuko.transforms.AdditiveTransform


@pytest.mark.parametrize("make", [zuko.flows.NICE, zuko.flows.GF, zuko.flows.CNF, SinusoidalFlow])
def test_fast_inverse_warns_where_there_is_nothing_to_convert(make):
    flow = make(3)
    message = f"{make.__name__} has no MaskedAutoregressiveTransform"
    with pytest.warns(UserWarning, match=message) as w:
        fast = fast_inverse(flow)
    assert len(w) == 1
    assert w[0].filename == __file__
    assert [*fast.parameters()] == [*flow.parameters()]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", [zuko.flows.MAF, zuko.flows.NSF, zuko.flows.NAF, zuko.flows.SOSPF])
def test_fast_inverse_is_silent_where_it_converts(make):
    flow = make(3)
    assert any(isinstance(part, FastInverse) for part in fast_inverse(flow).modules())
    mixed = zuko.flows.Flow([ConditionalLDU(3), flow.transform.inv], BASE)
    assert any(isinstance(part, FastInverse) for part in fast_inverse(mixed).modules())


@pytest.mark.parametrize("rows", [(), (100,)])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("module", [MaskedNetwork(3), nn.Linear(3, 3)])
def test_a_network_in_place_of_a_conditioner(module, direction, rows):
    t = TriangularTransform(module)
    use = t if direction == "forward" else t.inv
    with pytest.raises(
        TypeError, match=r"'conditioner' should return a Transform, got Tensor.*Lazy"
    ):
        use(torch.zeros(*rows, 3))


def test_a_conditioner_that_returns_no_transform():
    t = TriangularTransform(lambda x: x)
    with pytest.raises(TypeError, match=r"'conditioner' should return a Transform, got Tensor\.$"):
        t(torch.zeros(3))


@pytest.mark.parametrize(
    ("part", "other"), [(LDU(5), "ConditionalLDU"), (Sinusoidal(5), "UnconditionalTransform")]
)
def test_a_transform_of_pyro_in_a_flow_of_zuko(part, other):
    with pytest.raises(TypeError, match=rf"'x' should be a tensor, got NoneType.*{other}"):
        zuko.flows.Flow([part], zuko.flows.MAF(5).base)()


@pytest.mark.parametrize("rows", [(), (100,)])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_network_with_the_wrong_number_of_outputs(direction, rows):
    t = LazyTriangular(MaskedNetwork(3, outputs=2), 3, ADDITIVE, [()])()
    use = t if direction == "forward" else t.inv
    with pytest.raises(ValueError, match=r"'network' should return 1 outputs.*\[\(\)\].*3, 2\)"):
        use(torch.zeros(*rows, 3))


@pytest.mark.parametrize(
    ("public", "make"),
    [
        ("SinusoidalFlow", SinusoidalFlow),
        ("SinusoidalFlow", lambda n, **k: SinusoidalFlow(n, conditioner="independent", **k)),
        ("LDU", LDU),
        ("LDU", ldu),
        ("ConditionalLDU", ConditionalLDU),
        ("ConditionalLDU", conditional_ldu),
        ("Sinusoidal", Sinusoidal),
        ("Sinusoidal", sinusoidal),
        ("MaskedNetwork", MaskedNetwork),
        ("PixelCNN", lambda n, **k: PixelCNN((1, n, n), **k)),
        ("TriangularTransform", TriangularTransform),
        ("Solver", Solver),
    ],
)
def test_an_unknown_option_names_the_public_class(public, make):
    with pytest.raises(TypeError, match=rf"^{public}\.__init__\(\) got an unexpected.*'foo'"):
        make(3, foo=1)


MAKE = [SinusoidalFlow, LDU, ConditionalLDU]


@pytest.mark.parametrize("make", MAKE)
def test_signatures_are_written_out(make):
    parameters = inspect.signature(make).parameters
    assert all(p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    own = {"conditioner", "linear", "tails"} if make is SinusoidalFlow else set()
    assert {"scale", "min_slope", "solver", "network", *own} <= {*parameters}


@pytest.mark.parametrize("make", [partial(SinusoidalFlow, conditioner="independent"), *MAKE[1:]])
def test_scale_is_the_default(make):
    assert repr(make(3)) == repr(make(3, scale=True)) != repr(make(3, scale=False))


OPTIONS = {
    "sinusoids": 3,
    "components": 7,
    "scale": False,
    "max_scale": 3.0,
    "min_slope": 0.01,
    "hidden_features": (5,),
    "activation": nn.Tanh,
    "residual": True,
    "dropout": 0.5,
    "context_diagonal": True,
    "linear": False,
    "tails": False,
}


FLOW = {"context": 2, "transforms": 1}
INDEPENDENT = {**FLOW, "conditioner": "independent"}


@pytest.mark.parametrize(
    ("make", "given", "others"),
    [
        (LDU, {}, ["context_diagonal", "linear", "tails"]),
        (ConditionalLDU, {"context": 2}, ["linear", "tails"]),
        (SinusoidalFlow, FLOW, ["scale", "context_diagonal"]),
        (SinusoidalFlow, INDEPENDENT, []),
    ],
    ids=["LDU", "ConditionalLDU", "SinusoidalFlow", "independent"],
)
def test_a_representation_shows_options(make, given, others):
    for option, value in OPTIONS.items():
        if option not in others:
            assert repr(make(3, **given, **{option: value})) != repr(make(3, **given)), option


@pytest.mark.parametrize("make", MAKE)
def test_a_representation_shows_networks_and_no_private_names(make):
    text = repr(make(3))
    assert text.startswith(f"{make.__name__}(")
    assert "MaskedNetwork(" in text
    assert "MaskedLinear(in_features=3, out_features=64" in text
    assert "Affine" in text
    assert " _" not in text


def test_representations_of_flows_show_no_private_names():
    for flow in (
        SinusoidalFlow(3),
        SinusoidalFlow(3, conditioner="independent"),
        fast_inverse(zuko.flows.NSF(3)),
    ):
        assert " _" not in repr(flow)
        assert " _" not in repr(flow().transform)


def target():
    pyro.sample("x", dist.Normal(torch.tensor([2.0, -1.0]), 0.5).to_event(1))


@pytest.mark.parametrize("make", [ldu, sinusoidal, lambda d: conditional_ldu(d, 1)])
def test_to_pyro_module_keeps_a_transform(make):
    t = perturb(make(2))
    weights = {name: p.clone() for name, p in t.named_parameters()}
    x = torch.randn(5, 2)

    def use():
        return (t.condition(torch.ones(1)) if isinstance(t, ConditionalLDU) else t)(x)

    expected = use()
    to_pyro_module_(t)
    assert all(isinstance(part, PyroModule) for part in t.modules())
    assert {name for name, _ in t.named_parameters()} == {*weights}
    assert torch.equal(use(), expected)


def test_to_pyro_module_of_a_guide():
    t = ldu(2, hidden_features=(8,))
    to_pyro_module_(t)
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.t = t

        def forward(self):
            return pyro.sample("x", dist.TransformedDistribution(base, [self.t]))

    bias = t.block.lower.network.bias
    before = bias.detach().clone()
    SVI(target, Guide(), Adam({"lr": 1e-2}), Trace_ELBO()).step()
    store = pyro.get_param_store()
    for name, parameter in t.named_parameters():
        assert store[f"t.{name}"] is parameter
    assert not torch.equal(bias, before)


def test_to_pyro_module_of_an_autoguide():
    def make(d):
        t = ldu(d)
        to_pyro_module_(t)
        return t

    guide = AutoNormalizingFlow(target, make)
    assert isfinite(SVI(target, guide, Adam({"lr": 1e-2}), Trace_ELBO()).step())
    assert guide()["x"].shape == (2,)


def test_a_univariate_by_hand():
    shapes = [(4,), (4,), (4,), (), ()]
    network = MaskedNetwork(3, outputs=14)
    t = LazyTriangular(network, 3, SinusoidalTransform, shapes)
    assert "SinusoidalTransform" in repr(t)
    assert "MaskedNetwork(" in repr(t)
    assert "SinusoidalTransform" in repr(t())


def test_wrong_arguments_of_a_lazy_triangular_transformation():
    network = MaskedNetwork(3)
    for arguments, message in (
        ((None, 3, ADDITIVE, [()]), "'network' should be a Module, got NoneType"),
        ((network, 3, ADDITIVE, 2), "'shapes' should be a sequence of shapes, got 2"),
        ((network, 3, ADDITIVE, [2]), "'shapes' should be a sequence of integers, got 2"),
        ((network, 3, 2, [()]), "'univariate' should be callable, got 2"),
    ):
        with pytest.raises(TypeError, match=message):
            LazyTriangular(*arguments)
    t = LazyTriangular(network, 3, lambda shift: shift, [()])()
    for function in (t, t.inv):
        for rows in (2, 1000):
            with pytest.raises(TypeError, match="'univariate' should return a Transform, got Ten"):
                function(torch.randn(rows, 3))


REFERENCE = (Path(__file__).parent.parent / "docs" / "reference.rst").read_text()
EXCEPTIONS = ("InversionError", "InversionWarning")


@pytest.mark.parametrize("name", pyro_sinflow.__all__)
def test_public_names_are_in_the_reference(name):
    assert re.search(rf"^\.\. (auto|py:)\w+:: {name}$", REFERENCE, re.MULTILINE)


def documented(text):
    """The names in the section of arguments; "first, ..., last" stands for those in between."""
    section = text.partition("Args:")[2].partition("\n\n")[0]
    for line in re.findall(r"^ {4,8}([\w., ]+): ", section, re.MULTILINE):
        yield from (name.strip() for name in line.split(","))


@pytest.mark.parametrize("name", sorted({*pyro_sinflow.__all__} - {"__version__", *EXCEPTIONS}))
def test_docstrings_have_arguments_errors_and_an_example(name):
    thing = getattr(pyro_sinflow, name)
    text = inspect.getdoc(thing)
    assert "Example:\n    >>> " in text
    parameters = [*inspect.signature(thing).parameters]
    if parameters:
        names = [*documented(text)]
        if "..." in names:
            i = names.index("...")
            first, last = parameters.index(names[i - 1]), parameters.index(names[i + 1])
            names += parameters[first:last]
        assert {*parameters} <= {*names}
        assert "Raises:\n" in text or name == "Inversion"  # a tuple, which checks nothing
