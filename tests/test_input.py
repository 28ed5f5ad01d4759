"""Bad input: each mistake gives an error that names the argument, the value and the expectation."""

import re

import hypothesis.strategies as st
import pytest
import torch
import zuko
from hypothesis import assume, given
from torch import nn
from zuko.flows import MaskedAutoregressiveTransform
from zuko.transforms import AdditiveTransform

from pyro_sinflow import (
    LDU,
    AutoregressiveMap,
    ConditionalLDU,
    FastInverse,
    LazyTriangular,
    LDUTransform,
    MaskedNetwork,
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
from pyro_sinflow.linear import Linear

NAN, INF = float("nan"), float("inf")


def tensors(**replaced):
    p = {n: torch.zeros(3, 4) for n in ("frequency", "phase", "weight")}
    return {**p, "residual": torch.zeros(3), "shift": torch.zeros(3), **replaced}


def parts(**replaced):
    t = ConditionalLDU(3)()
    return {"upper": t.upper, "diagonal": t.diagonal, "lower": t.lower, **replaced}


def shift(x):
    return zuko.transforms.AdditiveTransform(torch.zeros_like(x))


def independent(features=3, *args, **kwargs):
    return SinusoidalFlow(features, *args, conditioner="independent", **kwargs)


# How each public name is called with one argument replaced, the others being right.
MAKE = {
    "SinusoidalTransform": lambda **k: SinusoidalTransform(**tensors(**k)),
    "TriangularTransform": lambda **k: TriangularTransform(**{"conditioner": shift, **k}),
    "LDUTransform": lambda **k: LDUTransform(**parts(**k)),
    "Sinusoidal": lambda **k: Sinusoidal(**{"features": 3, **k}),
    "sinusoidal": lambda **k: sinusoidal(**{"features": 3, **k}),
    "LDU": lambda **k: LDU(**{"features": 3, **k}),
    "ldu": lambda **k: ldu(**{"features": 3, **k}),
    "ConditionalLDU": lambda **k: ConditionalLDU(**{"features": 3, "context": 2, **k}),
    "conditional_ldu": lambda **k: conditional_ldu(**{"features": 3, "context": 2, **k}),
    "SinusoidalFlow": lambda **k: SinusoidalFlow(**{"features": 3, **k}),
    "independent": independent,
    "FastInverse": lambda **k: FastInverse(**{"transform": MaskedAutoregressiveTransform(3), **k}),
    "fast_inverse": lambda **k: fast_inverse(**{"flow": zuko.flows.MAF(3), **k}),
    "Solver": Solver,
}
TENSORS = [(MAKE["SinusoidalTransform"], n) for n in tensors()]
MODULES = ["Sinusoidal", "sinusoidal", "LDU", "ldu", "ConditionalLDU", "conditional_ldu"]
FLOWS = ["SinusoidalFlow", "independent"]
NETWORKS = ["LDU", "ConditionalLDU", *FLOWS]

# Arguments, who takes them, and what each of them should not be.
WRONG_SIZE = [0, -1, True, 1.5, "3", None, NAN, [3.0]]
TABLE = [
    ("features", [*MODULES, *FLOWS], [*WRONG_SIZE, [], [0], [3, -1], ["3"], {}]),
    ("context", ["ConditionalLDU", "conditional_ldu", *FLOWS], [s for s in WRONG_SIZE if s != 0]),
    ("components", ["Sinusoidal", *NETWORKS], WRONG_SIZE),
    ("sinusoids", ["LDU", "ConditionalLDU"], WRONG_SIZE),
    ("sinusoids", FLOWS, [s for s in WRONG_SIZE if s is not None]),
    ("transforms", FLOWS, WRONG_SIZE),
    ("hidden_features", NETWORKS, [64, [0], [64, -1], [True], [1.5], [None], "64"]),
    ("activation", NETWORKS, [nn.ReLU(), "ReLU", 3]),
    (
        "min_slope",
        ["SinusoidalTransform", "Sinusoidal", *NETWORKS],
        [0, 1, -1, NAN, INF, "a", True],
    ),
    ("dropout", NETWORKS, [-0.1, 1, NAN, "0.1", True, None]),
    ("scale", ["LDU", "ConditionalLDU", *FLOWS], [1, "yes", None]),
    ("context_diagonal", ["LDU", "ConditionalLDU", *FLOWS], [1, "yes", None]),
    ("randperm", FLOWS, [1, "yes", None]),
    ("conditioner", ["SinusoidalFlow"], ["Independent", None, 3, ["independent"]]),
    ("conditioner", ["TriangularTransform"], [None, 3, "x", torch.zeros(3)]),
    (
        "order",
        ["LDU", "ConditionalLDU"],
        [3, [0, 1], [0, 1, 1], [0, 1, 3], [0.0, 1.0, 2.0], [True, False, True]],
    ),
    ("order", FLOWS, [[0, 1, 2]]),
    ("scale", ["SinusoidalFlow"], [False]),
    ("context_diagonal", ["SinusoidalFlow"], [True]),
    ("linear", FLOWS, [1, "yes"]),
    ("tails", FLOWS, [1, "yes", None]),
    ("max_scale", NETWORKS, [1, 0.5, -2.0, "2", True, NAN, INF]),
    ("context", ["LDU", "ldu"], [2]),
    ("solver", [n for n in MAKE if n != "Solver"], ["default", None, Solver]),
    ("method", ["Solver"], ["Newton", None, 3]),
    ("tolerance", ["Solver"], [0, 1, -1e-3, NAN, INF, "a", True]),
    ("max_iter", ["Solver"], [0, -1, 1.5, "3", True]),
    ("cache_size", ["SinusoidalTransform", "TriangularTransform", "LDUTransform"], [2, -1, "a"]),
    ("derivatives", ["Solver"], [0, -1, 1.5, "3", True]),
    ("passes", ["TriangularTransform"], [s for s in WRONG_SIZE if s is not None]),
    ("event_dim", ["TriangularTransform"], WRONG_SIZE),
    *[(n, ["LDUTransform"], [None, 3, nn.Linear(3, 3)]) for n in parts()],
    ("transform", ["FastInverse"], [None, 3, LDU(3), zuko.flows.MAF(3)]),
    ("flow", ["fast_inverse"], [None, 3, LDU(3), MaskedAutoregressiveTransform(3)]),
]


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [(n, a, v) for a, names, values in TABLE for n in names for v in values],
    ids=lambda v: re.sub(r"\s+", " ", str(v))[:20],
)
def test_arguments(name, argument, value):
    with pytest.raises((TypeError, ValueError)) as e:
        MAKE[name](**{argument: value})
    assert re.search(rf"'{argument}'|Shapes", str(e.value))
    assert re.search("should|option|keyword", str(e.value))


