"""Every program of the recipes runs, and does what the text around it says."""

import math
import re
from pathlib import Path

import pytest
import torch

from pyro_sinflow import AutoLDU, record_inversions

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"


def programs():
    """The programs by the heading of their section."""
    found = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        title = section.splitlines()[0]
        found[title] = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return found


PROGRAMS = programs()


def results(title, number=0):
    """Runs a program, in names of its own, and returns them."""
    for package in ("lampe", "sbi"):
        if f"from {package}." in PROGRAMS[title][number]:
            pytest.importorskip(package)
    names = {"__name__": "recipe"}
    exec(compile(PROGRAMS[title][number], f"{PAGE.name}: {title}", "exec"), names)
    return names


def test_every_section_has_a_program_and_a_test():
    assert all(PROGRAMS.values())
    assert "```python" not in PAGE.read_text().split("\n## ")[0]
    source = Path(__file__).read_text()
    tested = re.findall(r"results\(\"(.+?)\"(?:, (\d))?\)", source)
    expected = {(title, str(i)) for title, p in PROGRAMS.items() for i in range(len(p))}
    assert {(title, number or "0") for title, number in tested} == expected


def integral(log_prob, low, high, points=150):
    """The integral over a rectangle, by the midpoint rule."""
    sides = [(b - a) / points for a, b in zip(low, high, strict=True)]
    axes = [a + side * (torch.arange(points) + 0.5) for a, side in zip(low, sides, strict=True)]
    with torch.no_grad():
        return float(log_prob(torch.cartesian_prod(*axes)).exp().sum()) * sides[0] * sides[1]


def test_densities_with_bounds():
    names = results("Densities of bounded and positive values")
    samples, flow = names["samples"], names["flow"]
    assert (samples > 0).all()
    assert (samples[:, 0] < 1).all()
    assert integral(flow().log_prob, (0.0, 0.0), (1.0, 8.0)) == pytest.approx(1.0, abs=1e-2)


def test_priors_with_bounds():
    names = results("Priors with bounds in Pyro")
    assert (names["rates"] > 0).all()
    assert (names["rates"] < 10).all()
    noise = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    prior = torch.distributions.TransformedDistribution(
        noise, [names["block"].inv, names["to_support"]]
    )
    assert integral(prior.log_prob, (0.0, 0.0), (10.0, 10.0)) == pytest.approx(1.0, abs=1e-2)


def test_guides_with_bounds():
    sample = results("Guides with bounds in Pyro")["sample"]
    assert 0 < sample["p"] < 1
    assert sample["spread"] > 0


def test_heavy_tails():
    names = results("Heavy tails")
    df = names["degrees_of_freedom"]
    assert (df < 4.9).all()  # from 5, towards the 2 of the data
    far = torch.tensor([[1e3, 0.0], [1e4, 0.0]])
    with torch.no_grad():
        near, farther = names["flow"]().log_prob(far)
    assert float(near - farther) < 15 * torch.tensor(10.0).log()  # a power of the distance


def test_an_unnormalized_density():
    with record_inversions() as inversions:
        names = results("Fitting a flow to an unnormalized density")
    assert inversions == []  # samples and densities take one pass
    with torch.no_grad():
        x, log_prob = names["flow"]().rsample_and_log_prob((2000,))
    evidence = math.log(4 * math.pi * math.sqrt(math.pi / 8))  # of a narrow ring of radius 2
    elbo = float((names["log_density"](x) - log_prob).mean())
    assert evidence - 1.0 < elbo < evidence + 0.1


def test_a_guide_of_heavy_tails():
    names = results("Guides with bounds in Pyro")

    class Heavy(AutoLDU):
        def get_base_dist(self):
            zeros = super().get_base_dist().mean
            return names["dist"].StudentT(5.0, zeros, 1.0).to_event(1)

    assert set(Heavy(names["model"])(torch.tensor(15.0))) == {"p", "spread", "logit"}


