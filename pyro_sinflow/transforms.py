r"""The transforms: sinusoids, triangular maps, and the LDU blocks made of them.

They hold tensors and callables only; :mod:`pyro_sinflow.modules` and :mod:`pyro_sinflow.flows` own
the parameters. The explicit direction is ``t(x)``, the iterative one is ``t.inv(y)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from textwrap import indent
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Transform, constraints

from ._bijection import Bijection, at_least_float32, dependencies_of, sum_last
from ._checks import (
    broadcast,
    check_broadcast,
    check_callable,
    check_dtype,
    check_instance,
    check_real,
    check_shape,
    check_size,
    check_tensor,
    readable,
)
from .chain import evaluate, invert
from .implicit import invert_triangular
from .inversion import Solver
from .sinusoid import Chain, constrain
from .triangular import TriangularMap


class SinusoidalTransform(Bijection):
    r"""Creates an element-wise monotone sinusoidal transformation.

    .. math:: f(x) = x + d - \alpha \sum_{k=1}^K w_k \frac{\cos(a_k x + 2 b_k) \sin(a_k x)}{a_k}

    with :math:`a = \text{softplus}(\text{frequency})`,
    :math:`w = \text{softmax}(\text{weight})` and
    :math:`\alpha = (1 - \epsilon) \tanh(\text{residual})`. Its slope lies in
    :math:`[1 - |\alpha|, 1 + |\alpha|]` and :math:`f(0) = d`. At ``residual = 0`` it is a shift.
    The tails keep their scale: :math:`|f(x) - x - d| \leq |\alpha| \sum_k w_k / a_k`.

    References:
        | Sinusoidal Flow: A Fast Invertible Autoregressive Flow (Wei, 2021), Eq. 12, 13 and 15
        | https://arxiv.org/abs/2110.13344

    Args:
        frequency: The unconstrained frequencies, with shape :math:`(*, K)`.
        phase: The phases :math:`b`, with shape :math:`(*, K)`.
        weight: The unconstrained weights, with shape :math:`(*, K)`.
        residual: The unconstrained residual weight, with shape :math:`(*)`.
        shift: The shift :math:`d`, with shape :math:`(*)`.
        slope: The smallest slope :math:`\epsilon`, in :math:`(0, 1)`. If it is less than 16 times
            the machine epsilon, it is raised to that.
        solver: How the inverse is computed.
        cache_size: Whether the latest pair (x, y) is kept (1) or not (0).

    Raises:
        TypeError: If an argument is not a floating-point tensor, or dtypes differ.
        ValueError: If shapes do not broadcast, or a tensor has NaN or infinite values.

    Example:
        >>> t = SinusoidalTransform(*torch.randn(3, 2, 4), torch.randn(2), torch.randn(2))
        >>> t
        SinusoidalTransform(components: 4, batch_shape: (2,))
        >>> x = torch.randn(5, 2)
        >>> bool(torch.allclose(t.inv(t(x)), x, atol=1e-4))
        True
    """

    domain = constraints.real
    codomain = constraints.real

    def __init__(
        self,
        frequency: Tensor,
        phase: Tensor,
        weight: Tensor,
        residual: Tensor,
        shift: Tensor,
        *,
        slope: float = 1e-3,
        solver: Solver = Solver(),
        cache_size: int = 0,
    ) -> None:
        tensors = {
            "frequency": frequency,
            "phase": phase,
            "weight": weight,
            "residual": residual,
            "shift": shift,
        }
        for name, tensor in tensors.items():
            check_tensor(name, tensor)
            check_dtype(name, tensor, frequency.dtype)
        for name in ("frequency", "phase", "weight"):
            shape = tensors[name].shape
            if not shape or shape[-1] == 0 or shape[-1] != frequency.shape[-1]:
                raise ValueError(
                    f"'{name}' should have shape (*, K), with the same K > 0 for 'frequency', "
                    f"'phase' and 'weight', got {tuple(shape)}."
                )
        check_broadcast(
            **{
                n: t.shape[:-1] for n, t in tensors.items() if n in ("frequency", "phase", "weight")
            },
            residual=residual.shape,
            shift=shift.shape,
        )
        super().__init__(cache_size=cache_size)

        self.frequency = frequency
        self.phase = phase
        self.weight = weight
        self.residual = residual
        self.shift = shift
        self.slope = check_real("slope", slope, 0.0, 1.0)
        self.solver = check_instance("solver", solver, Solver)

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.frequency, self.phase, self.weight, self.residual, self.shift

    def _chain(self) -> Chain:
        """The sinusoids as a chain, here of one."""
        frequency, phase, weight, residual, shift = self._tensors()
        vectors = (t.unsqueeze(-2) for t in (frequency, phase, weight))
        scalars = (t.unsqueeze(-1) for t in (residual, shift))
        return constrain(*vectors, *scalars, slope=self.slope)

    @property
    def batch_shape(self) -> Size:  # type: ignore[override]
        """The shape that the parameters broadcast to, without the components."""
        return self._common_shape()

    def _common_shape(self) -> Size:
        *vectors, residual, shift = self._tensors()
        return broadcast(*(t.shape[:-1] for t in vectors), residual.shape, shift.shape)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(components: {self.frequency.shape[-1]}, "
            f"batch_shape: {tuple(self.batch_shape)})"
        )

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other) or not isinstance(other, SinusoidalTransform):
            return False
        pairs = zip(self._tensors(), other._tensors(), strict=True)
        return self.slope == other.slope and all(torch.equal(a, b) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]

    def _check(self, name: str, x: Any) -> None:
        super()._check(name, x)
        check_dtype(name, x, self.frequency.dtype)
        check_broadcast(**{name: x.shape, "parameters": self.batch_shape})

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return evaluate(at_least_float32(x), self._chain())

    def _inverse(self, y: Tensor) -> Tensor:
        return invert(at_least_float32(y), self._chain(), self.solver)


class SinusoidalChain(SinusoidalTransform):
    """Composes M sinusoids, and evaluates them together.

    The tensors have shape :math:`(*, M, K)`, or :math:`(*, M)` for ``residual`` and ``shift``. They
    come from modules, and are not checked.

    Args:
        frequency: The unconstrained frequencies.
        phase: The phases.
        weight: The unconstrained weights.
        residual: The unconstrained residual weights.
        shift: The shifts.
        slope: The smallest slope of each sinusoid.
        solver: How the inverse is computed.
    """

    def __init__(
        self,
        frequency: Tensor,
        phase: Tensor,
        weight: Tensor,
        residual: Tensor,
        shift: Tensor,
        *,
        slope: float = 1e-3,
        solver: Solver = Solver(),
    ) -> None:
        Bijection.__init__(self)

        self.frequency = frequency
        self.phase = phase
        self.weight = weight
        self.residual = residual
        self.shift = shift
        self.slope = slope
        self.solver = solver

    def _chain(self) -> Chain:
        return constrain(*self._tensors(), slope=self.slope)

    @property
    def batch_shape(self) -> Size:  # type: ignore[override]
        """The shape that the parameters broadcast to, without sinusoids and components."""
        return self._common_shape()[:-1]

    def __repr__(self) -> str:
        *_, m, k = self.frequency.shape
        shape = tuple(self.batch_shape)
        return f"SinusoidalChain(sinusoids: {m}, components: {k}, batch_shape: {shape})"


class TriangularTransform(Bijection):
    r"""Creates a transformation whose Jacobian is triangular.

    .. math:: y_i = \tau(x_i; h_i(x_{<i}))

    It is :class:`zuko.transforms.AutoregressiveTransform`, for any order of the features, with the
    number of passes of the inverse turned from a count into a bound: :math:`x \leftarrow
    \tau^{-1}(y; h(x))` is repeated until nothing changes any more. Each pass settles at least one
    more feature, so that as many passes as features always suffice; usually a handful does.

    References:
        | Sinusoidal Flow: A Fast Invertible Autoregressive Flow (Wei, 2021), Eq. 5 and Table 2
        | https://arxiv.org/abs/2110.13344

    Args:
        conditioner: Returns, given x, the element-wise increasing transformation :math:`\tau`: one
            of :mod:`zuko.transforms`, a :class:`SinusoidalTransform`, or a composition. Its
            parameters for a feature must depend on the features before it alone. It must be
            deterministic.
        phi: The tensors that the conditioner depends on, apart from x, or a function that returns
            them. Gradients of the inverse reach these, and no others. If :py:`None`, the parameters
            of the conditioner, should it be a module.
        passes: A bound of the number of passes, where one lower than the number of features is
            known (2 for a coupling). If :py:`None`, the number of features.
        event_dim: The number of dimensions of x that make up an event: 1 for vectors, 3 for
            images :math:`(C, H, W)`.
        batch_shape: The batch shape of what the conditioner depends on, with which inputs
            broadcast in ``forward_shape``.
        substitute: A faster way to the same inverse, for conditioners that can be evaluated
            feature by feature. Returns x given y, or :py:`None` where the iteration is the better
            way.
        preconditioner: Returns a matrix Q, with shape :math:`(D, D)`, strictly triangular in the
            order of the features. Passes are fewer, the nearer :math:`I + Q` is to the inverse of
            the Jacobian; where it is of no use, it is dropped.
        solver: How the inverse is computed.
        cache_size: Whether the latest pair (x, y) is kept (1) or not (0).

    Raises:
        TypeError: If the conditioner is not callable, or returns something else.
        ValueError: If a size is not positive; in the inverse, if ``phi`` is empty while the
            conditioner depends on tensors that require gradients.

    Example:
        >>> weight = torch.randn(3, 3).tril(-1)
        >>> shift = lambda x: zuko.transforms.AdditiveTransform(x @ weight.T)
        >>> t = TriangularTransform(shift)
        >>> x = torch.randn(3)
        >>> bool(torch.allclose(t.inv(t(x)), x, atol=1e-5))
        True
    """

    def __init__(
        self,
        conditioner: Callable[[Tensor], Transform],
        phi: Iterable[Tensor] | Callable[[], Iterable[Tensor]] | None = None,
        *,
        passes: int | None = None,
        event_dim: int = 1,
        batch_shape: Size = Size(),
        substitute: Callable[[Tensor], Tensor | None] | None = None,
        preconditioner: Callable[[], Tensor] | None = None,
        solver: Solver = Solver(),
        cache_size: int = 0,
    ) -> None:
        check_callable("conditioner", conditioner)
        if phi is None:
            phi = conditioner.parameters if isinstance(conditioner, nn.Module) else ()
        if not callable(phi):
            phi = partial(tuple, [check_instance("phi", tensor, Tensor) for tensor in phi])
        super().__init__(cache_size=cache_size)

        for name, value in (("substitute", substitute), ("preconditioner", preconditioner)):
            if value is not None:
                check_callable(name, value)

        self.conditioner = conditioner
        self._phi = phi
        self.passes = None if passes is None else check_size("passes", passes)
        self._event_dim = check_size("event_dim", event_dim)
        self.batch_shape = check_shape("batch_shape", batch_shape)
        self.substitute = substitute
        self.preconditioner = preconditioner
        self.solver = check_instance("solver", solver, Solver)

    def __repr__(self) -> str:
        function = getattr(self.conditioner, "func", self.conditioner)  # inside a partial
        name = getattr(function, "__qualname__", type(function).__name__)
        return f"{type(self).__name__}(conditioner: {name}, event_dim: {self._event_dim})"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, TriangularTransform)
            and self.conditioner == other.conditioner
            and len(self.phi) == len(other.phi)
            and all(a is b for a, b in zip(self.phi, other.phi, strict=True))
            and (self.passes, self._event_dim) == (other.passes, other._event_dim)
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def phi(self) -> tuple[Tensor, ...]:
        """The tensors that gradients of the inverse reach."""
        return tuple(self._phi())

    def _dependencies(self) -> Iterable[Tensor | bool]:
        return *self.phi, *dependencies_of(self.conditioner)  # a module's buffers among them

    def _map(self) -> TriangularMap:
        # Apart from self: the graph of an inverse keeps it, and must not keep a cached pair.
        return TriangularMap(
            self.conditioner, self._event_dim, self.substitute, self.preconditioner, self._phi
        )

    def _call(self, x: Tensor) -> Tensor:
        return self._map().value(at_least_float32(x))

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = at_least_float32(x)
        tau = self._map().at(x)
        y, ladj = tau.call_and_ladj(x)  # type: ignore[attr-defined]
        return y, sum_last(ladj, self._event_dim - tau.domain.event_dim)

    def _inverse(self, y: Tensor) -> Tensor:
        y = at_least_float32(y).expand(self.forward_shape(y.shape))
        if torch.is_grad_enabled() and readable(y) and not self.phi:
            value = self._map().value(y.detach())
            if value.requires_grad:
                raise ValueError(
                    "'phi' is empty, but 'conditioner' depends on tensors that require gradients, "
                    "which the gradient of the inverse would miss: list them in 'phi'."
                )
        return invert_triangular(self._map(), y, self.solver, self.passes)


class LDUTransform(Bijection):
    r"""Creates an LDU block: an upper triangular, a diagonal and a lower triangular map in a row.

    .. math:: f(x) = (L \circ D \circ U)(x)

    Its Jacobian is dense, and the determinant is the product of the three diagonals. With shifts
    for U and L, which have ones on the diagonal, it is the product of the slopes of D.

    References:
        | Sinusoidal Flow: A Fast Invertible Autoregressive Flow (Wei, 2021), Eq. 17 and Table 2
        | https://arxiv.org/abs/2110.13344

    Args:
        upper: The map U, in which features depend on those after them.
        diagonal: The element-wise map D: a :class:`SinusoidalTransform`, or several composed.
        lower: The map L, in which features depend on those before them.
        batch_shape: The batch shape with which inputs broadcast in ``forward_shape``. If
            :py:`None`, that of the three maps.
        cache_size: Whether the latest pair (x, y) is kept (1) or not (0).

    Raises:
        TypeError: If an argument is not a transform.
        ValueError: If a transform is not bijective.

    Example:
        >>> block = LDU(3)
        >>> t = LDUTransform(block.upper, block.diagonal, block.lower)
        >>> t.event_dim
        1
        >>> x = torch.randn(5, 3)
        >>> y, ladj = t.call_and_ladj(x)
        >>> ladj.shape
        torch.Size([5])
    """

    upper: Transform
    diagonal: Transform
    lower: Transform

    def __init__(
        self,
        upper: Transform,
        diagonal: Transform,
        lower: Transform,
        *,
        batch_shape: Size | None = None,
        cache_size: int = 0,
    ) -> None:
        for name, part in (("upper", upper), ("diagonal", diagonal), ("lower", lower)):
            check_instance(name, part, Transform)
            if not part.bijective:
                raise ValueError(f"'{name}' should be bijective, got {part}.")
        super().__init__(cache_size=cache_size)

        self.upper = upper
        self.diagonal = diagonal
        self.lower = lower
        self._event_dim = max(part.domain.event_dim for part in self.parts)
        if batch_shape is None:
            shape = Size([1] * self._event_dim)
            for part in self.parts:
                shape = part.forward_shape(shape)
            batch_shape = shape[: len(shape) - self._event_dim]
        self.batch_shape = check_shape("batch_shape", batch_shape)

    @property
    def parts(self) -> tuple[Transform, Transform, Transform]:
        """The three maps, in the order in which they are applied."""
        return self.upper, self.diagonal, self.lower

    def __repr__(self) -> str:
        lines = "\n".join(
            f"({name}): {part}"
            for name, part in zip(("upper", "diagonal", "lower"), self.parts, strict=True)
        )
        return f"{type(self).__name__}(\n{indent(lines, '  ')}\n)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LDUTransform) and self.parts == other.parts

    __hash__ = None  # type: ignore[assignment]

    def _call(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x

    def _inverse(self, y: Tensor) -> Tensor:
        for part in reversed(self.parts):
            y = part.inv(y)
        return y

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        for part in self.parts:
            x, ladj = part.call_and_ladj(x)  # type: ignore[attr-defined]
            total = total + sum_last(ladj, self._event_dim - part.domain.event_dim)
        return x, total
