"""Contexts: large ones, those of half precision, and those that do not fit."""

import copy

import pytest
import torch
import zuko
from conftest import perturb
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zuko.lazy import Flow

from pyro_sinflow import ConditionalLDU, PixelCNN, SinusoidalFlow, fast_inverse

BLOCKS = {"conditioner": "independent"}
IMAGES = {"network": PixelCNN, "hidden_features": (4,), **BLOCKS}
FLOWS = {
    "scale": lambda c: SinusoidalFlow(4, c, transforms=2, **BLOCKS),
    "shift": lambda c: SinusoidalFlow(4, c, transforms=2, scale=False, **BLOCKS),
    "context_diagonal": lambda c: SinusoidalFlow(
        4, c, transforms=2, context_diagonal=True, **BLOCKS
    ),
    "autoregressive": lambda c: SinusoidalFlow(4, c, transforms=2),
    "PixelCNN": lambda c: SinusoidalFlow((1, 2, 2), c, transforms=2, **IMAGES),
    "fast_inverse(NSF)": lambda c: fast_inverse(zuko.flows.NSF(4, c, transforms=2)),
}


def features(name, *batch):
    return torch.randn(*batch, *((1, 2, 2) if name == "PixelCNN" else (4,)))


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.size = max(self.size, leaf.numel())
        return result


@pytest.mark.parametrize("name", FLOWS)
def test_a_large_context_needs_no_more_than_its_weights(name):
    context, rows = 4096, 50
    flow = FLOWS[name](context)
    c, x = torch.randn(context), features(name, rows)
    with Largest() as largest:
        flow(c).sample((rows,))
        flow(c).rsample((rows,)).sum().backward()
        flow(c).log_prob(x).sum().backward()
    weights = max(p.numel() for p in flow.parameters())
    assert weights >= 4 * context
    assert largest.size <= max(weights, rows * (context + 4))


@pytest.mark.parametrize("name", ["scale", "autoregressive"])
def test_asinh_compresses_a_context(name):
    flow = perturb(FLOWS[name](3), 0.1)
    c, x = 100 * torch.randn(5, 3), features(name, 5)
    compressed = (0.3 * c).asinh() / 0.3
    plain = copy.deepcopy(flow)
    for part in plain.modules():
        part.compress = False
    assert torch.allclose(flow(c).log_prob(x), plain(compressed).log_prob(x))
    assert not torch.allclose(flow(c).log_prob(x), plain(c).log_prob(x))


@pytest.mark.parametrize("name", FLOWS)
def test_the_parts_of_a_flow_make_a_flow_of_the_same_density(name):
    flow = perturb(FLOWS[name](3), 0.1)
    parts = Flow([*flow.transform.transforms], flow.base)
    c, x = 3 * torch.randn(5, 3), features(name, 5)
    assert torch.allclose(parts(c).log_prob(x), flow(c).log_prob(x))
    assert torch.allclose(parts(c[0]).log_prob(x), flow(c[0]).log_prob(x))


def test_a_flow_without_asinh_takes_the_context_as_it_is():
    flow = SinusoidalFlow(4, 3, tails=False)
    c, x = 100 * torch.randn(5, 3), torch.randn(5, 4)
    value, ladj = x, 0
    for lazy in flow.transform.transforms:
        value, part = lazy(c).call_and_ladj(value)
        ladj = ladj + (part if part.ndim == 1 else part.sum(-1))
    assert torch.allclose(flow(c).log_prob(x), flow.base(c).log_prob(value) + ladj)


@pytest.mark.parametrize("name", FLOWS)
def test_a_distribution_follows_its_context(name):
    """One that is kept, as those of zuko are."""
    flow, x = perturb(FLOWS[name](2), 0.1), features(name, 5)
    c = nn.Parameter(torch.randn(2))
    kept = flow(c)
    copy.deepcopy(kept)
    before = kept.log_prob(x)
    for _ in range(2):  # each has a graph of its own
        kept.log_prob(x).sum().backward()
        kept.rsample((3,)).sum().backward()
    torch.optim.SGD([c], lr=0.1).step()
    assert torch.equal(kept.log_prob(x), flow(c).log_prob(x))
    assert not torch.equal(kept.log_prob(x), before)