@pytest.mark.parametrize("name", tensors())
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda p: None, TypeError, "a tensor, got NoneType"),
        (lambda p: p.tolist(), TypeError, "a tensor, got list"),
        (lambda p: p.long(), TypeError, "floating-point tensor, got torch.int64"),
        (lambda p: p.bool(), TypeError, "floating-point tensor, got torch.bool"),
        (lambda p: p.cfloat(), TypeError, "floating-point tensor, got torch.complex64"),
        (lambda p: p + NAN, ValueError, r"finite, got \d+ NaN"),
        (lambda p: p - INF, ValueError, r"finite, got 0 NaN and \d+ infinite"),
    ],
)
def test_tensors(name, spoil, error, message):
    with pytest.raises(error, match=f"'{name}' should be.*{message}"):
        SinusoidalTransform(**tensors(**{name: spoil(tensors()[name])}))


def test_shapes_and_dtypes_of_tensors():
    for name, p in tensors().items():
        with pytest.raises(ValueError, match=rf"should .*'{name}'"):
            SinusoidalTransform(**tensors(**{name: torch.zeros(5, 7)}))
        with pytest.raises(TypeError, match=r"dtype torch\.float(32|64), got torch\.float(32|64)"):
            SinusoidalTransform(**tensors(**{name: p.double()}))
    with pytest.raises(ValueError, match=r"K > 0.*\(3, 0\)"):
        SinusoidalTransform(*torch.zeros(3, 3, 0), torch.zeros(3), torch.zeros(3))


@given(
    name=st.sampled_from([*MODULES, *FLOWS]),
    sizes=st.lists(st.integers(-5, 5), max_size=4).filter(lambda s: min(s, default=0) < 1),
)
def test_random_sizes(name, sizes):
    with pytest.raises(ValueError, match=r"'features' should .* got"):
        MAKE[name](features=sizes)


