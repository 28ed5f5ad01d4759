"""Devices and dtypes. There need be no GPU: fake tensors have a device, and no values."""

import pyro
import pytest
import torch
import zuko
from conftest import FAKE_GPU, perturb
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_sinflow import (
    LDU,
    ConditionalLDU,
    Sinusoidal,
    SinusoidalFlow,
    Solver,
    _torch,
    fast_inverse,
    kernels,
)

BLOCKS = {
    "Sinusoidal": lambda: Sinusoidal(3),
    "LDU": lambda: LDU(3),
    "shift": lambda: LDU(3, scale=False),
}
SHIFT = {"conditioner": "independent", "scale": False, "context_diagonal": True}
FLOWS = {
    "independent": lambda s=Solver(): SinusoidalFlow(
        3, 2, transforms=2, conditioner="independent", solver=s
    ),
    "shift": lambda s=Solver(): SinusoidalFlow(3, 2, transforms=2, solver=s, **SHIFT),
    "autoregressive": lambda s=Solver(): SinusoidalFlow(3, 2, transforms=2, solver=s),
    "ConditionalLDU": lambda s=Solver(): zuko.lazy.Flow(
        [ConditionalLDU(3, 2, solver=s), ConditionalLDU(3, 2, solver=s).inv],
        zuko.flows.MAF(3).base,
    ),
    "MAF": lambda s=Solver(): fast_inverse(zuko.flows.MAF(3, 2, transforms=2), s),
    "NSF": lambda s=Solver(): fast_inverse(zuko.flows.NSF(3, 2, transforms=2), s),
}
BRIEF = Solver(max_iter=3)  # where nothing can be read, an inverse runs to its limit