@pytest.mark.parametrize("name", FLOWS)
def test_a_distribution_that_inference_mode_made_can_be_differentiated(name):
    flow, c, x = FLOWS[name](2), torch.randn(2), features(name, 5).requires_grad_()
    with torch.inference_mode():
        kept = flow(c)
    kept.log_prob(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("name", FLOWS)
def test_integers_are_converted_as_in_zuko(name, kind, dtype):
    flow = perturb(FLOWS[name](3).to(dtype), 0.1)
    labels, x = torch.eye(3)[[0, 2, 1]], features(name, 3).to(dtype)
    given, converted = flow(labels.to(kind)), flow(labels.to(dtype))
    assert torch.equal(given.log_prob(x), converted.log_prob(x))
    torch.manual_seed(0)
    sample = given.sample((20,))
    torch.manual_seed(0)
    assert torch.equal(sample, converted.sample((20,)))


def test_integers_that_no_part_sees():
    adjacency = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]])
    flow = SinusoidalFlow(2, 2, transforms=1, adjacency=adjacency).double()
    x = torch.randn(3, 2, dtype=torch.float64)
    labels = torch.eye(2)[[0, 1, 1]]
    assert torch.equal(flow(labels.long()).log_prob(x), flow(labels.double()).log_prob(x))


@pytest.mark.parametrize("name", FLOWS)
def test_a_context_that_is_not_finite_is_named(name):
    with pytest.raises(ValueError, match="'context' should be finite, got 1 NaN"):
        FLOWS[name](2)(torch.tensor([float("nan"), 0.0])).log_prob(features(name))


def test_an_image_needs_no_matrix_of_features():
    shape, rows = (1, 24, 24), 2
    flow = SinusoidalFlow(shape, transforms=1, **IMAGES)
    x = torch.randn(rows, *shape)
    with Largest() as largest:
        flow().sample((rows,))
        flow().rsample((rows,)).sum().backward()
        flow().log_prob(x).sum().backward()
    features = x[0].numel()
    assert largest.size < features**2 / 4


NATIVE = [name for name in FLOWS if name != "fast_inverse(NSF)"]


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", NATIVE)
def test_batches_that_do_not_broadcast_are_named(name, direction):
    d, x = FLOWS[name](2)(torch.randn(5, 2)), features(name, 4)
    with pytest.raises(ValueError, match=r"broadcast.*\(4,\).*context.* \(5,\)"):
        d.log_prob(x) if direction == "forward" else d.transform.inv(x)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"context_diagonal": True}])
def test_a_block_names_batches_that_do_not_broadcast(options, direction):
    block, x = ConditionalLDU(3, 2, **options), torch.randn(4, 3)
    for t in (block(torch.randn(5, 2)), block.condition(torch.randn(5, 2))):
        f = t if direction == "forward" else t.inv
        for use in (f, f.call_and_ladj, lambda x, f=f: f.log_abs_det_jacobian(x, x)):
            with pytest.raises(ValueError, match=r"broadcast.*\(4,\).*context.* \(5,\)"):
                use(x)


def gradients(enabled, flow, encoder, z, loss):
    """The gradients of a loss of a flow whose context is computed with or without autocast."""
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        c = encoder(z)
        assert c.dtype == (torch.bfloat16 if enabled else torch.float32)
        value = loss(flow(c))
    inputs = [*encoder.parameters(), *flow.parameters()]
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, inputs)])


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("what", ["score", "score after a sample", "sample"])
def test_contexts_that_are_computed_under_autocast(name, what):
    flow, encoder = perturb(FLOWS[name](2), 0.05), nn.Linear(3, 2)
    x, z = features(name, 60), torch.randn(60, 3)

    def loss(d):
        if what == "sample":
            return d.transform.inv(x).sin().mean()
        if what == "score after a sample":
            d.rsample((4,))  # autocast keeps the weights that it casts
        return d.log_prob(x).mean()

    half, single = (gradients(enabled, flow, encoder, z, loss) for enabled in (True, False))
    assert (half - single).norm() < 0.2 * single.norm()
