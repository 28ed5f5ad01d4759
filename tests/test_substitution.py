"""The kernel of forward substitution: interpreted, compiled for a GPU, and run where there is one.

`test_triton.py` runs this file in the process that interprets.
"""

from functools import partial
from types import SimpleNamespace

import pyro
import pytest
import torch
import zuko
from test_devices import NoReads
from test_triton import INTERPRETED, INTERPRETER, ON_GPU, compiled
from torch import nn
from zuko.transforms import AdditiveTransform, MonotonicAffineTransform

from pyro_sinflow import (
    InversionWarning,
    LazyTriangular,
    MaskedNetwork,
    SinusoidalFlow,
    Solver,
    _torch,
    autoregressive,
    fast_inverse,
    kernels,
    record_inversions,
)
from pyro_sinflow.autoregressive import kernel_form
from pyro_sinflow.flows import AffineSinusoids
from pyro_sinflow.kernels import substitution as gpu

SINUSOIDS = partial(AffineSinusoids, max_scale=3.0, min_slope=1e-3, solver=Solver())
ADJACENCY = [[1, 0, 0, 0, 1], [1, 1, 0, 0, 0], [1, 0, 1, 0, 1], [0, 1, 0, 1, 1]]


def triangular(univariate, shapes, features=4, context=0, **options):
    outputs = sum(torch.Size(s).numel() for s in shapes)
    options = {"hidden_features": (9, 6), **options}
    network = MaskedNetwork(features, context, outputs, **options)
    return LazyTriangular(network, features, univariate, shapes)


def of_zuko(make, context=0, features=4, **options):
    flow = make(features, context, transforms=1, hidden_features=(9, 6), **options)
    return fast_inverse(flow).transform.transforms[0]


MAPS = {
    "shift": lambda: triangular(AdditiveTransform, [()]),
    "affine": lambda: triangular(
        partial(MonotonicAffineTransform, slope=0.2), [(), ()], activation=nn.SiLU
    ),
    "elu": lambda: triangular(MonotonicAffineTransform, [(), ()], activation=nn.ELU),
    "slope": lambda: triangular(
        partial(MonotonicAffineTransform, slope=0.1), [(), ()], activation=nn.Tanh
    ),
    "slope above 1": lambda: triangular(partial(MonotonicAffineTransform, slope=10.0), [(), ()]),
    "sinusoids": lambda: triangular(SINUSOIDS, [(), (), (2, 10)], order=[2, 0, 3, 1]),
    "one sinusoid": lambda: triangular(SINUSOIDS, [(), (), (1, 4)], hidden_features=(7,)),
    "deep": lambda: triangular(MonotonicAffineTransform, [(), ()], hidden_features=(5, 8, 6, 7)),
    "linear": lambda: triangular(MonotonicAffineTransform, [(), ()], hidden_features=()),
    "wide": lambda: triangular(AdditiveTransform, [()], features=2, hidden_features=(70, 40)),
    "dropout": lambda: triangular(AdditiveTransform, [()], dropout=0.5),
    "MAF": lambda: of_zuko(zuko.flows.MAF),
}
CONDITIONAL = {
    "sinusoids and context": lambda: triangular(SINUSOIDS, [(), (), (1, 7)], context=1),
    "one feature": lambda: triangular(MonotonicAffineTransform, [(), ()], features=1, context=1),
    "adjacency": lambda: triangular(
        MonotonicAffineTransform, [(), ()], context=1, adjacency=ADJACENCY
    ),
    "MAF and context": lambda: of_zuko(zuko.flows.MAF, 1),
}
PASSES = {
    "splines": lambda: of_zuko(zuko.flows.NSF),
    "coupling": lambda: of_zuko(zuko.flows.MAF, features=6, passes=2),
    "residual": lambda: triangular(
        MonotonicAffineTransform, [(), ()], residual=True, hidden_features=(8, 8)
    ),
    "activation": lambda: triangular(MonotonicAffineTransform, [(), ()], activation=nn.Softplus),
    "alpha": lambda: triangular(
        MonotonicAffineTransform, [(), ()], activation=partial(nn.ELU, alpha=0.5)
    ),
}


def build(name, device, dtype=torch.float64, rows=37):
    """A map with random parameters, values to invert, and contexts."""
    torch.manual_seed(0)
    lazy = {**MAPS, **CONDITIONAL, **PASSES}[name]().to(device, dtype).eval()
    with torch.no_grad():
        for p in lazy.parameters():
            p.add_(0.3 * torch.randn_like(p))
    c = torch.randn(rows, 1, device=device, dtype=dtype) if name in CONDITIONAL else None
    features = lazy(None if c is None else c[0]).map.features
    return lazy, torch.randn(rows, *features, device=device, dtype=dtype), c