@pytest.fixture(autouse=True)
def _no_checks_of_values(monkeypatch):
    """Fake tensors have no values for torch's distributions to check."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)


@pytest.fixture
def gpu():
    """The name of a device for fake tensors."""
    if FAKE_GPU is None:
        pytest.skip("this version of torch knows no backend that is no more than its name")
    return FAKE_GPU


def move(module):
    """Moves a module to the default device, leaving the values behind.

    Masks are made of values, so that no masked network can be made of fake tensors at once.
    """
    moved = {}
    for m in module.modules():
        for tensors in (m._parameters, m._buffers):
            for name, t in tensors.items():
                if t is not None and t not in moved:
                    like = torch.empty(t.shape, dtype=t.dtype)
                    moved[t] = nn.Parameter(like) if isinstance(t, nn.Parameter) else like
                tensors[name] = moved.get(t)
    return module


def use(flow):
    """Does everything that a flow is for, and yields each result by name."""
    c, x = torch.randn(5, 2), torch.randn(4, 5, 3)
    d = flow(c)
    yield "log_prob", d.log_prob(x)
    yield "sample", d.sample((4,))
    z, ladj = d.transform.call_and_ladj(x)
    yield "value", z
    yield "log-determinant", ladj
    yield "inverse", d.transform.inv(z)
    if torch.is_grad_enabled():
        x, log_prob = d.rsample_and_log_prob((4,))
        (log_prob - d.log_prob(x.detach()) + x.sum(-1)).mean().backward()
        for name, p in flow.named_parameters():
            yield name, p.grad


@pytest.mark.parametrize("name", FLOWS)
def test_flows_on_a_fake_device(name, gpu):
    flow = FLOWS[name](BRIEF)
    with FakeTensorMode(), torch.device(gpu):
        for what, result in use(move(flow)):
            assert result.device.type == gpu, what


@pytest.mark.parametrize("name", FLOWS)
def test_flows_on_meta(name):
    flow = FLOWS[name](BRIEF).to("meta")
    with torch.device("meta"):
        for what, result in use(flow):
            assert result.is_meta, what


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_on_a_fake_device(name, gpu):
    t = BLOCKS[name]()
    with FakeTensorMode(), torch.device(gpu):
        move(t)
        x = torch.randn(4, 3, requires_grad=True)
        y = t(x)
        ladj = t.log_abs_det_jacobian(x, y)
        (ladj.sum() + t.inv(torch.randn(4, 3)).sum()).backward()
        grads = [x.grad, *(p.grad for p in t.parameters())]
        for result in (y, ladj, t.inv(y), *grads):
            assert result.device.type == gpu


def test_a_module_is_made_on_the_default_device():
    with torch.device("meta"):
        assert all(p.is_meta for p in Sinusoidal(3).parameters())


def test_a_stray_tensor_is_noticed(gpu):
    # Or else the tests above could not fail.
    flow = FLOWS["independent"]()
    with FakeTensorMode():
        with torch.device(gpu):
            d = move(flow)(torch.randn(2))
        with pytest.raises(RuntimeError, match="device"):
            d.log_prob(torch.randn(3))


@pytest.mark.parametrize("name", FLOWS)
def test_default_dtype(name):
    torch.set_default_dtype(torch.float64)
    try:
        for what, result in use(FLOWS[name]()):
            assert result.dtype == torch.float64, what
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", FLOWS)
def test_double(name):
    flow = perturb(FLOWS[name]().double(), 0.05)
    c, x = torch.randn(5, 2).double(), torch.randn(4, 5, 3).double()
    t = flow(c).transform
    y, ladj = t.call_and_ladj(x)
    assert y.dtype == ladj.dtype == torch.float64
    assert torch.allclose(t.inv(y), x, rtol=0, atol=1e-11)
    expected = flow(c).log_prob(x)
    flow.float()
    assert torch.allclose(flow(c.float()).log_prob(x.float()).double(), expected, atol=1e-3)


def agree(a, b, dtype):
    """Whether a round trip came back, where networks compute in half precision.

    The map jumps where an input of a network rounds to another number, so that few elements may be
    off by as much as the network's round-off.
    """
    error = (a - b).abs()
    return error.median() <= 1e-6 and error.max() <= 4 * torch.finfo(dtype).eps


HALVES = [torch.bfloat16, torch.float16]
NATIVE = [name for name in FLOWS if name not in ("MAF", "NSF")]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_in_half_precision(name, dtype):
    t = perturb(BLOCKS[name]()).to(dtype)
    x = torch.randn(5, 3, dtype=dtype)
    y, ladj = t.call_and_ladj(x)
    assert y.dtype == ladj.dtype == torch.float32
    back = t.inv(y)
    assert back.dtype == torch.float32
    assert agree(back, x, dtype)
    t.inv(y.to(dtype)).sum().backward()
    for p in t.parameters():
        assert p.grad.dtype == dtype
        assert p.grad.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NATIVE)
def test_flows_in_half_precision(name, dtype):
    flow = perturb(FLOWS[name](), 0.05).to(dtype)
    c, x = torch.randn(5, 2, dtype=dtype), torch.randn(4, 5, 3, dtype=dtype)
    log_prob = flow(c).log_prob(x)
    assert log_prob.dtype == torch.float32
    log_prob.mean().backward()
    assert flow(c).sample((4,)).isfinite().all()
    for name, p in flow.named_parameters():
        assert p.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", HALVES)
def test_log_densities_of_samples_in_half_precision(dtype):
    flow = perturb(SinusoidalFlow(64, transforms=1), 0.01).to(dtype)
    x, log_prob = flow().rsample_and_log_prob((50,))
    assert log_prob.dtype == torch.float32
    assert torch.allclose(flow().log_prob(x), log_prob, atol=5e-3)


@pytest.mark.parametrize("name", BLOCKS)
def test_extremes_of_half_precision(name):
    t = perturb(BLOCKS[name]())
    info = torch.finfo(torch.float16)
    x = torch.tensor([info.min, -info.tiny, 0.0, info.tiny, info.max], dtype=torch.float16)
    x = x[:, None].expand(-1, 3)
    y, ladj = t.call_and_ladj(x)
    for result in (y, ladj, t.inv(x)):
        assert result.dtype == torch.float32
        assert result.isfinite().all()


@pytest.mark.parametrize("name", FLOWS)
def test_autocast(name):
    flow = perturb(FLOWS[name](), 0.05)
    c, x = torch.randn(5, 2), torch.randn(4, 5, 3)
    dtypes = []
    for layer in flow.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        d = flow(c)
        y, ladj = d.transform.call_and_ladj(x)
        back = d.transform.inv(y)
        log_prob = d.log_prob(x)
        (log_prob.mean() + d.rsample((4,)).mean()).backward()
    assert set(dtypes) == {torch.bfloat16}
    if name in NATIVE:
        assert y.dtype == ladj.dtype == back.dtype == log_prob.dtype == torch.float32
        assert agree(back, x, torch.bfloat16)
    for name, p in flow.named_parameters():
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all(), name


class Reads(TorchDispatchMode):
    """Counts the operations for which the host would wait for a device."""

    WAITING = ("_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero")
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masks or name in self.WAITING:
            self.found(name)
        return operation(*args, **kwargs or {})

    def found(self, name):
        self.count += 1


class NoReads(Reads):
    """Lets none of them run."""

    def found(self, name):
        raise AssertionError(name)


def densities(flow, c, x):
    d = flow(c)
    d.transform.call_and_ladj(x)
    d.log_prob(x).mean().backward()


class OnOneDevice(TorchDispatchMode):
    """Lets no operation make a tensor on the CPU, which a CUDA graph could not copy."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        for t in result if isinstance(result, tuple | list) else [result]:
            assert not isinstance(t, torch.Tensor) or t.device.type != "cpu", operation
        return result