TRANSFORMS = {
    "SinusoidalTransform": SinusoidalTransform(**tensors()),
    "Sinusoidal": Sinusoidal(3),
    "upper": LDU(3).upper,
    "LDUTransform": LDUTransform(**parts()),
    "LDU": LDU(3),
    "shift": LDU(3, scale=False),
    "context": ConditionalLDU(3, 2)(torch.zeros(2)),
    "condition": ConditionalLDU(3, 2).condition(torch.zeros(2)),
    "autoregressive": SinusoidalFlow(3)().transform.transforms[2],
    "flow": SinusoidalFlow(3)().transform,
    "Linear": Linear(torch.zeros(3, 3)),
    "image": LDU((1, 1, 3)),
}


def methods(t, good):
    """The methods that take x or y, by the name that their messages give it."""
    return [
        ("x", t),
        ("y", t.inv),
        ("x", t.call_and_ladj),
        ("y", t.inv.call_and_ladj),
        ("x", lambda x: t.log_abs_det_jacobian(x, good)),
        ("y", lambda y: t.log_abs_det_jacobian(good, y)),
    ]


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("cache_size", [0, 1])
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda x: None, TypeError, "a tensor, got NoneType"),
        (lambda x: x.tolist(), TypeError, "a tensor, got list"),
        (lambda x: "abc", TypeError, "a tensor, got str"),
        (lambda x: x.long(), TypeError, "floating-point tensor, got torch.int64"),
        (lambda x: x.cfloat(), TypeError, "floating-point tensor, got torch.complex64"),
        (lambda x: x + NAN, ValueError, "finite, got 3 NaN and 0 infinite"),
        (lambda x: x + INF, ValueError, "finite, got 0 NaN and 3 infinite"),
    ],
)
def test_values(name, cache_size, spoil, error, message):
    t = TRANSFORMS[name].with_cache(cache_size)
    good = torch.zeros(1, 1, 3)
    for argument, method in methods(t, good):
        with pytest.raises(error, match=f"'{argument}' should be.*{message}"):
            method(spoil(good))
    assert torch.allclose(t.inv(t(good)), good, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_whose_sum_overflows_are_finite(dtype):
    t = SinusoidalTransform(*torch.zeros(3, 4, 1), *torch.zeros(2, 4))
    x = torch.full((4,), 0.7 * torch.finfo(dtype).max, dtype=dtype)
    assert not x.sum().isfinite()
    assert torch.equal(t(x), x.float())


@pytest.mark.parametrize("name", TRANSFORMS)
def test_dtypes(name):
    t = TRANSFORMS[name]
    good = torch.zeros(1, 1, 3)
    for _, method in methods(t, good)[:5]:
        with pytest.raises(TypeError, match=r"dtype torch\.float32, got torch\.float64"):
            method(good.double())


@given(
    name=st.sampled_from([*TRANSFORMS]),
    shape=st.lists(st.integers(1, 5), max_size=4),
)
def test_random_shapes(name, shape):
    t = TRANSFORMS[name]
    event = (1, 1, 3) if name == "image" else (3,)
    element_wise = t.event_dim == 0
    assume(tuple(shape[-len(event) :]) != event)
    assume(not element_wise or shape[-1:] not in ([], [1]))  # which broadcast
    x = torch.zeros(shape)
    for _, method in methods(t, torch.zeros(1, 1, 3))[:5]:
        with pytest.raises(ValueError, match=rf"'[xy]'.*{re.escape(str(tuple(shape)))}"):
            method(x)
    assume(len(shape) >= 3 and shape[-1] not in (1, 3))
    with pytest.raises(ValueError, match=r"'x' \(1, 1, 3\), 'y'|'y' should|'y' \(.*parameters"):
        t.log_abs_det_jacobian(torch.zeros(1, 1, 3), x)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("method", ["forward_shape", "inverse_shape"])
@pytest.mark.parametrize(
    "shape", [None, 3, "ab", (-1, 1, 1, 3), (1, 1, 3.0), ("3",), (True, 1, 1, 3), torch.zeros(3)]
)
def test_shapes(name, method, shape):
    with pytest.raises((TypeError, ValueError), match="'shape' should be"):
        getattr(TRANSFORMS[name], method)(shape)


def test_events_need_their_dimensions():
    with pytest.raises(ValueError, match=r"'shape' should have at least 3 dimensions, got \(3,\)"):
        LDU((1, 1, 3)).forward_shape((3,))


@pytest.mark.parametrize("cache_size", [-1, 2, 0.5, "1", None])
def test_with_cache(cache_size):
    for t in TRANSFORMS.values():
        with pytest.raises(ValueError, match=r"'cache_size' should be one of \(0, 1\), got"):
            t.with_cache(cache_size)


def triangular():
    return LazyTriangular(MaskedNetwork(3, 2), 3, AdditiveTransform, [()])


CONDITIONALS = {
    "ConditionalLDU": ConditionalLDU(3, 2),
    "inv": ConditionalLDU(3, 2).inv,
    "condition": ConditionalLDU(3, 2).condition,
    "inv.condition": ConditionalLDU(3, 2).inv.condition,
    "context_diagonal": ConditionalLDU(3, 2, context_diagonal=True),
    "SinusoidalFlow": lambda c: SinusoidalFlow(3, 2)(c).log_prob(torch.zeros(3)),
    "sample": lambda c: SinusoidalFlow(3, 2)(c).sample(),
    "independent": lambda c: independent(3, 2)(c).log_prob(torch.zeros(3)),
    "LazyTriangular": lambda c: triangular()(c)(torch.zeros(3)),
    "few rows": lambda c: triangular()(c).inv(torch.zeros(2, 3)),
    "many rows": lambda c: triangular()(c).inv(torch.zeros(500, 3)),
}


@pytest.mark.parametrize("name", CONDITIONALS)
@pytest.mark.parametrize(
    ("context", "error", "message"),
    [
        (None, ValueError, r"a tensor of shape \(\*, 2\), got None"),
        ("ab", TypeError, "a tensor, got str"),
        ([0.0, 0.0], TypeError, "a tensor, got list"),
        (torch.zeros(()), ValueError, r"shape \(\*, 2\), got \(\)"),
        (torch.zeros(5, 3), ValueError, r"shape \(\*, 2\), got \(5, 3\)"),
        (torch.zeros(2).cfloat(), TypeError, "floating-point tensor, got torch.complex64"),
        (torch.zeros(2).double(), TypeError, r"dtype torch\.float32, got torch\.float64"),
        (torch.tensor([NAN, 0.0]), ValueError, "finite, got 1 NaN"),
        (torch.tensor([0.0, INF]), ValueError, "finite, got 0 NaN and 1 infinite"),
    ],
)
def test_context(name, context, error, message):
    with pytest.raises(error, match=f"context.* should.*{message}"):
        CONDITIONALS[name](context)


@pytest.mark.parametrize(
    "conditional",
    [
        ConditionalLDU(3),
        ConditionalLDU(3).condition,
        ConditionalLDU(3).inv.condition,
        lambda c: SinusoidalFlow(3)(c).log_prob(torch.zeros(3)),
        lambda c: independent()(c).log_prob(torch.zeros(3)),
    ],
)
def test_superfluous_context(conditional):
    for context, shown in ((torch.zeros(2), r"a tensor of shape \(2,\)"), ([1.0], r"\[1\.0\]")):
        with pytest.raises(ValueError, match=f"'context' should be None, .* got {shown}"):
            conditional(context)
    conditional(None)


def test_no_hidden_layer_is_a_linear_conditioner():
    # As in zuko: not a mistake.
    t = LDU(3, hidden_features=())
    x = torch.randn(5, 3)
    assert torch.allclose(t.inv(t(x)), x, atol=1e-5)


def test_a_non_bijective_part():
    with pytest.raises(ValueError, match="'upper' should be bijective, got AbsTransform"):
        LDUTransform(**parts(upper=torch.distributions.AbsTransform()))


@pytest.mark.parametrize("given", [{"passes": 2}, {"event_dim": 2}])
def test_a_map_has_its_own_sizes(given):
    own = AutoregressiveMap(shift, event_dim=1)
    with pytest.raises(TypeError, match="'passes' and 'event_dim' should be left out"):
        TriangularTransform(own, **given)
    assert TriangularTransform(own).event_dim == 1