@pytest.fixture(params=[pytest.param("cpu", marks=INTERPRETER), pytest.param("cuda", marks=ON_GPU)])
def device(request, monkeypatch):
    """A device on which all tensors are given to the kernel."""
    monkeypatch.setattr(autoregressive, "substitution_kernel", lambda y: gpu)
    monkeypatch.setattr(autoregressive, "_GPU", request.param)
    return request.param


@pytest.fixture
def launches(device, monkeypatch):
    """Counts the calls of the kernel."""
    calls = []

    def substitute(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    original = gpu.substitute
    monkeypatch.setattr(gpu, "substitute", substitute)
    return calls


def check(t, x, y):
    """Whether x is the root, to round-off."""
    assert x.shape == y.shape
    assert x.dtype == y.dtype
    error = (t(x) - y).abs() / (1 + y.abs())
    assert error.max() <= 200 * torch.finfo(y.dtype).eps


FLOAT32 = ("affine", "slope", "sinusoids and context", "MAF")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float64) for name in [*MAPS, *CONDITIONAL]),
        *((name, torch.float32) for name in FLOAT32),
    ],
)
def test_the_root_takes_one_launch(name, dtype, device, launches):
    lazy, y, c = build(name, device, dtype)
    t = lazy(c)
    with torch.no_grad(), record_inversions() as inversions:
        x = t.inv(y)
    assert len(launches) == 1
    assert [i.iterations for i in inversions if i.problem == "triangular"] == [1]
    check(t, x, y)


def test_a_context_that_all_rows_share(device, launches):
    lazy, y, c = build("sinusoids and context", device)
    t = lazy(c[0])
    with torch.no_grad():
        check(t, t.inv(y.view(37, 1, 4)), y.view(37, 1, 4))
    assert len(launches) == 1


@pytest.mark.parametrize("name", ["sinusoids", "sinusoids and context"])
def test_many_rows_take_several_launches(name, device, monkeypatch):
    lazy, y, c = build(name, device)
    inputs, outputs = 4 + 9 + 6, 4 * sum(torch.Size(s).numel() for s in lazy.shapes)
    monkeypatch.setattr(gpu, "_MEMORY", 15 * (inputs + outputs))  # 15 rows, then 15, then 7
    with torch.no_grad(), record_inversions() as inversions:
        check(lazy(c), lazy(c).inv(y), y)
    sinusoids, triangular = inversions
    assert 2 < sinusoids.iterations < 50
    assert sinusoids.elements == y.numel() * lazy.shapes[2][0]
    assert triangular.iterations == 1


@pytest.mark.parametrize("name", PASSES)
def test_other_maps_take_passes(name, device, launches):
    lazy, y, _ = build(name, device)
    t = lazy()
    with torch.no_grad():
        check(t, t.inv(y), y)
    assert launches == []


def test_events_that_are_not_finite_affect_no_others(device, launches):
    lazy, y, _ = build("sinusoids", device)
    t = lazy()
    with torch.no_grad(), pyro.validation_enabled(False):
        expected = t.inv(y)
        y[3, 1] = torch.nan
        x = t.inv(y)
    assert len(launches) == 2
    assert x[3].isnan().all()
    others = torch.arange(37, device=y.device) != 3
    assert torch.equal(x[others], expected[others])


def test_too_few_iterations_of_sinusoids_warn(device):
    lazy, y, _ = build("sinusoids", device)
    options = {**lazy.univariate.keywords, "solver": Solver(max_iter=1)}
    lazy.univariate = partial(AffineSinusoids, **options)
    with torch.no_grad(), pytest.warns(InversionWarning, match="after 1 iterations"):
        lazy().inv(y)


