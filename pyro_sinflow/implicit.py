r"""Implicit derivatives of the inverse of triangular maps.

For :math:`f(x; \phi) = y`, the cotangent v of y solves :math:`J^T v = g`, where J is the Jacobian
of f at the root x, and g the cotangent of x; that of :math:`\phi` is :math:`-v^T` times the
derivative of f with respect to it. The system is triangular, and solved like f itself, so that
memory does not depend on the number of passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from pyro.distributions import is_validation_enabled
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from ._checks import autocasting, readable
from .inversion import Solver
from .triangular import TriangularMap, find_root, finite_events, settle


def invert_triangular(
    function: TriangularMap, y: Tensor, solver: Solver, passes: int | None = None
) -> Tensor:
    r"""Inverts a triangular map, with implicit derivatives.

    The gradient solves the transposed triangular system by the same nilpotent iteration, so that
    memory does not depend on the number of passes. It can be differentiated once more. Inside
    ``torch.func`` transforms the passes are recorded instead.

    Args:
        function: The map.
        y: The values to invert, with shape :math:`(*, D)` or another event shape.
        solver: Method, tolerance and number of iterations.
        passes: A bound of the number of passes that is lower than the number of features.

    Returns:
        The root x, with the shape of y.

    Raises:
        InversionError: If the map turns out not to be triangular, or not deterministic, or every
            event leaves the range of the dtype.

    Warns:
        InversionWarning: If some events leave it, or the tolerance is missed because
            ``solver.max_iter`` is small.
    """
    phi = tuple(function.phi())
    if not readable(y, *phi):
        return find_root(function, y, solver, passes, may_read=False)
    finite = None
    if not is_validation_enabled():  # what has passed unchecked shall not spoil the batch
        finite = finite_events(y, function.event_dim)
        y = y.where(finite, 0.0)
    wanted = [p for p in phi if p.requires_grad]
    if torch.is_grad_enabled() and (y.requires_grad or wanted):
        x = _TriangularInverse.apply(_Problem(function, solver, passes), y, *wanted)
    else:
        with torch.no_grad():
            x = find_root(function, y, solver, passes)
    if autocasting(y):
        # In torch 2.4, weights that autocast has cast without a gradient stay so.
        torch.clear_autocast_cache()
    return x if finite is None else x.where(finite, torch.nan)


class _Problem(NamedTuple):
    function: TriangularMap
    solver: Solver
    passes: int | None

    def find(self, phi: Sequence[Tensor]) -> list[Tensor]:
        """Returns the tensors that the map depends on, given what has been saved of them.

        Saved tensors may be copies, as hooks make for checkpoints, but have the same edges.
        """
        with torch.enable_grad():  # torch 2.4 gives leaves their edges only then
            edges = {get_gradient_edge(p)[:2]: p for p in self.function.phi() if p.requires_grad}
            try:
                return [edges[get_gradient_edge(p)[:2]] for p in phi]
            except KeyError:
                raise RuntimeError(
                    "The gradient of an inverse evaluates the map once more, but its parameters "
                    "have been replaced since, as torch.func.functional_call does: differentiate "
                    "while they are in place, or use torch.func.grad."
                ) from None

    def solve(
        self,
        product: Callable[[Tensor], Tensor],
        diagonal: Tensor,
        g: Tensor,
        transposed: bool = False,
    ) -> Tensor:
        """Solves a linear system for v, of which the diagonal and the other products are given.

        Its matrix is the Jacobian, or with ``transposed`` the transposed Jacobian.
        """
        event_dim = self.function.event_dim
        matrix = self.function.finite_preconditioner()
        if matrix is not None and transposed:
            matrix = matrix.mT
        # Tolerances are relative to 1, but the mean over a batch, and steep maps, make gradients
        # small: each event is solved in units of the largest number of the first guess. Where this
        # is zero or not finite, so is v.
        guess = (g / diagonal).abs().flatten(g.ndim - event_dim)
        unit = guess.amax(dim=-1)[(...,) + event_dim * (None,)]
        g = (g / unit).nan_to_num(0.0)
        # To round-off, whatever the user's tolerance for samples.
        v = settle(
            lambda v: (g - product(v)) / diagonal,
            g / diagonal,
            event_dim,
            Solver(),
            "adjoint",
            self.passes,
            matrix,
        )
        return unit * v


class _Gate(Function):
    """The identity, whose backward is blocked while the gate is shut.

    It makes an intermediate result a constant for one derivative, and a variable for the next.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: list[bool]) -> Tensor:
        ctx.gate = gate
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gx: Tensor) -> tuple[Tensor | None, None]:
        return (gx if ctx.gate[0] else None), None


