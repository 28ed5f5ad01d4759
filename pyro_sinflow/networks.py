r"""Masked networks, which map features and a context to the parameters of triangular maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from zuko.nn import MaskedLinear, MaskedMLP, Residual

from . import _validate as check
from ._torch import can_branch_on
from .masks import (
    check_adjacency,
    check_order,
    dependence,
    feature_ranks,
    longest_paths,
    masked_mlp,
)

_PROBES = 64  # the largest number of units that a check changes
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def check_context(c: Tensor | None, context: int, dtype: torch.dtype) -> None:
    """Requires a context tensor where there are context features, and none where there are none."""
    if context == 0:
        if c is not None:
            given = f"a tensor of shape {tuple(c.shape)}" if isinstance(c, Tensor) else repr(c)
            raise ValueError(
                f"'context' should be None, as there are no context features, got {given}. A flow "
                "scores data x by 'flow().log_prob(x)'."
            )
    elif c is None:
        raise ValueError(f"'context' should be a tensor of shape (*, {context}), got None.")
    else:
        check.finite_context(c)
        check.event("context", c, Size([context]))
        if c.is_floating_point():
            check.dtype("context", c, dtype)


def weight_dtype(module: nn.Module) -> torch.dtype:
    """Returns the dtype of a module's weights, which may be parameters or plain tensors."""
    for part in module.modules():
        for name in ("weight", "constant", "parameter"):
            if isinstance(weight := getattr(part, name, None), Tensor):
                return weight.dtype
    return torch.get_default_dtype()


def check_activation(
    activation: Callable[[], nn.Module] | None, dropout: float
) -> Callable[[], nn.Module]:
    """Requires the constructor of an activation, or None for ReLU, and a dropout probability.

    Returns:
        The constructor of the activation, followed by dropout if the probability is not zero.
    """
    check.real("dropout", dropout, 0.0, 1.0, closed=True)
    if isinstance(activation, nn.Module):  # callable, but not a constructor
        raise TypeError(
            f"'activation' should be a constructor, such as torch.nn.ReLU, got {activation}."
        )
    make = nn.ReLU if activation is None else check.function("activation", activation)
    return make if dropout == 0 else lambda: nn.Sequential(make(), nn.Dropout(dropout))


