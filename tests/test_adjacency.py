"""Networks and flows with a dependency structure of the user's."""

import copy
import warnings
from functools import partial

import pytest
import torch
import zuko
from conftest import perturb, residual, slogdet
from torch import nn

from pyro_sinflow import (
    LDU,
    ConditionalLDU,
    LazyTriangular,
    MaskedNetwork,
    SinusoidalFlow,
    autoregressive,
    fast_inverse,
    record_inversions,
)

GRAPHS = {
    "none": torch.eye(5, dtype=torch.bool),
    "chain": torch.ones(5, 5, dtype=torch.bool).tril().triu(-1),
    "full": torch.ones(5, 5, dtype=torch.bool).tril(),
    # Feature 3 has one parent and feature 2 has two, yet 3 depends on 2.
    "tree": torch.tensor(
        [
            [1, 0, 0, 0, 1],
            [0, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [0, 0, 1, 1, 0],
            [0, 0, 0, 0, 1],
        ]
    ).bool(),
}
LONGEST = {"none": 1, "chain": 5, "full": 5, "tree": 4}
SOME = torch.tensor([[1, 0], [0, 0], [0, 1], [1, 1], [0, 0]]).bool()  # of two context features


def flow(adjacency, context=0, transforms=1, **options):
    options = {"hidden_features": (16, 16), **options}
    made = SinusoidalFlow(5, context, transforms, adjacency=adjacency, **options)
    return perturb(made.double(), 0.2)


def depends(f, x):
    """Which output depends on which input, at one of several points at least."""
    return (torch.func.vmap(torch.func.jacrev(f))(x) != 0).any(dim=0)


def reached(adjacency, steps):
    return torch.linalg.matrix_power(adjacency.double(), steps) > 0


@pytest.mark.parametrize("residual_blocks", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_network_depends_on_what_the_adjacency_says(name, residual_blocks):
    adjacency = GRAPHS[name]
    network = MaskedNetwork(5, 2, 3, residual=residual_blocks, adjacency=adjacency)
    perturb(network.double(), 0.5)
    x, c = torch.randn(20, 5).double(), torch.randn(2).double()
    on_features = depends(lambda x: network(x, c).abs().sum(dim=-1), x)
    assert torch.equal(on_features, adjacency & ~torch.eye(5, dtype=torch.bool))
    on_context = depends(lambda c: network(x[0], c).abs().sum(dim=-1), torch.randn(20, 2).double())
    assert on_context.all()


@pytest.mark.parametrize("name", GRAPHS)
def test_a_network_depends_on_the_context_that_the_adjacency_says(name):
    network = MaskedNetwork(5, 2, 3, adjacency=torch.cat((GRAPHS[name], SOME), dim=1))
    perturb(network.double(), 0.5)
    x = torch.randn(5).double()
    found = depends(lambda c: network(x, c).abs().sum(dim=-1), torch.randn(20, 2).double())
    assert torch.equal(found, SOME)


@pytest.mark.parametrize("transforms", [1, 2])
@pytest.mark.parametrize("name", GRAPHS)
def test_noise_depends_on_parents_and_on_ancestors_of_several_steps(name, transforms):
    f = flow(GRAPHS[name], 0, transforms, activation=nn.ELU)  # ReLUs may be off at all points
    found = depends(f().transform, torch.randn(20, 5).double())
    assert torch.equal(found, reached(GRAPHS[name], transforms))


@pytest.mark.parametrize("seen", [SOME, torch.zeros_like(SOME), torch.ones_like(SOME)])
def test_the_last_affine_map_depends_on_the_context_that_the_adjacency_says(seen):
    f = flow(torch.cat((GRAPHS["none"], seen), dim=1), 2)
    x, c = torch.randn(5).double(), torch.randn(20, 2).double()
    assert torch.equal(depends(lambda c: f(c).transform(x), c), seen)
    affine = f.transform.transforms[-1]
    assert torch.equal(depends(lambda c: affine(c)(x), c), seen)


def test_it_agrees_with_zuko_on_the_dependencies():
    adjacency = torch.cat((GRAPHS["tree"], SOME), dim=1)
    theirs = zuko.flows.MAF(5, 2, transforms=2, adjacency=adjacency, hidden_features=(16, 16))
    theirs, ours = perturb(theirs.double(), 0.2), flow(adjacency, 2, 2)
    x, c = torch.randn(20, 5).double(), torch.randn(20, 2).double()
    for on_x, on_c in [
        (depends(t(c[0]).transform, x), depends(lambda c, t=t: t(c).transform(x[0]), c))
        for t in (theirs, ours)
    ]:
        assert torch.equal(on_x, reached(GRAPHS["tree"], 2))
        assert torch.equal(on_c, reached(GRAPHS["tree"], 1).double() @ SOME.double() > 0)


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", GRAPHS)
def test_log_determinants(name, context):
    f = flow(GRAPHS[name], context, 2)
    x, c = torch.randn(4, 5).double(), torch.randn(2).double() if context else None
    t = f(c).transform
    _, ladj = t.call_and_ladj(x)
    assert torch.allclose(ladj, slogdet(t, x, 1))


@pytest.mark.parametrize("substitution", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_the_inverse(name, substitution, monkeypatch):
    monkeypatch.setattr(autoregressive, "_ROWS_PER_STAGE", 0 if substitution else 10**9)
    monkeypatch.setattr(autoregressive, "_ENOUGH_ROWS", 10**9)
    f = flow(torch.cat((GRAPHS[name], SOME), dim=1), 2, 2)
    y, c = torch.randn(50, 5).double(), torch.randn(50, 2).double()
    t = f(c).transform
    with torch.no_grad(), record_inversions() as inversions:
        x = t.inv(y)
    assert residual(t, x, y) <= 1e-13
    passes = [i.iterations for i in inversions if i.problem == "triangular"]
    assert passes == [1 if substitution else min(LONGEST[name], 5)] * 2


@pytest.mark.parametrize("name", GRAPHS)
def test_the_longest_path_bounds_the_passes(name):
    network = MaskedNetwork(5, adjacency=GRAPHS[name])
    t = LazyTriangular(network, 5, zuko.transforms.AdditiveTransform, [()])()
    assert network.passes == t.map.passes == LONGEST[name]
    x = torch.zeros(3, 5)
    for _ in range(network.passes):
        x = t.map(x).inv(torch.ones(3, 5))
    assert torch.allclose(t(x), torch.ones(3, 5), atol=1e-6)


def test_the_fast_inverse_of_zukos_flows_takes_as_many_passes():
    maf = zuko.flows.MAF(5, transforms=1, adjacency=GRAPHS["tree"], hidden_features=(16, 16))
    t = fast_inverse(perturb(maf.double(), 0.2))().transform
    y = torch.randn(4, 5).double()
    with torch.no_grad(), record_inversions() as inversions:
        assert residual(t, t.inv(y), y) <= 1e-13
    assert [i.iterations for i in inversions] == [LONGEST["tree"]]


def test_gradients_of_the_inverse():
    f = flow(GRAPHS["tree"], 0, 2)
    y = torch.randn(3, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(f().transform.inv, y)


def test_a_shape_of_features_is_in_raster_order():
    network = MaskedNetwork((1, 5, 1), outputs=2, adjacency=GRAPHS["tree"])
    flat = MaskedNetwork(5, outputs=2, adjacency=GRAPHS["tree"])
    flat.load_state_dict(network.state_dict())
    x = torch.randn(3, 5)
    assert torch.equal(network(x.view(3, 1, 5, 1)).view(3, 5, 2), flat(x))


def test_independent_features_need_no_network():
    network = MaskedNetwork((1, 5), outputs=2, adjacency=GRAPHS["none"])
    network.set_bias(torch.arange(10.0).view(5, 2))
    assert torch.equal(network(torch.randn(3, 1, 5))[1, 0], torch.arange(10.0).view(5, 2))
    assert network.passes == 1


def test_a_full_matrix_is_the_ascending_order():
    torch.manual_seed(0)
    a = MaskedNetwork(5, outputs=2, adjacency=GRAPHS["full"])
    torch.manual_seed(0)
    b = MaskedNetwork(5, outputs=2)
    x = torch.randn(3, 5)
    assert torch.equal(a(x), b(x))


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32, list])
def test_takes_any_kind_of_zeros_and_ones(kind):
    tree = GRAPHS["tree"]
    given = tree.long().tolist() if kind is list else tree.to(kind)
    assert MaskedNetwork(5, adjacency=given).passes == 4


def test_the_state_holds_it_and_copies_and_the_default_dtype_are_as_ever():
    f = flow(GRAPHS["tree"], 0, 2)
    x = torch.randn(3, 5).double()
    other = flow(GRAPHS["tree"], 0, 2)
    other.load_state_dict(f.state_dict())
    for same in (other, copy.deepcopy(f)):
        assert torch.equal(same().log_prob(x), f().log_prob(x))
    assert flow(GRAPHS["tree"]).float()().log_prob(x.float()).dtype == torch.float32


@pytest.mark.parametrize("rows", [2, 500])  # by passes, and by forward substitution
def test_loading_the_weights_of_another_adjacency(rows):
    """The masks are a part of the state, and the number of passes follows from them."""
    chain = torch.eye(8).long() + torch.diag(torch.ones(7).long(), -1)
    star = torch.eye(8).long()
    star[1:, 0] = 1
    deep, flat = (SinusoidalFlow(8, transforms=1, tails=False, adjacency=a) for a in (chain, star))
    perturb(deep, 0.5)
    flat.load_state_dict(deep.state_dict())
    flat, z = copy.deepcopy(flat), torch.randn(rows, 8)
    assert residual(flat().transform, flat().transform.inv(z), z) <= 1e-4
    assert torch.equal(flat().transform.inv(z), deep().transform.inv(z))


def test_masks_without_values_take_as_many_passes_as_there_are_features():
    network = MaskedNetwork(5, adjacency=GRAPHS["tree"])
    state = network.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it copies nothing
        network.to("meta").load_state_dict(state)
    assert network.passes == 5


@pytest.mark.parametrize(
    ("adjacency", "error", "message"),
    [
        ("abc", TypeError, "'adjacency' should be a matrix, got 'abc'"),
        ([[1, 0], [1]], TypeError, "'adjacency' should be a matrix"),
        ([1, 1], ValueError, r"shape \(2, 2\) or \(2, 5\), got \(2,\)"),
        (torch.ones(3, 3), ValueError, r"shape \(2, 2\) or \(2, 5\), got \(3, 3\)"),
        (torch.ones(2, 4), ValueError, r"shape \(2, 2\) or \(2, 5\), got \(2, 4\)"),
        ([[1, 0], [2, 1]], ValueError, "'adjacency' should hold zeros and ones"),
        ([[1, 0], [float("nan"), 1]], ValueError, "'adjacency' should hold zeros and ones"),
        ([[1, 0], [1j, 1]], ValueError, "'adjacency' should hold zeros and ones"),
        ([[1, 0], [1, 0]], ValueError, r"ones on the diagonal, got zeros for the features \[1\]"),
        ([[1, 1], [1, 1]], ValueError, r"without cycles, but the features \[0, 1\]"),
    ],
)
def test_errors_say_what_is_wrong(adjacency, error, message):
    with pytest.raises(error, match=message):
        MaskedNetwork(2, 3, adjacency=adjacency)
    with pytest.raises(error, match=message):
        SinusoidalFlow(2, 3, adjacency=adjacency)


def test_it_excludes_orders_and_ldu_blocks():
    eye = torch.eye(3)
    with pytest.raises(ValueError, match="'order' should be None where there is an 'adjacency'"):
        MaskedNetwork(3, order=[0, 1, 2], adjacency=eye)
    with pytest.raises(ValueError, match="'randperm' should be False"):
        SinusoidalFlow(3, randperm=True, adjacency=eye)
    with pytest.raises(TypeError, match="'adjacency' is an option of the autoregressive"):
        SinusoidalFlow(3, conditioner="independent", adjacency=eye)
    for make in (LDU, ConditionalLDU):
        with pytest.raises(TypeError, match="adjacency"):
            make(3, adjacency=eye)
        with pytest.raises(ValueError, match="'adjacency'"):
            make(3, network=partial(MaskedNetwork, adjacency=eye))


def test_too_few_hidden_features_are_refused():
    star = torch.eye(6, dtype=torch.bool)
    star[3:, :3] = star[:3, :3]  # each of the last three has a parent of its own
    with pytest.raises(ValueError, match=r"'hidden_features' \(2,\) are too few .* 4 in each"):
        MaskedNetwork(6, hidden_features=(2,), adjacency=star)
    assert MaskedNetwork(6, hidden_features=(3,), adjacency=star).passes == 2
