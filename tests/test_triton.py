"""The kernels for GPUs: interpreted on the CPU, compiled for a GPU, and run where there is one.

Triton decides on import whether it interprets. A process of its own does, which leaves alone what
else imports Triton.
"""

import math
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pyro
import pytest
import torch
from test_kernels import EXTREMES, draw, extreme

from pyro_sinflow import InversionWarning, SinusoidalFlow, Solver, kernels, record_inversions
from pyro_sinflow.kernels import eager, evaluate, invert

triton = pytest.importorskip("triton")
if [*map(int, triton.__version__.split(".")[:2])] < [3, 4]:
    pytest.skip("the interpreter of this version lacks operations", allow_module_level=True)

from pyro_sinflow.kernels import triton as gpu  # noqa: E402

MIN_SLOPE = 1e-3
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
INTERPRETER = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}
# The batch shapes of numbers and parameters, M and K.
CASES = {
    "scalar": ((), (), 1, 1),
    "shared": ((37, 2), (2,), 2, 3),
    "shared by all": ((5, 3, 2), (), 2, 5),
    "many rows": ((300, 1), (1,), 1, 4),
    "per-element": ((7, 3), (7, 3), 3, 3),
    "more parameters": ((3,), (4, 3), 2, 6),
    "many components": ((3, 2), (2,), 1, 40),
    "one component": ((600,), (600,), 2, 1),
}


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_interpreted():
    options = ["-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-m", "not gpu"]
    files = [__file__, str(Path(__file__).with_name("test_substitution.py"))]
    command = [sys.executable, "-m", "pytest", *options, *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@pytest.fixture(params=[pytest.param("cpu", marks=INTERPRETER), pytest.param("cuda", marks=ON_GPU)])
def device(request, monkeypatch):
    """A device on which the kernels take all tensors."""
    monkeypatch.setattr(kernels, "_triton", lambda *_: gpu)
    return request.param


def results(function, x, parameters, cotangents):
    """Outputs of a function, and their gradients by numbers and parameters."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, parameters)]
    outputs = function(*leaves)
    return *outputs, *torch.autograd.grad(outputs, leaves, [c.to(x) for c in cotangents])


def check(x, parameters, tolerance, min_slope=MIN_SLOPE, numbers=lambda x: x):
    """Compares values and gradients with those of plain operations, in float64 on the CPU."""

    def plain(x, parameters):
        return eager.differentiable(*kernels._broadcast(numbers(x), parameters), min_slope)

    def fused(x, parameters):
        y, ladj = evaluate(numbers(x), parameters, min_slope)
        assert y.grad_fn is None or y.grad_fn.name() == "_EvaluateBackward"
        return y, ladj

    exact = x.double().cpu(), parameters.double().cpu()
    cotangents = [torch.randn(plain(*exact)[0].shape) for _ in range(2)]
    expected = results(plain, *exact, cotangents)
    given = results(fused, x, parameters, cotangents)
    for a, b in zip(given, expected, strict=True):
        assert a.dtype == x.dtype
        assert a.device == x.device
        assert a.shape == b.shape
        assert (a.double().cpu() - b).abs().max() <= tolerance * (1 + b.abs().max())
    with torch.no_grad():
        for a, b in zip(fused(x, parameters), given, strict=False):
            assert torch.equal(a, b)


def residual(root, y, parameters):
    error = (evaluate(root, parameters, MIN_SLOPE)[0] - y).abs() / (1 + y.abs() + root.abs())
    return error.max() / torch.finfo(y.dtype).eps


@pytest.mark.parametrize(("dtype", "shifts"), [(torch.float32, True), (torch.float64, False)])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(device, name, dtype, shifts):
    *shapes, m, k = CASES[name]
    x, parameters = (t.to(device, dtype) for t in draw(*shapes, m, k, shifts))
    check(x, parameters, 1000 * EPS[dtype])


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("name", [name for name in CASES if name != "shared by all"])
def test_inverses(device, name, dtype):
    *shapes, m, k = CASES[name]
    x, parameters = (t.to(device, dtype) for t in draw(*shapes, m, k))
    y = evaluate(x, parameters, MIN_SLOPE)[0]
    g = [torch.randn(y.shape)]
    given = results(lambda *t: [invert(*t, MIN_SLOPE, Solver())], y, parameters, g)
    root = given[0]
    assert torch.allclose(root, x.expand(root.shape), rtol=0, atol=1e5 * EPS[dtype])
    # At the root, the derivatives are those of a step of Newton's method.
    y, root, p = (t.double().cpu() for t in (y, root, parameters))

    def newton(y, p):
        value, ladj = eager.differentiable(*kernels._broadcast(root, p), MIN_SLOPE)
        return [root - (value - y) * (-ladj.detach()).exp()]

    expected = results(newton, y, p, g)
    for a, b in zip(given, expected, strict=True):
        assert (a.double().cpu() - b).abs().max() <= 1e5 * EPS[dtype] * (1 + b.abs().max())


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e6])
@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, (7, 3)), (torch.float64, (3,))])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(device, name, batch, size, dtype):
    x, parameters = (t.to(device) for t in extreme(name, batch, dtype))
    x = size * x
    if len(batch) == 1:  # one program is enough, and takes less time
        x, parameters = x[:, :1], parameters[:1]
    phase = max(size, 1.0) * (1e4 if name == "high frequencies" else 1.0)
    tolerance = 1e4 * EPS[dtype] * phase
    if tolerance < 0.1:  # or else no digits of the phase are left
        check(x, parameters, tolerance)
    y, ladj = evaluate(x, parameters, MIN_SLOPE)
    assert y.isfinite().all()
    assert ladj.min() >= 2 * math.log(MIN_SLOPE) - 1e-2
    if name == "high frequencies" and size == 1e6:
        return
    p = parameters[..., -1:, :]
    y = evaluate(x, p, MIN_SLOPE)[0]
    assert residual(invert(y, p, MIN_SLOPE, Solver()), y, p) <= 32


@pytest.mark.parametrize("dtype", EPS)
def test_any_parameters_have_a_root(device, dtype):
    # An InversionWarning would be an error.
    y, p = (t.sign() * 10 ** (1.5 * t).clamp(-4, 4) for t in draw((400,), (400,), 1, 2))
    y, p = y.to(device, dtype), p.to(device, dtype)
    with record_inversions() as inversions:
        root = invert(y, p, MIN_SLOPE, Solver())
    assert residual(root, y, p) <= 32
    assert 3 < inversions[0].iterations < 100


@pytest.mark.parametrize("min_slope", [1e-12, 0.3])
@pytest.mark.parametrize("dtype", EPS)
def test_smallest_slopes(device, min_slope, dtype):
    # The bound of float64 keeps its digits: the slope is 1 - (1 - min_slope) at the phase 0.
    x, p = torch.zeros(1, dtype=dtype), torch.tensor([[0.0, 0.0, 0.0, 100.0]], dtype=dtype)
    _, ladj = evaluate(x.to(device), p.to(device), min_slope)
    assert ladj.item() == pytest.approx(math.log(max(min_slope, 16 * EPS[dtype])), rel=1e-4)
    x, p = (t.to(device, dtype) for t in draw((5, 2), (2,)))
    check(x, p, 1000 * EPS[dtype], min_slope)


def test_inputs_need_not_be_contiguous(device):
    x, parameters = (t.to(device) for t in draw((3, 5), (5, 3)))
    for p in (parameters, parameters[0], parameters[:1].expand(5, 3, *parameters.shape[-2:])):
        check(x, p, 1e-12, numbers=lambda x: x.T)


@pytest.mark.parametrize(("batch", "bad"), [((3,), math.inf), ((5, 3), math.nan)])
def test_what_is_not_finite_stays_so(device, batch, bad):
    x, parameters = (t.to(device) for t in draw((5, 3), batch))
    x[2, 1] = bad
    expected = torch.ones(5, 3, dtype=torch.bool)
    expected[2, 1] = False
    for output in evaluate(x, parameters, MIN_SLOPE):
        assert torch.equal(output.isfinite().cpu(), expected)
    with warnings.catch_warnings():  # of the values that are finite
        warnings.simplefilter("error", InversionWarning)
        root = invert(x, parameters, MIN_SLOPE, Solver())
    assert torch.equal(root.isfinite().cpu(), expected)
    for i in range(parameters.shape[-1] - 1):  # each part but the shift
        p = parameters.clone()
        p[..., i] = math.nan
        assert evaluate(x, p, MIN_SLOPE)[0].isnan().all()


def test_too_few_iterations_warn_and_are_recorded(device):
    x, parameters = (t.to(device) for t in draw((5, 3), (3,)))
    y = evaluate(5 * x, parameters, MIN_SLOPE)[0]
    with record_inversions() as inversions, pytest.warns(InversionWarning, match="after 1 iter"):
        invert(y, parameters, MIN_SLOPE, Solver(max_iter=1))
    assert [*inversions[0]] == ["sinusoid", 1, 2 * 15]


def test_algorithm_1(device, monkeypatch):
    x, parameters = (t.to(device) for t in draw((5, 3), (3,)))
    parameters[..., 9] = 0.3 * parameters[..., 9].tanh()
    with record_inversions() as inversions:
        root = invert(x, parameters, MIN_SLOPE, Solver("banach"))
        monkeypatch.setattr(kernels, "_triton", lambda *_: None)
        expected = invert(x, parameters, MIN_SLOPE, Solver("banach"))
    assert torch.allclose(root, expected, rtol=0, atol=1e-12)
    assert abs(inversions[0].iterations - inversions[1].iterations) <= 1


def test_second_derivatives(device, monkeypatch):
    x, parameters = (t.to(device).requires_grad_() for t in draw((5, 2), (2,), 1))

    def second():
        y = invert(evaluate(x, parameters, MIN_SLOPE)[0].sin(), parameters, MIN_SLOPE, Solver())
        first = torch.autograd.grad(y.sin().sum(), (x, parameters), create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), (x, parameters))

    given = second()
    monkeypatch.setattr(kernels, "_triton", lambda *_: None)
    for a, b in zip(given, second(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ["shared", "per-element"])
def test_results_are_deterministic(device, case):
    *shapes, m, k = CASES[case]
    x, parameters = (t.to(device, torch.float32) for t in draw(*shapes, m, k))
    cotangents = [torch.ones(x.shape)] * 2
    first, second = (
        results(lambda *t: evaluate(*t, MIN_SLOPE), x, parameters, cotangents) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_a_first_launch_tells_whether_kernels_run(device, monkeypatch):
    load = kernels.load.__wrapped__
    assert load("triton", torch.device(device)) is gpu

    def fail(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(gpu, "forward", fail)
    with pytest.warns(UserWarning, match="no compiler"):
        assert load("triton", torch.device(device)) is None


def test_which_tensors_take_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "load", lambda name, device: device)

    def tensor(device="cuda:0", dtype=torch.float32):
        return SimpleNamespace(is_cuda=device != "cpu", device=device, dtype=dtype)

    for dtype in EPS:
        assert kernels._triton(tensor(dtype=dtype), tensor(dtype=dtype)) == "cuda:0"
    assert kernels._triton(tensor("cpu"), tensor("cpu")) is None
    assert kernels._triton(tensor(), tensor("cuda:1")) is None
    assert kernels._triton(tensor(), tensor(dtype=torch.float64)) is None
    assert kernels._triton(tensor(dtype=torch.half), tensor(dtype=torch.half)) is None


def compiled(kernel, signature, constants):
    """What the compiler makes of a kernel for a GPU, which takes no GPU."""
    source = triton.compiler.ASTSource(kernel, signature, constants)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target).asm


KERNELS = {
    "forward": (gpu._forward, {"save": 1}),
    "backward": (gpu._backward, {"small": 1e-4}),
    "invert": (gpu._invert, {"eps": 1e-9, "aim": 0.3, "max_iter": 200, "banach": 0}),
}


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize(("own", "has_shift", "block", "count"), [(0, 0, 128, 3), (1, 1, 16, 3)])
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile(name, dtype, own, has_shift, block, count, tmp_path, monkeypatch):
    """What the interpreter lets pass need not compile."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, more = KERNELS[name]
    constants = {
        **more, "m": 3, "count": count, "width": triton.next_power_of_2(count), "limit": 0.9,
        "smallest": 1e-19, "has_shift": has_shift, "own": own, "block": block,
    }  # fmt: skip
    signature = {}
    for argument in kernel.arg_names:
        number = "i64" if argument in ("rows", "period") else f"*{dtype}"
        signature[argument] = "constexpr" if argument in constants else number
    code = compiled(kernel, signature, constants)
    assert code["cubin"]
    if dtype == "fp64":  # constants keep their digits
        assert "0d" + struct.pack(">d", 0.9).hex().upper() in code["ptx"]
        rounded = struct.unpack("f", struct.pack("f", 0.9))[0]
        assert "0d" + struct.pack(">d", rounded).hex().upper() not in code["ptx"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnGPU:
    def test_kernels_are_used(self):
        x, parameters = (t.cuda() for t in draw((5, 3), (3,)))
        assert kernels._triton(x, parameters) is gpu
        expected = evaluate(x.cpu(), parameters.cpu(), MIN_SLOPE)
        for a, b in zip(evaluate(x, parameters, MIN_SLOPE), expected, strict=True):
            assert torch.allclose(a.cpu(), b, rtol=0, atol=1e-12)

    def test_autocast_changes_nothing(self):
        x, parameters = (t.cuda().float() for t in draw((500, 3), (3,)))
        cotangents = [torch.ones(x.shape)] * 2

        def function(x, parameters):
            return evaluate(x, parameters, MIN_SLOPE)

        expected = results(function, x, parameters, cotangents)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            given = results(function, x, parameters, cotangents)
        assert all(map(torch.equal, given, expected))

    def test_training_does_not_wait_for_the_device(self):
        flow, x = SinusoidalFlow(3, transforms=2).cuda(), torch.randn(64, 3).cuda()
        optimizer = torch.optim.Adam(flow.parameters())

        def step():
            optimizer.zero_grad()
            (-flow().log_prob(x).mean()).backward()
            optimizer.step()

        with pyro.validation_enabled(False):
            step()  # compiles, and makes the optimizer's state
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
                with torch.no_grad():
                    flow().log_prob(x)
            finally:
                torch.cuda.set_sync_debug_mode("default")
