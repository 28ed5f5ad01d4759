"""Checks of what works in torch, one for each row of docs/compatibility.md."""

import copy
import io
import pickle
from contextlib import contextmanager
from unittest import mock

import pyro
import pytest
import torch
from compatibility import agree, directions, gradients, inputs
from conftest import FAKE_GPU, replicate
from test_devices import NoReads
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import parametrizations

from pyro_sinflow import kernels

# Transformations of functions


def check_compile(s):
    x, c = inputs(s, 5)
    torch._dynamo.reset()
    # zuko asserts that a tuple of transforms is not empty, which the compiler takes for a tensor.
    with torch._dynamo.config.patch(rewrite_assert_with_torch_assert=False):
        for f in directions(s):
            value = torch.compile(f, fullgraph=True, backend="eager")(x, c)
            expected = f(x, c)
            agree(value, expected)
            agree(gradients(value, s), gradients(expected, s), atol=1e-3)


def scalar(f, c):
    return lambda x: f(x, c).sin().sum()


def check_func_grad(s):
    x, c = inputs(s, 5)
    for f in directions(s):
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(scalar(f, c)(leaf), leaf)
        agree(torch.func.grad(scalar(f, c))(x), expected, atol=1e-3)


def check_vmap(s):
    x, c = inputs(s, 5)
    for f in directions(s):
        given = (x,) if c is None else (x, c)
        agree(torch.func.vmap(f)(*given), f(x, c))
        each = torch.func.vmap(torch.func.grad(lambda x, *c, f=f: f(x, *c).sum()))(*given)
        agree(each, torch.func.grad(lambda x, f=f: f(x, c).sum())(x), atol=1e-3)


def jacobians(s, transform):
    """Compares a transform of torch.func with the Jacobian that autograd computes row by row."""
    x, c = inputs(s)
    for f in directions(s):

        def g(x, f=f):
            return f(x, c)

        agree(transform(g)(x), torch.autograd.functional.jacobian(g, x), atol=1e-3)


def check_jacrev(s):
    jacobians(s, torch.func.jacrev)


def check_jacfwd(s):
    jacobians(s, torch.func.jacfwd)


def check_functional_call(s):
    x, c = inputs(s, 5)
    others = {n: p.detach() + 0.1 for n, p in s.named_parameters()}
    value = torch.func.functional_call(s, others, (x, c))
    other = copy.deepcopy(s)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    agree(value, other(x, c))


def check_forward_mode(s):
    x, c = inputs(s, 5)
    v = torch.randn_like(x)
    for f in directions(s):
        with forward_ad.dual_level():
            value, tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v), c))
        agree(value, f(x, c))
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(leaf, c).sum(), leaf)
        agree(tangent.sum(), (g * v).sum(), atol=1e-3)


def check_double_backward(s):
    s.double()
    x, c = inputs(s)
    for f in directions(s):
        assert torch.autograd.gradgradcheck(lambda x, f=f: f(x, c), x.requires_grad_())


# Dtypes and devices