@pytest.mark.parametrize("name", ["sinusoids", "MAF"])
def test_gradients(name, device, launches, monkeypatch):
    lazy, y, _ = build(name, device)

    def gradients():
        leaf = y.clone().requires_grad_()
        return torch.autograd.grad(lazy().inv(leaf).sin().sum(), [leaf, *lazy.parameters()])

    given = gradients()
    assert len(launches) == 1
    monkeypatch.setattr(autoregressive, "substitution_kernel", lambda y: None)
    for a, b in zip(given, gradients(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-9)


def test_weights_are_the_current_ones(device, launches):
    lazy, y, _ = build("sinusoids", device)
    with torch.no_grad():
        lazy().inv(y)
        for p in lazy.parameters():
            p.mul_(0.5)
        check(lazy(), lazy().inv(y), y)
    assert len(launches) == 2


def test_a_graph_can_capture_it(device, launches, monkeypatch):
    """On a CPU, a mode that refuses to read values stands for the capture."""
    lazy, y, c = build("sinusoids and context", device)
    with torch.no_grad(), pyro.validation_enabled(False):
        expected = lazy(c).inv(y)
        monkeypatch.setattr(_torch, "_CAPTURING", device)
        monkeypatch.setattr(_torch, "_is_capturing", lambda: True)
        if device == "cpu":
            kernel = gpu.substitute  # the interpreter reads

            def substitute(*args, **kwargs):
                with torch.utils._python_dispatch._disable_current_modes():
                    return kernel(*args, **kwargs)

            monkeypatch.setattr(gpu, "substitute", substitute)
        with NoReads():
            x = lazy(c).inv(y)
    assert len(launches) == 2
    assert torch.equal(x, expected)


def test_a_first_launch_tells_whether_it_runs(device, monkeypatch):
    load = kernels.load.__wrapped__
    assert load("substitution", torch.device(device)) is gpu
    monkeypatch.setattr(gpu, "substitute", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="division by zero"):
        assert load("substitution", torch.device(device)) is None


class Swapped(MonotonicAffineTransform):
    def __init__(self, scale, shift):
        super().__init__(shift, scale)


@pytest.mark.parametrize(
    ("univariate", "shapes", "known"),
    [
        (AdditiveTransform, [()], True),
        (MonotonicAffineTransform, [(), ()], True),
        (partial(MonotonicAffineTransform, slope=0.1), [(), ()], True),
        (Swapped, [(), ()], False),
        (partial(MonotonicAffineTransform, 0.0), [()], False),
        (MonotonicAffineTransform, [()], False),
        (partial(MonotonicAffineTransform, scale=0.5), [()], False),
        (SINUSOIDS, [(), (), (2, 10)], True),
        (SINUSOIDS, [(), (), (2, 11)], False),  # with shifts
        (partial(MonotonicAffineTransform, cache_size=1), [(), ()], False),
        (zuko.transforms.MonotonicRQSTransform, [(8,), (8,), (7,)], False),
    ],
)
def test_which_maps_the_kernel_inverts(univariate, shapes, known):
    assert (kernel_form(univariate, shapes) is not None) == known


def test_cpu_tensors_and_half_precision_are_not_given_to_it():
    assert kernels.substitution_kernel(torch.zeros(1)) is None
    half = SimpleNamespace(is_cuda=True, dtype=torch.half, device=torch.device("cuda"))
    assert kernels.substitution_kernel(half) is None


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize(
    ("activation", "outputs", "m", "block", "has_context"),
    [("ReLU", 1, 0, 16, 0), ("ELU", 2, 0, 32, 1), ("SiLU", 22, 2, 16, 1), ("Tanh", 12, 1, 32, 0)],
)
def test_it_compiles(
    activation, outputs, m, block, has_context, dtype, tmp_path, monkeypatch
):  # without a GPU
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {
        "activation": activation, "outputs": outputs, "has_context": has_context, "log_max": 0.7,
        "m": m, "count": 3, "width": 4, "limit": 0.9, "smallest": 1e-19, "eps": 1e-7,
        "aim": 4e-7, "max_iter": 200, "banach": 0, "units": gpu._UNITS,
        "depth": gpu._TILE // block, "block": block,
    }  # fmt: skip
    kinds = {"known": "*i32", "places": "*i64", "rows": "i32", "features": "i32", "layers": "i32"}
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, f"*{dtype}")
        for name in gpu._substitute.arg_names
    }
    code = compiled(gpu._substitute, signature, constants)
    assert code["cubin"]
    # A minimum drops NaN, which would become an activation that is finite.
    assert activation != "ELU" or "min.f" not in code["ptx"]
    # Each layer, and each feature, ends with a barrier, so that all threads see what was stored.
    assert code["ttgir"].count("barrier all") == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_it_is_used_on_a_gpu():
    flow, z = SinusoidalFlow(4, transforms=2).cuda().eval(), torch.randn(50, 4).cuda()
    with torch.no_grad(), record_inversions() as inversions:
        x = flow().transform.inv(z)
    assert kernels.substitution_kernel(z) is gpu
    assert [i.iterations for i in inversions if i.problem == "triangular"] == [1, 1]
    assert torch.allclose(flow().transform(x), z, atol=1e-4)
