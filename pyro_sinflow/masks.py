"""Which output of a network depends on which input: orders, adjacency matrices, masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from zuko.nn import MaskedLinear, MaskedMLP, Residual


def check_order(order: Sequence[int] | Tensor | None, features: Size) -> Tensor:
    """Requires a permutation of the features, and returns it.

    Raises:
        TypeError: If it does not hold integers.
        ValueError: If these are not a permutation.
    """
    n = features.numel()
    if order is None:
        return torch.arange(n)
    try:
        ranks = torch.as_tensor(order).flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"'order' should hold {n} integers, got {order!r}.") from error
    if ranks.is_floating_point() or ranks.dtype == torch.bool:
        raise TypeError(f"'order' should hold {n} integers, got {order}.")
    if len(ranks) != n:
        raise ValueError(f"'order' should hold {n} integers, got {order}.")
    if sorted(ranks.tolist()) != list(range(n)):
        raise ValueError(f"'order' should be a permutation of 0, ..., {n - 1}, got {order}.")
    return ranks.long()


def check_adjacency(adjacency: Any, features: Size, context: int) -> tuple[Tensor, Tensor]:
    """Requires the adjacency matrix of a directed graph without cycles, ones on its diagonal.

    Returns:
        Which inputs the parameters of each feature depend on, as booleans, with shape (D, D + C),
        zeros on the diagonal, and the length of the longest path to each feature, on the CPU.
    """
    n = features.numel()
    try:
        given = torch.as_tensor(adjacency, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"'adjacency' should be a matrix, got {adjacency!r}.") from error
    widths = (n, n + context)
    if given.ndim != 2 or len(given) != n or given.shape[1] not in widths:
        shapes = " or ".join(f"({n}, {width})" for width in sorted({*widths}))
        raise ValueError(f"'adjacency' should have shape {shapes}, got {tuple(given.shape)}.")
    if given.is_complex() or not ((given == 0) | (given == 1)).all():
        raise ValueError(f"'adjacency' should hold zeros and ones, or booleans, got {given}.")
    seen = given.bool()
    own = seen[:, :n].diagonal()
    if not own.all():
        missing = (~own).nonzero().flatten().tolist()
        raise ValueError(
            f"'adjacency' should have ones on the diagonal, got zeros for the features {missing}."
        )
    parents = seen[:, :n] ^ own.diag()
    rank = longest_paths(parents)
    if bool((cyclic := rank == n).any()):
        raise ValueError(
            "'adjacency' should be the matrix of a graph without cycles, but the features "
            f"{cyclic.nonzero().flatten().tolist()} are in a cycle, or depend on one."
        )
    others = seen[:, n:] if seen.shape[1] == n + context else seen.new_ones(n, context)
    return torch.cat((parents, others), dim=1).to(torch.get_default_device()), rank


def longest_paths(parents: Tensor) -> Tensor:
    """Returns the length of the longest path to each feature, D for those that a cycle leads to.

    Row i of ``parents``, with shape (D, D), holds the features that feature i depends on.
    """
    n = len(parents)
    rank = torch.full((n,), n, device=parents.device)
    missing, step = parents.sum(dim=1), 0
    while len(ready := (missing == 0).nonzero().squeeze(1)):
        rank[ready] = step
        missing -= parents[:, ready].sum(dim=1)
        missing[ready], step = -1, step + 1
    return rank


def masked_mlp(
    adjacency: Tensor,
    hidden_features: Sequence[int],
    activation: Callable[[], nn.Module] | None,
    residual: bool = False,
) -> MaskedMLP:
    """Creates zuko's network, with masks that are fast."""
    mlp = MaskedMLP(adjacency, hidden_features, activation, residual)
    for layer in mlp.modules():
        if isinstance(layer, MaskedLinear):
            # A product with booleans is several times slower.
            layer.mask = layer.mask.to(layer.weight.dtype)
    return mlp


def dependence(module: nn.Module, seen: Tensor) -> Tensor:
    """Returns which inputs of a network the outputs of a part of it depend on, zeros and ones.

    ``seen`` holds the same for the inputs of the part.
    """
    if isinstance(module, MaskedLinear):
        return (module.mask.to(seen) @ seen).sign()
    after = seen
    for child in module.children():
        after = dependence(child, after)
    return (seen + after).sign() if isinstance(module, Residual) else after


def feature_ranks(network: nn.Module, inputs: int, features: int) -> Tensor:
    """Returns the :func:`longest_paths` of a masked network whose first inputs are features."""
    device = next(network.buffers()).device
    seen = torch.eye(inputs, features, dtype=torch.float32, device=device)
    return longest_paths(dependence(network, seen).unflatten(0, (features, -1)).any(dim=1))