def check_autocast(s):
    x, c = inputs(s, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_prob, z = s(x, c), s.inverse(x, c)
        grads = gradients(log_prob, s) + gradients(z, s)
        back = s.transform(c)(z)
    assert log_prob.isfinite().all()
    assert all(g.isfinite().all() for g in grads)
    agree(back, x, atol=0.1)


def check_half(s):
    half(copy.deepcopy(s), torch.float16)
    half(s, torch.bfloat16)


def half(s, dtype):
    s.to(dtype)
    x, c = inputs(s, 5)
    log_prob, z = s(x, c), s.inverse(x, c)
    assert log_prob.dtype == z.dtype == torch.float32
    for g in gradients(log_prob, s) + gradients(z, s):
        assert g.isfinite().all()
    agree(s.transform(c)(z), x, atol=0.1)


def check_float64(s):
    s.double()
    x, c = inputs(s, 5)
    assert s(x, c).dtype == torch.float64
    agree(s.transform(c)(s.inverse(x, c)), x, atol=1e-10)


def check_meta(s):
    s.to("meta")
    with torch.device("meta"):
        x, c = inputs(s, 5)
        for f in directions(s):
            assert f(x, c).is_meta


def check_cuda(s):
    """A device of fake tensors stands for the GPU."""
    if FAKE_GPU is None:
        pytest.skip("this version of torch knows no backend that is no more than its name")
    with FakeTensorMode():
        for module in s.modules():
            for tensors in (module._parameters, module._buffers):
                for name, t in tensors.items():
                    if t is not None:
                        tensors[name] = fake(t)
        with torch.device(FAKE_GPU):
            x, c = inputs(s, 5)
            for f in directions(s):
                assert f(x, c).device.type == FAKE_GPU


def fake(t):
    like = torch.empty(t.shape, dtype=t.dtype, device=FAKE_GPU)
    return nn.Parameter(like) if isinstance(t, nn.Parameter) else like


def check_cuda_graph(s):
    """A graph cannot read values: none are read in the explicit direction."""
    x, c = inputs(s, 5)
    with mock.patch.object(kernels, "_NUMPY", -1), pyro.validation_enabled(False):  # without numpy
        s(x, c)  # the first call finds out about the modules
        with NoReads():
            s(x, c).sum().backward()
        with NoReads(), pytest.raises(AssertionError):
            s.inverse(x.expand(20, 5, 3), c)


# Modules, files and processes


def check_copies(s):
    x, c = inputs(s, 5)
    expected = s(x, c)
    for again in (copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), saved):
        agree(again(s)(x, c), expected)
        with torch.no_grad():  # torch copies no tensors with a graph
            agree(again(s.transform(c)).inv(x), s.inverse(x, c))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def check_state_dict(s):
    x, c = inputs(s, 5)
    file = io.BytesIO()
    torch.save(s.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(s)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    agree(other(x, c), s(x, c))


def check_trace(s):
    for f in (s, Inverse(s)):
        given = tuple(t for t in inputs(s, 5) if t is not None)
        traced = torch.jit.trace(f, given, check_trace=False)
        given = tuple(t for t in inputs(s, 9) if t is not None)
        agree(traced(*given), f(*given))


class Inverse(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s = s

    def forward(self, y, c=None):
        return self.s.inverse(y, c)


def check_export(s):
    rows = torch.export.Dim("rows")
    with torch._dynamo.config.patch(rewrite_assert_with_torch_assert=False):
        for f in (s, Inverse(s)):
            given = tuple(t for t in inputs(s, 5) if t is not None)
            program = torch.export.export(
                f, given, dynamic_shapes=tuple({0: rows} for _ in given), strict=True
            ).module()
            given = tuple(t for t in inputs(s, 9) if t is not None)
            agree(program(*given), f(*given))


def check_weight_norm(s):
    for layer in [*s.modules()]:
        if isinstance(layer, nn.Linear):
            parametrizations.weight_norm(layer)
    x, c = inputs(s, 5)
    z = s.inverse(x, c)
    agree(s.transform(c)(z), x, atol=1e-3)
    for value in (s(x, c), z):
        assert sum(bool(g.any()) for g in gradients(value, s)) > 1


@contextmanager
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def compare_wrapped(s, wrap):
    x, c = inputs(s, 5)
    for f in (s, Inverse(s)):
        module = copy.deepcopy(f)
        value, expected = wrap(module)(x, c), f(x, c)
        agree(value, expected)
        for v in (value, expected):
            v.sin().sum().backward()
        grads = [p.grad for p in module.parameters()]
        grads = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
        agree(grads, [p.grad for p in f.parameters()])
        s.zero_grad()


def check_ddp(s):
    with process_group():
        compare_wrapped(s, nn.parallel.DistributedDataParallel)


def check_fsdp(s):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("needs torch 2.6")
    with process_group():
        mesh = init_device_mesh("cpu", (1,))
        compare_wrapped(s, lambda module: fsdp.fully_shard(module, mesh=mesh) or module)


def check_data_parallel(s):
    x, c = inputs(s, 5)
    for f, g in zip(directions(replicate(s)), directions(s), strict=True):
        value, expected = f(x, c), g(x, c)
        agree(value, expected)
        agree(gradients(value, s), gradients(expected, s))
