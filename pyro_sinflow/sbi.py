r"""Flows for `sbi <https://sbi.readthedocs.io>`_, with its z-scoring: for NPE and ``VIPosterior``.

sbi is needed when these functions are called, and not for the rest of the package. It comes with
``pip install '.[inference]'`` in a checkout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Transform
from zuko.lazy import Flow, LazyTransform

from . import _validate as check
from .element_wise import Asinh
from .flows import SinusoidalFlow

_PRIOR_SAMPLES = 1000  # as many as sbi draws for its own flows
_SCORES = (None, "none", "independent", "structured")
_POSTERIOR = partial(SinusoidalFlow, hidden_features=(64, 64, 64, 64))
_VARIATIONAL = partial(SinusoidalFlow, tails=False)


def posterior_nn(
    build: Callable[[int, int], Flow] | None = None,
    *,
    z_score_theta: str | None = "independent",
    z_score_x: str | None = "independent",
    embedding_net: nn.Module | None = None,
    x_dist: Distribution | None = None,
) -> Callable[[Tensor, Tensor], nn.Module]:
    r"""Returns a function that builds a posterior estimator for sbi's ``NPE``.

    It does what sbi's function of the same name does for the flows that sbi knows: parameters are
    z-scored, or transformed to unconstrained space, by the first transformation of the flow, and
    observations before they enter the embedding network. Means and standard deviations are those of
    the simulations that sbi passes.

    Args:
        build: The constructor of the flow, called with the numbers of parameters and of context
            features: ``functools.partial`` of :class:`~pyro_sinflow.SinusoidalFlow` with options,
            or one of zuko's. If :py:`None`, :class:`~pyro_sinflow.SinusoidalFlow` with four hidden
            layers of 64 units, about as many as sbi's own flows have.
        z_score_theta: How parameters are standardized: ``"independent"``, each by itself;
            ``"structured"``, all by one mean and deviation; ``"transform_to_unconstrained"``, by
            the bijection from the support of ``x_dist`` to real numbers, without z-scoring;
            ``"none"`` or :py:`None`, not at all.
        z_score_x: How observations are standardized: ``"independent"``, ``"structured"``,
            ``"none"`` or :py:`None`.
        embedding_net: A network from observations to context features. If :py:`None`, observations
            are the context features.
        x_dist: The prior of the parameters, whose support ``"transform_to_unconstrained"`` takes.
            The name is sbi's.

    Returns:
        A function from a batch of parameters and one of observations to sbi's ``ZukoFlow``, for
        ``NPE(density_estimator=...)``.

    Raises:
        ModuleNotFoundError: If sbi is not installed.
        TypeError: If ``build`` is not callable, or ``embedding_net`` not a module.
        ValueError: If an option of z-scoring is unknown, or ``x_dist`` is missing.

    Example:
        >>> from pyro_sinflow.sbi import posterior_nn
        >>> from sbi.inference import NPE
        >>> trainer = NPE(density_estimator=posterior_nn(), show_progress_bars=False)
        >>> theta = torch.randn(100, 2)
        >>> trainer = trainer.append_simulations(theta, theta + 0.1 * torch.randn(100, 2))
        >>> estimator = trainer.train(max_num_epochs=1)
        >>> trainer.build_posterior().sample((5,), x=torch.zeros(2), show_progress_bars=False).shape
        torch.Size([5, 2])
    """
    _require_sbi()
    make = _POSTERIOR if build is None else check.function("build", build)
    check.choice("z_score_theta", z_score_theta, (*_SCORES, "transform_to_unconstrained"))
    check.choice("z_score_x", z_score_x, _SCORES)
    if embedding_net is not None:
        check.instance("embedding_net", embedding_net, nn.Module)
    if z_score_theta == "transform_to_unconstrained":
        if x_dist is None:
            raise ValueError(
                "'x_dist' should be the prior for z_score_theta='transform_to_unconstrained', got "
                "None."
            )
        check.instance("x_dist", x_dist, Distribution)
    # A function that can be pickled, which sbi needs.
    return partial(_posterior, make, z_score_theta, z_score_x, embedding_net, x_dist)


def variational_family(
    prior: Distribution,
    build: Callable[[int], Flow] | None = None,
    *,
    z_score_theta: str | None = "independent",
) -> Callable[..., nn.Module]:
    r"""Returns a function that builds a variational posterior for sbi's ``VIPosterior``.

    Variational inference scores the flow's own samples. The flow is used in its inverse direction
    for that: sampling takes one pass, and the density of other parameters takes the inverse.
    As for sbi's own flows, samples are transformed to the support of the prior, and standardized by
    1,000 draws from it, in unconstrained space.

    Args:
        prior: The prior of the parameters.
        build: The constructor of the flow, called with the number of parameters:
            ``functools.partial`` of :class:`~pyro_sinflow.SinusoidalFlow` with ``tails=False`` and
            other options, or one of zuko's. If :py:`None`, :class:`~pyro_sinflow.SinusoidalFlow`
            with ``tails=False``. With ``tails``, the tails would be so thin that the density of
            draws from the prior may be zero. The base of the flow should be a standard normal
            distribution.
        z_score_theta: How unconstrained parameters are standardized: ``"independent"``, each by
            itself; ``"structured"``, all by one mean and deviation; ``"none"`` or :py:`None`, not
            at all.

    Returns:
        A function from an event shape, a transform to the support and a device to sbi's
        ``TransformedZukoFlow``, for ``VIPosterior(potential, q=...)`` and
        ``build_posterior(sample_with="vi", vi_parameters={"q": ...})``.

    Raises:
        ModuleNotFoundError: If sbi is not installed.
        TypeError: If ``prior`` is not a distribution, or ``build`` not callable.
        ValueError: If the option of z-scoring is unknown, or when the function is called: if the
            flow has ``tails``.

    Example:
        >>> from pyro_sinflow.sbi import variational_family
        >>> prior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
        >>> q = variational_family(prior)
        >>> q(prior.event_shape, torch.distributions.ComposeTransform([])).sample((5,)).shape
        torch.Size([5, 2])
    """
    _require_sbi()
    check.instance("prior", prior, Distribution)
    make = _VARIATIONAL if build is None else check.function("build", build)
    check.choice("z_score_theta", z_score_theta, _SCORES)
    return partial(_variational, prior, make, z_score_theta)


def _require_sbi() -> None:
    """Requires that sbi is installed."""
    try:
        import_module("sbi")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "This function needs sbi, which comes with the extra 'inference' of pyro-sinflow.",
            name="sbi",
        ) from error


def _posterior(
    build: Callable[[int, int], Flow],
    z_score_theta: str | None,
    z_score_x: str | None,
    embedding_net: nn.Module | None,
    x_dist: Distribution | None,
    theta: Tensor,
    x: Tensor,
) -> nn.Module:
    """Builds a posterior estimator from batches of parameters and observations."""
    from sbi.neural_nets.estimators import ZukoFlow
    from sbi.utils.sbiutils import biject_transform_zuko, mcmc_transform, standardizing_net

    embedding = nn.Identity() if embedding_net is None else embedding_net
    with torch.no_grad():
        context = embedding.to(x.device)(x[:1]).numel()
    flow = build(theta[0].numel(), context)
    if z_score_theta == "transform_to_unconstrained":
        first = [biject_transform_zuko(mcmc_transform(x_dist, device=theta.device))]
    else:
        first = _standardize(theta, z_score_theta)
    if z_score_x in ("independent", "structured"):
        structured = z_score_x == "structured"
        embedding = nn.Sequential(standardizing_net(x, structured), embedding)
    net = Flow([*first, flow.transform], flow.base)
    return ZukoFlow(net, embedding, input_shape=theta[0].shape, condition_shape=x[0].shape)


def _variational(
    prior: Distribution,
    build: Callable[[int], Flow],
    z_score_theta: str | None,
    event_shape: Size,
    link_transform: Transform,
    device: str = "cpu",
) -> nn.Module:
    """Builds a variational posterior, given the transform from unconstrained space."""
    from sbi.neural_nets.estimators.zuko_flow import ZukoUnconditionalFlow
    from sbi.samplers.vi.vi_utils import TransformedZukoFlow

    flow = build(event_shape.numel())
    if any(getattr(lazy, "f", None) is Asinh for lazy in flow.modules()):
        raise ValueError("'build' should make a flow with tails=False, got one with tails=True.")
    with torch.no_grad():
        theta: Any = link_transform.inv(prior.sample(Size([_PRIOR_SAMPLES])))
    first = _standardize(theta, z_score_theta)
    net = Flow([*first, flow.transform.inv], flow.base)
    estimator = ZukoUnconditionalFlow(net.to(device), input_shape=event_shape)
    return TransformedZukoFlow(estimator, link_transform)


def _standardize(theta: Tensor, z_score: str | None) -> list[LazyTransform]:
    """Returns the transformation that standardizes parameters, if there should be one."""
    from sbi.utils.sbiutils import standardizing_transform_zuko

    if z_score not in ("independent", "structured"):
        return []
    return [standardizing_transform_zuko(theta, z_score == "structured")]