def test_discrete_latents_that_are_summed_out():
    means = results("Discrete latent variables, summed out")["means"]
    assert (means.sort().values - torch.tensor([-3.0, 3.0])).abs().max() < 1.5


def test_discrete_latents_in_the_guide():
    losses = results("Discrete latent variables in the guide")["losses"]
    assert sum(losses[-20:]) < sum(losses[:20])


def test_amortized_guides():
    losses = results("Amortized guides")["losses"]
    assert sum(losses[-20:]) < sum(losses[:20])


def test_a_dependency_structure():
    names = results("Your own dependency structure")
    jacobian = torch.autograd.functional.jacobian(names["flow"]().transform, names["x"][0])
    assert torch.equal((jacobian != 0).long(), names["chain"])
    assert names["log_prob"].shape == (10,)


def test_npe_of_sbi():
    names = results("sbi, with its z-scoring")
    assert names["prior"].support.check(names["samples"]).all()


def test_vi_of_sbi():
    names = results("sbi, variational posterior")
    assert names["prior"].support.check(names["samples"]).all()


def test_lampe():
    assert results("lampe")["samples"].shape == (100, 2)


def test_a_mixture_as_base():
    names = results("Mixtures", 0)
    assert names["samples"].shape == (100, 2)
    with torch.no_grad():
        total = integral(names["flow"]().log_prob, (-12.0, -12.0), (12.0, 12.0))
    assert total == pytest.approx(1.0, abs=5e-3)


def test_a_mixture_of_flows():
    names = results("Mixtures", 1)
    assert names["samples"].shape == (100, 2)
    mixture = names["Mixture"](names["flow"](names["components"]), names["logits"])
    assert integral(mixture.log_prob, (-9.0, -9.0), (9.0, 9.0)) == pytest.approx(1.0, abs=5e-3)


def test_averaged_weights():
    names = results("Averaged weights")
    assert names["log_prob"].isfinite().all()
    pairs = zip(names["flow"].parameters(), names["averaged"].module.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_early_stopping():
    names = results("Early stopping")
    assert names["step"] < 999
    with torch.no_grad():
        score = -names["flow"]().log_prob(names["validation"]).mean()
    assert float(score) == pytest.approx(names["best"], rel=1e-5)


def test_tuning():
    names = results("Choosing options on validation data")
    assert names["scores"][names["best"]] == min(names["scores"].values())


def jacobian_is_triangular(t, x):
    jacobian = torch.stack([torch.autograd.functional.jacobian(t, row) for row in x])
    return not jacobian.triu(1).any() and bool((jacobian.diagonal(dim1=1, dim2=2) != 0).all())


def test_networks_of_your_own():
    names = results("Networks of your own")
    flow, c, x = names["flow"], names["c"][0], names["x"][:10]
    t = flow(c).transform
    assert jacobian_is_triangular(t, x)
    assert names["samples"].shape == (100, 4)
    assert torch.allclose(t(t.inv(x)), x, atol=1e-5)
    names["network"].gru.weight_ih_l0.data.mul_(0.0)  # features and context no longer count
    assert torch.allclose(flow(c).log_prob(x), flow(c + 1).log_prob(x))


def test_transforms_by_hand():
    names = results("Transforms by hand")
    t, x = names["t"], names["x"].detach()
    assert jacobian_is_triangular(t, x)
    guide, prior = names["log_probs"]
    normal = names["noise"].log_prob
    assert torch.allclose(prior, normal(t(x)) + t.log_abs_det_jacobian(x, t(x)), atol=1e-5)
    z = t.inv(x)
    assert torch.allclose(guide, normal(z) - t.log_abs_det_jacobian(z, x), atol=1e-4)


def test_an_element_wise_transform_of_your_own():
    names = results("An element-wise transform of your own")
    assert float(names["error"].detach()) < 1e-5
    t, x = names["t"], names["x"]
    jacobian = torch.func.vmap(torch.func.jacrev(t))(x)
    _, ladj = t.call_and_ladj(x)
    assert torch.allclose(ladj, jacobian.det().abs().log(), atol=1e-4)
