"""Autoguides for Pyro: flows as variational posteriors."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from pyro.params import param_with_module_name
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import Transform, biject_to, constraints
from zuko.nn import MaskedMLP

from . import _validate as check
from ._torch import can_branch_on, modes, replace_parameter, versions, without_autocast
from .bijection import at_least_float32
from .block import ConditionalLDU
from .element_wise import FASTER
from .laplace import best_laplace
from .transforms import Composition

_RATE_OF_A = 2  # the factor of the entries of A
_LARGEST = 100  # variables, up to which there is a Laplace approximation
_DRAWS = 10_000  # for medians and quantiles

# Pyro's default takes the median of 15 samples, which is inaccurate for wide priors.
_init_to_median = init_to_median(num_samples=1000)


class AutoLDU(AutoContinuous):
    r"""Creates a guide of LDU blocks over all continuous latent variables.

    .. math:: z = m + C (\mu + A (f_n \circ \dots \circ f_1)(B x)) \quad x \sim \mathcal{N}(0, I)

    z is the vector of all latent variables in unconstrained space, A is a lower and B an upper
    triangular matrix, and :math:`f_i` are LDU blocks. It can fit skewed, curved and funnel-shaped
    posteriors, and scores its own samples in one pass, like
    :class:`~pyro.infer.autoguide.AutoIAFNormal`.

    The first call searches modes of the posterior by Newton's method. m and the lower triangular C
    are location and scale of the Laplace approximation with the highest ELBO. They stay constant
    (their gradients are zero), and all else starts as the identity, so that optimizers work in
    units in which the posterior is nearly standard normal. The guide starts at ``init_loc_fn`` with
    ``init_scale`` instead (:math:`m = 0`, :math:`C = I`) if no mode is found, if this start has the
    higher ELBO, if there are more than 100 variables, if the log-density is random (subsampled
    plates), or if it cannot be differentiated twice. The search takes as long as about 100 training
    steps for 10 variables, and up to 2,000 for 100.

    Optimizers such as Adam move each parameter by about the learning rate. Location and log-scales
    are parametrized so that they move by ten times as much. A learning rate that decays from 0.01
    works for most models; 0.1 is too large.

    Medians and quantiles are estimated from samples in unconstrained space and then transformed to
    the support. They vary between calls.

    See Also:
        :class:`pyro_sinflow.LDU`

    Args:
        model: A model whose latent variables are continuous.
        init_loc_fn: One of Pyro's initialization functions, for the first point of the search, and
            for the initial location if the guide does not start at a mode. The default is
            ``init_to_median(num_samples=1000)``, the median of samples from the prior.
        init_scale: The initial scale of each unconstrained latent variable, if the guide does not
            start at a mode.
        starts: The number of points from which a mode is searched: the initial location, and
            the best of 32 points that are uniform between -2 and 2 in unconstrained space. With 0,
            the guide starts at the initial location with the initial scale.
        blocks: The number of LDU blocks.
        sinusoids: The number of sinusoids in D.
        components: The number of components K of each sinusoid.
        max_scale: The largest factor by which L and U scale a variable. The smallest is its
            reciprocal.
        min_slope: The smallest slope of a sinusoid, in :math:`(0, 1)`.
        hidden_features: The numbers of hidden features of each network.
        activation: The activation function constructor. If :py:`None`, :class:`torch.nn.ReLU`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Warns:
        UserWarning: In the first call, if a latent variable is in a plate that is subsampled.

    Example:
        >>> def model():
        ...     scale = pyro.sample("scale", pyro.distributions.LogNormal(0.0, 1.0))
        ...     pyro.sample("x", pyro.distributions.Normal(0.0, scale))
        >>> guide = AutoLDU(model)
        >>> loss = pyro.infer.Trace_ELBO(num_particles=8, vectorize_particles=True)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.ClippedAdam({"lr": 1e-2}), loss)
        >>> losses = [svi.step() for _ in range(3)]
        >>> sorted(guide())
        ['scale', 'x']
    """

    def __init__(
        self,
        model: Callable[..., Any],
        init_loc_fn: Callable[..., Any] = _init_to_median,
        init_scale: float = 0.1,
        *,
        starts: int = 8,
        blocks: int = 1,
        sinusoids: int = 4,
        components: int = 4,
        max_scale: float = 100.0,
        min_slope: float = 1e-3,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] | None = None,
    ) -> None:
        check.function("model", model)
        check.function("init_loc_fn", init_loc_fn)
        self._init_scale = check.real("init_scale", init_scale, 0.0, math.inf)
        self._starts = check.size("starts", starts, minimum=0)
        self._blocks = check.size("blocks", blocks)
        self._options: dict[str, Any] = {
            "sinusoids": sinusoids,
            "components": components,
            "max_scale": max_scale,
            "min_slope": min_slope,
            "hidden_features": hidden_features,
            "activation": activation,
        }
        ConditionalLDU(2, **self._options)  # checks the options before the model is run
        super().__init__(model, init_loc_fn=init_loc_fn)
        # Until the first call, the model without init_loc_fn. In a tuple, it is not a submodule.
        self._plain_model: Any = (model,)
        self._replaced: dict[str, nn.Parameter] = {}  # by handlers in the latest call

    def __getstate__(self) -> dict[str, Any]:
        self._plain_model = None  # as Pyro leaves out the model
        return super().__getstate__()

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        self._check_plates()
        loc = at_least_float32(self._init_loc())
        blocks = [ConditionalLDU(len(loc), **self._options) for _ in range(self._blocks)]
        for part in nn.ModuleList(blocks).modules():
            if isinstance(part, MaskedMLP):  # zeros in its last layer: blocks start as the identity
                nn.init.zeros_(part[-1].weight)
                nn.init.zeros_(part[-1].bias)
        n = len(loc)
        affine = loc.new_zeros(2 * n + 3 if n <= _LARGEST else n + 2, n)  # m = 0, C = I
        whitening = self._find_whitening(loc, *args, **kwargs)
        if whitening is None:
            affine[0] = loc / FASTER
            affine[1] = math.log(self._init_scale) / FASTER
        else:
            affine[n + 2 :] = whitening
        self._plain_model = None
        self.flow = _Flow(blocks, affine).to(loc)
        self._check_store()
        self._take_stored()

    def _find_whitening(self, loc: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """Returns the rows of m and C, or None if the guide does not start at a mode."""
        name = param_with_module_name(self._pyro_get_fullname("flow"), "affine")
        if not self._starts or len(loc) > _LARGEST or name in pyro.get_param_store():
            return None
        if not can_branch_on(loc):
            return None

        def log_density(latent: Tensor) -> Tensor:
            total, values = latent.new_zeros(()), {}
            for site, free in self._unpack_latent(latent):
                transform = biject_to(site["fn"].support)
                values[site["name"]] = value = transform(free)
                total = total + transform.log_abs_det_jacobian(free, value).sum()
            conditioned = poutine.condition(model, data=values)
            with poutine.block():  # nobody else sees this run of the model
                return total + poutine.trace(conditioned).get_trace(*args, **kwargs).log_prob_sum()

        (model,) = self._plain_model
        default = loc, self._init_scale * torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
        best = best_laplace(log_density, default, self._starts)
        if best is None:
            return None
        m, c = best
        return torch.cat((m[None], c.tril(-1) + c.diagonal().log().diag()))

    def _check_plates(self) -> None:
        """Warns of latent variables in a plate that is subsampled."""
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            for frame in site["cond_indep_stack"]:
                if frame.full_size not in (None, frame.size):
                    warnings.warn(
                        f"Latent variable '{name}' is in plate '{frame.name}', which subsamples "
                        f"{frame.size} of {frame.full_size} elements. AutoLDU has {frame.size} "
                        "variables for it, whichever elements are drawn. Use the whole plate, or "
                        "Pyro's 'AutoNormal' for this variable, in an 'AutoGuideList'.",
                        stacklevel=2,
                    )

    def _check_store(self) -> None:
        """Requires that the parameters in Pyro's store have the shapes of this guide."""
        store, prefix = pyro.get_param_store(), self._pyro_get_fullname("flow")
        for key, parameter in self._flow().named_parameters():
            name = param_with_module_name(prefix, key)
            if name in store and store[name].shape != parameter.shape:
                raise ValueError(
                    f"Pyro's parameter store has '{name}' of shape {tuple(store[name].shape)}, "
                    f"this guide has {tuple(parameter.shape)}. If it belongs to another guide, "
                    "call 'pyro.clear_param_store()' first."
                )

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples all latent variables, with the arguments of the model."""
        if self.prototype_trace is not None:
            self._take_stored()
        return super().forward(*args, **kwargs)

    def _take_stored(self) -> None:
        """Registers the parameters in Pyro's store, or takes those that are already there.

        The store may hold other tensors than this guide, for example after it was loaded from a
        file, or if the guide is a copy. Frozen parameters stay as they are. Handlers may replace
        parameters, for this call only.
        """
        flow, prefix = self._flow(), self._pyro_get_fullname("flow")
        for key, parameter in self._replaced.items():
            replace_parameter(flow, key, parameter)
        self._replaced = {}
        named = [(k, p) for k, p in flow.named_parameters() if p.requires_grad]
        if not named:
            return
        if pyro.settings.get("module_local_params"):
            for key, parameter in named:
                _announce(param_with_module_name(prefix, key), parameter)
            return
        store = pyro.get_param_store()
        name = param_with_module_name(prefix, "affine")
        if name in store and store[name] is not flow.affine:
            self._check_store()
        for key, parameter in named:
            name = param_with_module_name(prefix, key)
            value = pyro.param(name, parameter)
            if value is not parameter:
                replace_parameter(flow, key, value)
                if name not in store or store[name] is not value:
                    self._replaced[key] = parameter

    def _flow(self) -> _Flow:
        """Returns the module that owns the parameters.

        Raises:
            RuntimeError: If the guide has not been called yet.
        """
        if self.prototype_trace is None:
            raise RuntimeError(
                "AutoLDU finds its latent variables in the first call: call the guide first."
            )
        # As an attribute, PyroModule would register it in the store.
        return nn.Module.__getattr__(self, "flow")  # type: ignore[return-value]

    def get_base_dist(self) -> dist.TorchDistribution:
        """Returns the standard normal distribution."""
        zeros = self._flow().affine.new_zeros(self.latent_dim)
        return dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """Returns the transformation from noise to latent variables, with a cache.

        It belongs to the current parameters: call it again after a step of the optimizer.
        """
        flow, n = self._flow(), self.latent_dim
        fast, matrix, whitening = at_least_float32(flow.affine).tensor_split((2, n + 2))
        loc, log_scale = (FASTER * fast).unbind()
        scale = log_scale.exp()
        matrix_b = matrix.triu(1) + torch.eye(n, dtype=loc.dtype, device=loc.device)
        matrix_a = scale.diag() + _RATE_OF_A * scale * matrix.tril(-1)
        if len(whitening):
            m, c = whitening.detach().tensor_split((1,))
            c = c.tril(-1) + c.diagonal().exp().diag()
            with without_autocast(loc):
                loc = torch.addmv(m[0], c, loc)
                matrix_a = c @ matrix_a
        affine = _Triangular(matrix_a, loc, upper=False)
        parts = [part for block in flow.blocks for part in block.parts()]  # type: ignore[operator]
        return _Composition(_Triangular(matrix_b, upper=True), *parts, affine, cache_size=1)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Returns the median of each latent variable, estimated as in :meth:`quantiles`."""
        quantiles = self.quantiles([0.5], *args, **kwargs)
        return {name: value[0] for name, value in quantiles.items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Returns quantiles of each latent variable, estimated from 10,000 samples.

        Args:
            quantiles: The quantiles, between 0 and 1.
            args: The arguments of the model.
            kwargs: The keyword arguments of the model.

        Raises:
            TypeError: If ``quantiles`` holds anything other than numbers.
            ValueError: If ``quantiles`` is not a sequence, or a quantile is not between 0 and 1.
            RuntimeError: If the guide has not been called yet.
        """
        affine = at_least_float32(self._flow().affine)
        try:
            levels = torch.as_tensor(quantiles, dtype=affine.dtype, device=affine.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"'quantiles' should hold numbers, got {quantiles!r}.") from error
        if levels.ndim != 1:
            raise ValueError(f"'quantiles' should be a sequence of numbers, got {quantiles}.")
        for level in levels.tolist():
            if not 0 <= level <= 1:
                raise ValueError(f"'quantiles' should be between 0 and 1, got {level:g}.")
        self._take_stored()
        latents = self.get_posterior(*args, **kwargs).sample((_DRAWS,))
        # In parts, because torch's quantile has a largest size.
        chosen = [part.quantile(levels, dim=0) for part in latents.split(1000, dim=1)]
        parts: dict[str, list[Tensor]] = {}
        for latent in torch.cat(chosen, dim=1):
            for site, value in self._unpack_latent(latent):
                parts.setdefault(site["name"], []).append(biject_to(site["fn"].support)(value))
        return {name: torch.stack(values) for name, values in parts.items()}


class _Flow(nn.Module):
    """The parameters of a guide.

    Args:
        blocks: The LDU blocks.
        affine: The parameters of the affine maps around them. Its rows are the location, the
            log-scales, and the entries of A below and of B above the diagonal; then, with up to
            100 variables, m, and C with the logarithms of its diagonal. Gradients of the latter are
            zero.
    """

    def __init__(self, blocks: Sequence[ConditionalLDU], affine: Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.affine = nn.Parameter(affine)


def _announce(name: str, parameter: Tensor) -> None:
    """Makes a parameter a site of Pyro's traces, without its store."""
    value = parameter.view_as(parameter)
    value.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
    site = effectful(lambda *_, **__: value, type="param")
    site(name, value, constraint=constraints.real, name=name)


class _Composition(Composition):
    """The map of a guide.

    Each sample makes a new one, whose matrices have the parameters of that time. So its cached pair
    is used without a search for changes of the parameters.
    """

    def _state_with(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        return *modes(x), *versions(x, y)


class _Triangular(Transform):
    """Multiplies by a triangular matrix with a positive diagonal, and adds a vector."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, matrix: Tensor, loc: Tensor | float = 0.0, *, upper: bool) -> None:
        super().__init__()
        self.matrix, self.loc, self.upper = matrix, loc, upper

    def _call(self, x: Tensor) -> Tensor:
        with without_autocast(x):  # the cached density is that of the exact sample
            return x @ self.matrix.mT + self.loc

    def _inverse(self, y: Tensor) -> Tensor:
        rows = (y - self.loc).reshape(-1, y.shape[-1])
        return torch.linalg.solve_triangular(
            self.matrix.mT, rows, upper=not self.upper, left=False
        ).reshape(y.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.matrix.diagonal().log().sum().expand(x.shape[:-1])