@pytest.mark.parametrize("name", FLOWS)
def test_densities_make_no_tensors_on_the_cpu(name, gpu):
    flow = FLOWS[name](BRIEF)
    with FakeTensorMode():
        with torch.device(gpu):
            flow, c, x = move(flow), torch.randn(4, 2), torch.randn(4, 3)
        with OnOneDevice():
            densities(flow, c, x)


@pytest.mark.parametrize("name", NATIVE)
def test_densities_read_no_values_without_validation(name, monkeypatch):
    monkeypatch.setattr(kernels, "_NUMPY", -1)  # numpy's arrays are on no device
    flow, c, x = FLOWS[name](), torch.randn(4, 2), torch.randn(4, 3)
    if name == "ConditionalLDU":
        flow = zuko.lazy.Flow([flow.transform.transforms[0]], flow.base)  # the other is an inverse
    with pyro.validation_enabled(False):
        densities(flow, c, x)  # the first call finds out about the modules
        with NoReads():
            densities(flow, c, x)
    with NoReads(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        densities(flow, c, x)


@pytest.mark.parametrize("name", FLOWS)
def test_samples_read_no_values_during_the_capture_of_a_graph(name, monkeypatch):
    monkeypatch.setattr(kernels, "_NUMPY", -1)
    flow, c = FLOWS[name](), torch.randn(4, 2)
    z = torch.randn(4, 3)
    expected = flow(c).transform.inv(z)
    monkeypatch.setattr(_torch, "_CAPTURING", "cpu")
    monkeypatch.setattr(_torch, "_is_capturing", lambda: True)
    with pyro.validation_enabled(False), NoReads():
        x = flow(c).transform.inv(z)
        x.sum().backward()
    assert torch.allclose(x, expected, atol=1e-5)
    assert any(p.grad is not None for p in flow.parameters())
    with torch.no_grad(), pyro.validation_enabled(False), NoReads():
        x = flow(c).transform.inv(z)
    assert torch.allclose(x, expected, atol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_read_no_values_without_validation(name, monkeypatch):
    monkeypatch.setattr(kernels, "_NUMPY", -1)
    t, x = BLOCKS[name](), torch.randn(4, 3)
    with pyro.validation_enabled(False), NoReads():
        y = t(x)
        t.log_abs_det_jacobian(x, y).sum().backward()


def reads(function):
    with Reads() as mode:
        function()
    return mode.count


@pytest.mark.parametrize("name", ["independent", "shift", "autoregressive"])
def test_blocks_read_the_values_of_a_context_once(name):
    def flow(transforms):
        options = SHIFT if name == "shift" else {"conditioner": name}
        return SinusoidalFlow(3, 2, transforms, **options)

    x, base = torch.randn(4, 3), zuko.flows.MAF(3).base
    few = reads(lambda: base(None).log_prob(x))
    for f in (flow(1), flow(3)):
        assert reads(lambda f=f: f(torch.ones(2)).log_prob(x)) == few + 2  # of x and of c


@pytest.mark.parametrize("part", ["flow", "block", "network"])
def test_a_context_that_has_changed_is_read_again(part):
    block = ConditionalLDU(3, 2)
    network = block.lower.network
    call = {
        "flow": SinusoidalFlow(3, 2),
        "block": block,
        "network": lambda c: network(torch.ones(3), c),
    }[part]
    c = torch.ones(2)
    assert reads(lambda: call(c)) == 1
    assert reads(lambda: call(c)) == 0
    assert reads(lambda: call(torch.ones(2))) == 1
    c[0] = torch.nan
    with pytest.raises(ValueError, match="'context' should be finite, got 1 NaN"):
        call(c)
    with pytest.raises(ValueError, match="'context' should be finite, got 1 NaN"):
        call(c)
    with torch.inference_mode():  # where tensors have no versions
        c = torch.ones(2)
        assert [reads(lambda: network(torch.ones(3), c)) for _ in range(2)] == [1, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnGPU:
    @pytest.mark.parametrize("name", FLOWS)
    def test_agrees_with_cpu(self, name):
        flow = perturb(FLOWS[name](), 0.05).double()
        c, x = torch.randn(5, 2).double(), torch.randn(4, 5, 3).double()
        expected = flow(c).log_prob(x)
        flow, c, x = flow.cuda(), c.cuda(), x.cuda()
        assert torch.allclose(flow(c).log_prob(x).cpu(), expected, rtol=0, atol=1e-10)
        y = flow(c).transform(x)
        assert torch.allclose(flow(c).transform.inv(y), x, rtol=0, atol=1e-11)
        with torch.device("cuda"):
            for what, result in use(FLOWS[name]()):
                assert result.is_cuda, what

    def test_a_graph_of_an_inverse(self):
        flow, z = perturb(SinusoidalFlow(3, transforms=2), 0.05).cuda(), torch.randn(9, 3).cuda()
        with torch.no_grad(), pyro.validation_enabled(False):
            expected = flow().transform.inv(z)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                x = flow().transform.inv(z)
            graph.replay()
        assert torch.allclose(x, expected, atol=1e-4)

    @pytest.mark.parametrize("name", BLOCKS)
    def test_log_determinant(self, name):
        t = perturb(BLOCKS[name]()).double().cuda()
        x = torch.randn(3).double().cuda()
        jacobian = torch.autograd.functional.jacobian(t, x)
        ladj = t.log_abs_det_jacobian(x, t(x)).sum()
        assert torch.allclose(jacobian.slogdet().logabsdet, ladj, rtol=0, atol=1e-10)

    def test_svi(self):
        t = LDU(3).cuda()
        base = pyro.distributions.Normal(torch.zeros(3).cuda(), 1.0).to_event(1)

        def model():
            pyro.sample("x", pyro.distributions.Normal(torch.ones(3).cuda(), 0.5).to_event(1))

        def guide():
            pyro.module("t", t)
            pyro.sample("x", pyro.distributions.TransformedDistribution(base, [t]))

        svi = pyro.infer.SVI(
            model, guide, pyro.optim.Adam({"lr": 1e-2}), pyro.infer.Trace_ELBO(num_particles=64)
        )
        losses = [svi.step() for _ in range(100)]
        assert losses[-1] < losses[0] / 2