@torch.no_grad()
def _respond(
    module: nn.Module, row: Tensor, shape: Sequence[int], *args: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Evaluates a module at a flattened row, and with one unit of the row changed at a time.

    The module is in evaluation mode meanwhile. ``shape`` is that of its input without the batch.

    Returns:
        The units that are changed, and the outputs, of which the first is that of the row itself.
    """
    units = torch.linspace(0, len(row) - 1, min(len(row), _PROBES), device=row.device).long()
    rows = row.repeat(len(units) + 1, 1)
    rows[torch.arange(1, len(rows), device=row.device), units] += 1.0
    modes = {part: part.training for part in module.modules()}
    try:
        return units, module.eval()(rows.view(-1, *shape), *args)
    finally:
        for part, mode in modes.items():
            part.training = mode


def check_element_wise(activation: nn.Module, shape: Sequence[int]) -> None:
    """Requires that an activation is element-wise.

    With an activation that mixes units, such as softmax or layer normalization, the parameters of a
    feature would depend on later features. The check changes one unit at a time and looks for
    changes of other units. Batch normalization mixes the rows of a batch instead, in training.
    ``shape`` is that of the input without the batch.
    """
    if any(isinstance(part, _BATCH_NORMS) for part in activation.modules()):
        raise ValueError(
            f"'activation' should act on each unit by itself, but {activation} mixes the rows of a "
            "batch."
        )
    n = math.prod(shape)
    row = torch.linspace(-1.5, 1.5, n)
    if row.is_meta:
        return
    try:
        units, y = _respond(activation, row, shape)
    except Exception as error:
        raise ValueError(f"'activation' fails on {tuple(shape)} hidden units: {error}") from error
    if y.shape != (len(units) + 1, *shape):
        raise ValueError(
            f"'activation' should keep the number of units, but {activation} makes "
            f"{tuple(y.shape[1:])} of {tuple(shape)}."
        )
    y = y.reshape(len(y), n)
    moved = (y[1:] - y[0]).abs() > 1e-5 * (1 + y[0].abs())
    moved[torch.arange(len(units)), units] = False
    if bool(moved.any()):
        raise ValueError(
            f"'activation' should act on each unit by itself, but {activation} mixes units: the "
            "map would not be triangular, and its log-determinants wrong."
        )


def check_triangular(
    network: nn.Module, features: Sequence[int], x: Tensor, c: Tensor | None
) -> None:
    """Requires that the parameters of no feature depend on the feature itself.

    Otherwise log-densities would be wrong. The check takes the first row of x and of the context,
    changes one feature at a time, and follows the dependencies.
    """
    n = math.prod(features)
    if c is not None:
        c = c.reshape(-1, c.shape[-1])[:1].expand(min(n, _PROBES) + 1, -1)
    probes, h = _respond(network, x.reshape(-1, n)[0], features, c)
    h = h.reshape(len(h), n, -1)
    tolerance = torch.finfo(h.dtype).eps ** 0.5
    moved = ((h[1:] - h[0]).abs() > tolerance * (1 + h[0].abs())).any(dim=-1)
    cyclic = longest_paths(moved[:, probes].t()) == len(probes)
    if bool(cyclic.any()):
        raise ValueError(
            f"'network' should compute the parameters of a feature from the features before it, "
            f"but in {type(network).__name__} those of the features {probes[cyclic].tolist()} "
            "depend on the features themselves, or on features that do: log-densities would be "
            "wrong."
        )


class MaskedNetwork(nn.Module):
    r"""Creates a network :math:`h_i(x_{<i}, c)`.

    It is a :class:`zuko.nn.MaskedMLP` for events of any shape and a context.

    Args:
        features: The shape of an event.
        context: The number of context features.
        outputs: The number of outputs for each feature.
        order: The rank of each feature. If :py:`None`, features are in ascending order.
        adjacency: Which features and context features each feature depends on, instead of an order:
            a matrix of booleans, or zeros and ones, with shape :math:`(D, D)` or
            :math:`(D, D + C)`. Row i holds the dependencies of feature i, features in raster order.
            As for :class:`zuko.flows.autoregressive.MaskedAutoregressiveTransform`, the diagonal
            holds ones, and the graph has no cycles. Without columns for the context, each feature
            depends on all of it.
        hidden_features: The numbers of hidden features.
        activation: The activation function constructor. If :py:`None`, :class:`torch.nn.ReLU`.
            It must be element-wise.
        residual: Whether to use residual blocks or not.
        dropout: The probability, in :math:`[0, 1)`, that a hidden unit is dropped in training.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size is not positive, ``order`` is not a permutation, ``adjacency`` has the
            wrong shape or values, a zero on the diagonal, or a cycle, both of them are given, a
            number is out of range, ``activation`` is not element-wise, or there are fewer hidden
            features than an ``adjacency`` needs.

    Example:
        >>> network = MaskedNetwork((3,), context=2, outputs=4)
        >>> network(torch.randn(5, 3), torch.randn(2)).shape
        torch.Size([5, 3, 4])

        Here the second feature depends on the first, and the third on the second alone.

        >>> chain = [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
        >>> MaskedNetwork((3,), outputs=4, adjacency=chain)(torch.randn(5, 3)).shape
        torch.Size([5, 3, 4])
    """

    def __init__(
        self,
        features: int | Sequence[int],
        context: int = 0,
        outputs: int = 1,
        order: Sequence[int] | Tensor | None = None,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] | None = None,
        residual: bool = False,
        dropout: float = 0.0,
        *,
        adjacency: Sequence[Sequence[int]] | Tensor | None = None,
    ) -> None:
        super().__init__()

        self.features = check.sizes("features", features)
        self.context = check.size("context", context, minimum=0)
        self.outputs = check.size("outputs", outputs)
        hidden = check.shape("hidden_features", hidden_features, minimum=1)
        check.flag("residual", residual)
        activate = check_activation(activation, dropout)
        if adjacency is not None and order is not None:
            raise ValueError("'order' should be None where there is an 'adjacency', got both.")
        if adjacency is None:
            rank = check_order(order, self.features)
            whole = torch.ones(len(rank), self.context, dtype=torch.bool)
            seen, self.passes = torch.cat((rank[:, None] > rank, whole), dim=1), len(rank)
        else:
            seen, rank = check_adjacency(adjacency, self.features, self.context)
            self.passes = 1 + int(rank.max())
        self.mlp: MaskedMLP | None = None
        if not seen.any():  # nothing to depend on
            self.constant = nn.Parameter(torch.zeros(len(seen) * self.outputs))
            return
        outputs_seen = seen.repeat_interleave(self.outputs, dim=0)
        mlp = masked_mlp(outputs_seen, hidden, activate, residual and len(hidden) > 0)
        if adjacency is not None:
            inputs = torch.eye(mlp.in_features, dtype=torch.float32, device=outputs_seen.device)
            if bool((outputs_seen & (dependence(mlp, inputs) == 0)).any()):
                raise ValueError(
                    f"'hidden_features' {tuple(hidden)} are too few for the dependencies that "
                    f"'adjacency' states: {len(seen.unique(dim=0))} in each layer are enough."
                )
        width = 0
        for part in mlp.modules():
            if isinstance(part, MaskedLinear):
                width = part.out_features
            elif not isinstance(part, MaskedMLP | Residual):
                check_element_wise(part, [width])
        self.mlp = mlp
        if adjacency is not None:
            self.register_load_state_dict_post_hook(_count_passes)

    @property
    def bias(self) -> Tensor:
        """The bias of the last layer."""
        return self.constant if self.mlp is None else self.mlp[-1].bias

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.constant.dtype if self.mlp is None else weight_dtype(self.mlp)

    def set_bias(self, bias: Tensor) -> None:
        r"""Sets the bias of the outputs.

        Args:
            bias: The bias, with shape :math:`(D, \text{outputs})`, features in raster order.
        """
        with torch.no_grad():
            self.bias.copy_(bias.flatten())

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        r"""Computes the parameters.

        Args:
            x: The features, with shape :math:`(*, \text{features})`.
            c: The context, with shape :math:`(*, C)`.

        Returns:
            The parameters, with shape :math:`(*, \text{features}, \text{outputs})`.

        Raises:
            ValueError: If the shape of x or c is wrong, c is missing, or c is given to a network
                without context features.
            TypeError: If x or c has the wrong dtype.
        """
        n, mlp, dtype = len(self.features), self.mlp, self.dtype
        if x.shape[-n:] != self.features or x.dtype != dtype:
            check.event("x", x, self.features)
            check.dtype("x", x, dtype)
        if c is not None or self.context > 0:
            check_context(c, self.context, dtype)
        if mlp is None:
            constant = self.constant.view(*self.features, self.outputs)
            return constant.to(x.dtype).expand(*x.shape, self.outputs)
        flat = x if n == 1 else x.flatten(-n)
        if c is not None:
            batch = check.broadcast(x=flat.shape[:-1], context=c.shape[:-1])
            flat = torch.cat((flat.expand(*batch, -1), c.expand(*batch, -1)), dim=-1)
        if flat.dtype != dtype:
            flat = flat.to(dtype)
        h = mlp(flat).unflatten(-1, (-1, self.outputs))
        if n > 1:
            h = h.unflatten(-2, self.features)
        return h if h.dtype == x.dtype else h.to(x.dtype)


def _count_passes(network: MaskedNetwork, _: Any) -> None:
    """Takes the number of passes from the masks, which may be loaded from another network."""
    mlp, features = network.mlp, network.features.numel()
    if mlp is not None:
        network.passes = features  # always enough
        if can_branch_on(*mlp.buffers()):
            network.passes = 1 + int(feature_ranks(mlp, mlp.in_features, features).max())