class _Aliases(TorchFunctionMode):
    """Puts aliases in the place of tensors, in all calls of torch's functions.

    The derivative with respect to an alias is the partial one. That with respect to the tensor
    itself would run on to others, where one has been made of another, and through its hooks.
    """

    def __init__(self, tensors: Sequence[Tensor], aliases: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors, self.aliases = tensors, aliases
        self.known = {id(t): alias for t, alias in zip(tensors, aliases, strict=True)}

    def _swap(self, arg: Any) -> Any:
        if type(arg) in (list, tuple):
            return type(arg)(map(self._swap, arg))
        return self.known.get(id(arg), arg)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {name: self._swap(arg) for name, arg in (kwargs or {}).items()}
        return func(*self._swap(args), **kwargs)

    def pull(
        self, y: Tensor, others: Sequence[Tensor], v: Tensor, create_graph: bool = False
    ) -> list[Tensor | None]:
        """Returns the products of transposed Jacobians with v, those for others first."""

        def products(inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
            # What y shares with others, such as the embedding of a context, is still needed.
            return torch.autograd.grad(
                y, inputs, v, retain_graph=True, create_graph=create_graph, allow_unused=True
            )

        grads = [*products((*others, *self.aliases))]
        # Scripted modules, for one, make no calls that can be seen: theirs are total derivatives.
        unseen = [i for i, g in enumerate(grads[len(others) :]) if g is None]
        if unseen:
            for i, g in zip(unseen, products([self.tensors[i] for i in unseen]), strict=True):
                grads[len(others) + i] = g
        return grads


def _detached(tensors: Sequence[Tensor]) -> _Aliases:
    return _Aliases(tensors, [t.detach().requires_grad_() for t in tensors])


def _split_jacobian(
    function: TriangularMap, x: Tensor, aliases: AbstractContextManager[Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y as a function of a leaf that feeds the conditioner, that leaf, and the diagonal."""
    with torch.enable_grad():
        leaf, own = x.detach().requires_grad_(), x.detach().requires_grad_()
        with aliases:
            y = function.value(own, fixed=leaf)
        (diagonal,) = torch.autograd.grad(y, own, torch.ones_like(y), retain_graph=True)
    return y, leaf, diagonal


def _pull(y: Tensor, leaf: Tensor, v: Tensor, create_graph: bool = False) -> Tensor:
    """Returns the product of the transposed Jacobian with v; zero where nothing depends on leaf."""
    if not y.requires_grad:
        return torch.zeros_like(leaf)
    (product,) = torch.autograd.grad(
        y, leaf, v, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return product


def _solve_adjoint(
    problem: _Problem,
    x: Tensor,
    g: Tensor,
    aliases: AbstractContextManager[Any],
) -> tuple[Tensor, Tensor]:
    """Returns v, which solves J^T v = g for the Jacobian J at x, and the map's value at x."""
    y, leaf, diagonal = _split_jacobian(problem.function, x, aliases)
    return problem.solve(lambda v: _pull(y, leaf, v), diagonal, g, transposed=True), y


class _TriangularInverse(Function):
    """x = f^{-1}(y): the gradient v solves J^T v = g, and reaches phi as -v^T df/dphi."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, y: Tensor, *phi: Tensor) -> Tensor:
        x = find_root(problem.function, y, problem.solver, problem.passes)
        ctx.problem = problem
        ctx.autocast = _autocast_state(y)
        ctx.save_for_backward(x, *phi)
        ctx.set_materialize_grads(False)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *phi = ctx.saved_tensors
        if g is None:
            return (None, None, *[None for _ in phi])
        phi = ctx.problem.find(phi)
        create_graph = torch.is_grad_enabled()
        with torch.autocast(**ctx.autocast):
            # For the gradient of phi, x is a constant, lest it run through this very node again,
            # and phi ends at its aliases; for the derivative of the result they are variables.
            gate = [False]
            if create_graph:
                v = _TriangularAdjoint.apply(ctx.problem, ctx.autocast, g, x, *phi)
                aliases = _Aliases(phi, [_Gate.apply(p, gate) for p in phi])
                with aliases:
                    y = ctx.problem.function.value(_Gate.apply(x, gate))
            else:
                aliases = _detached(phi)
                v, y = _solve_adjoint(ctx.problem, x, g, aliases)
            grads: Sequence[Tensor | None] = [None for _ in phi]
            if phi and y.requires_grad:
                grads = aliases.pull(y, (), -v, create_graph)
            gate[0] = True
        return None, v, *grads


class _TriangularAdjoint(Function):
    """v = J(x)^{-T} g, as a function of g, x and phi; for the second derivative of the inverse."""

    @staticmethod
    def forward(
        ctx: Any, problem: _Problem, autocast: dict[str, Any], g: Tensor, x: Tensor, *phi: Tensor
    ) -> Tensor:
        v, _ = _solve_adjoint(problem, x, g, nullcontext())
        ctx.problem, ctx.autocast = problem, autocast
        ctx.save_for_backward(v, x, *phi)
        return v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, ...]:
        v, x, *phi = ctx.saved_tensors
        aliases = _detached(ctx.problem.find(phi))
        v = v.detach()  # an output of this very node, through which phi's gradient must not run
        function = ctx.problem.function
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            # J u = w. The product with J is the derivative, with respect to z, of J^T z.
            y, leaf, diagonal = _split_jacobian(function, x, nullcontext())
            z = torch.zeros_like(v).requires_grad_()
            pulled = _pull(y, leaf, z, create_graph=True)
            u = ctx.problem.solve(lambda u: _pull(pulled, z, u), diagonal, w)
            # The remaining gradients are those of -<v, J(x) u>, at constant u and v.
            leaf = x.detach().requires_grad_()
            with aliases:
                y = function.value(leaf)
            (pulled,) = torch.autograd.grad(y, leaf, v, create_graph=True)
            grads: Sequence[Tensor | None] = [None for _ in (leaf, *phi)]
            if pulled.requires_grad:
                grads = aliases.pull(pulled, (leaf,), -u)
        return None, None, u, *grads


def _autocast_state(x: Tensor) -> dict[str, Any]:
    device = x.device.type
    return {
        "device_type": device,
        "dtype": torch.get_autocast_dtype(device),
        "enabled": torch.is_autocast_enabled(device),
    }
