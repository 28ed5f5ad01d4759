r"""Forward substitution through masked networks, for whole batches of triangular maps.

To invert :math:`y_i = \tau(x_i; h_i(x_{<i}))`, features are settled block by block, as a triangular
system of equations is. When a block begins, the features before it are known, and so are the hidden
units that see only these: what they contribute is computed once. The iteration inside the block
then sees only the few units that depend on it, so that a whole inverse costs little more than
evaluating the network once, in however many steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Transform
from torch.nn.modules.dropout import _DropoutNd
from zuko.nn import MaskedLinear, MaskedMLP, Residual
from zuko.utils import unpack

from ._checks import autocasting
from .inversion import Solver, solve_blocks
from .networks import Shortcut

_SIZE = 16  # parameters in a block of features, unless a single feature has more
_LEAST = 2048  # numbers in a batch, below which a few passes through the whole network are faster


class _Skip(NamedTuple):
    """The beginning or the end of a residual connection."""

    begins: bool


def _operations(module: nn.Module) -> list[nn.Module | _Skip]:
    """Returns the operations of a network in their order.

    Raises:
        NotImplementedError: If there are others than masked layers, residual connections and
            activations.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks
    if type(module) is MaskedLinear and not hooks:
        return [module]
    if type(module) in (nn.Sequential, MaskedMLP, Residual) and not hooks:
        flat = [operation for child in module.children() for operation in _operations(child)]
        return [_Skip(True), *flat, _Skip(False)] if isinstance(module, Residual) else flat
    random = isinstance(module, _DropoutNd | nn.RReLU) and module.training
    if hooks or random or [*module.children()] or module.state_dict():
        raise NotImplementedError(f"{type(module).__name__} may not be an activation.")
    return [] if isinstance(module, _DropoutNd) else [module]


class _Units(NamedTuple):
    """The units of a layer, sorted by the stage in which they become known."""

    order: Tensor
    cuts: list[int]  # how many are known before each stage

    @classmethod
    def sort(cls, stage: Tensor, count: int) -> _Units:
        ordered, order = stage.sort(stable=True)
        bounds = torch.arange(count + 1, device=stage.device)
        return cls(order, torch.searchsorted(ordered, bounds).tolist())

    def known(self, stage: int) -> slice:
        return slice(0, self.cuts[stage])

    def new(self, stage: int) -> slice:
        return slice(self.cuts[stage], self.cuts[stage + 1])


def _split(network: nn.Module) -> tuple[list[nn.Module | _Skip], MaskedLinear | None]:
    """Returns the operations of a network, and the layer of its shortcut, if it has one."""
    shortcut = None
    if type(network) is Shortcut and not (network._forward_hooks or network._forward_pre_hooks):
        (shortcut,) = _operations(network.linear)
        network = network.network
    return _operations(network), shortcut


class Stages:
    """The stages of a masked network: first its context, then its features, block by block.

    Args:
        network: A :class:`zuko.nn.MaskedMLP`, with a :class:`~pyro_sinflow.networks.Shortcut` or
            without.
        features: The number of features, which come before the context in the network's input.
        size: The number of features in a block. If :py:`None`, fewer where they have many
            parameters, because these make the iteration inside a block costly.

    Raises:
        NotImplementedError: If the network is not made of masked layers and activations alone.
    """

    def __init__(self, network: nn.Module, features: int, size: int | None = None) -> None:
        self.operations, self.shortcut = _split(network)
        main = [o for o in self.operations if isinstance(o, MaskedLinear)]
        self.linears = main if self.shortcut is None else [*main, self.shortcut]
        self.masks = [(layer.mask, layer.mask._version) for layer in self.linears]
        masks = [layer.mask.float() for layer in main]
        device = masks[0].device

        reach = masks[0]
        for mask in masks[1:]:
            reach = (mask @ reach).sign()
        outputs = len(reach) // features
        size = max(_SIZE // outputs, 1) if size is None else size
        needs = reach[:, :features].unflatten(0, (features, -1)).any(dim=1)
        if self.shortcut is not None:
            needs |= self.shortcut.mask[:, :features].bool()
        # The level of a feature: the length of the longest chain of features that it depends on.
        level = torch.zeros(features, dtype=torch.long, device=device)
        for _ in range(features):
            level = torch.where(needs, level + 1, 0).amax(dim=1)
        block = torch.empty_like(level)
        block[level.argsort(stable=True)] = torch.arange(features, device=device) // size
        self.blocks = [(block == i).nonzero().squeeze(1) for i in range(-(-features // size))]
        # An iteration over a block is exact after one pass for each of its levels.
        self.passes = [len(level[i].unique()) for i in self.blocks]
        count = 1 + len(self.blocks)

        stage = F.pad(block + 1, (0, masks[0].shape[1] - features))
        last = (block + 1).repeat_interleave(outputs)
        units = [_Units.sort(stage, count)]
        skipped: list[Tensor] = []
        for operation, following in zip(self.operations, [*self.operations[1:], None], strict=True):
            if isinstance(operation, MaskedLinear):
                stage = torch.where(operation.mask.bool(), stage, 0).amax(dim=1)
                if operation is main[-1]:
                    stage = last
                elif isinstance(following, _Skip) and not following.begins:
                    stage = skipped.pop()  # sorted like what they are added to
                units.append(_Units.sort(stage, count))
            elif isinstance(operation, _Skip) and operation.begins:
                skipped.append(stage)
        self.units = [*pairwise(units)]  # inputs and outputs of each layer
        if self.shortcut is not None:
            self.units.append((units[0], _Units.sort(block + 1, count)))

    def suit(self, network: nn.Module) -> bool:
        """Whether the network and its masks are still those that the stages were made from."""
        return (self.operations, self.shortcut) == _split(network) and all(
            layer.mask is mask and mask._version == version
            for layer, (mask, version) in zip(self.linears, self.masks, strict=True)
        )


class Evaluation:
    """An evaluation of a network, stage after stage, with the weights that it has now.

    Units come first here, and rows of the batch last, so that the units of a stage are contiguous.

    Args:
        stages: The stages of the network.
        context: The context, with shape :math:`(C, N)`.
    """

    def __init__(self, stages: Stages, context: Tensor) -> None:
        self.operations = stages.operations
        self.shortcut = stages.shortcut
        self.layers = []
        for layer, (ins, outs) in zip(stages.linears, stages.units, strict=True):
            weight = (layer.mask * layer.weight)[outs.order].index_select(1, ins.order)
            bias = torch.zeros_like(weight[:, 0]) if layer.bias is None else layer.bias[outs.order]
            known = context.new_empty(len(ins.order), context.shape[1])  # inputs, as far as known
            self.layers.append((weight, bias.unsqueeze(1), ins, outs, known))
        self.begin(0)
        self(context, commit=True)

    def begin(self, stage: int) -> None:
        """Computes what known units contribute to the units of a stage."""
        self.stage = stage
        self.parts = []
        for weight, bias, ins, outs, known in self.layers:
            rows, old, new = weight[outs.new(stage)], ins.known(stage), ins.new(stage)
            base = torch.addmm(bias[outs.new(stage)], rows[:, old], known[old])
            self.parts.append((base, rows[:, new], known[new]))

    def __call__(self, x: Tensor, commit: bool = False) -> Tensor:
        """Returns the outputs of the stage, given its features, with shape (size, N).

        With ``commit``, the units of the stage count as known from now on.
        """
        parts = iter(self.parts)
        skipped = []

        def linear(x: Tensor) -> Tensor:
            base, weight, known = next(parts)
            if commit:
                known.copy_(x)
            return torch.addmm(base, weight, x)

        features = x
        for operation in self.operations:
            if isinstance(operation, MaskedLinear):
                x = linear(x)
            elif isinstance(operation, _Skip):
                if operation.begins:
                    skipped.append(x)
                else:
                    x = x + skipped.pop()
            else:
                x = operation(x)
        if self.shortcut is not None and len(shifts := linear(features)):
            x[:: len(x) // len(shifts)] += shifts
        return x


_stages: WeakKeyDictionary[nn.Module, Stages] = WeakKeyDictionary()


def _stages_of(network: nn.Module, features: int) -> Stages:
    """Returns the stages of a network, made anew when its masks have changed."""
    stages = _stages.get(network)
    if stages is None or not stages.suit(network):
        stages = _stages[network] = Stages(network, features)
    return stages


def substitute(
    network: nn.Module | None,
    univariate: Callable[..., Transform],
    shapes: Sequence[Sequence[int]],
    c: Tensor | None,
    event_dim: int,
    y: Tensor,
    solver: Solver,
) -> Tensor | None:
    r"""Inverts a triangular map whose parameters come from a masked network.

    Args:
        network: The network, which sees features and context side by side.
        univariate: The constructor of :math:`\tau`.
        shapes: The shapes of its arguments, for one feature.
        c: The context, with shape :math:`(*, C)`, if there is one.
        event_dim: The number of dimensions of an event.
        y: The values to invert.
        solver: Tolerance and number of iterations.

    Returns:
        The root, or :py:`None` where passes through the whole network are faster, or where the
        network is not one that can be evaluated in stages.
    """
    if network is None or y.numel() < _LEAST or y.device.type != "cpu" or autocasting(y):
        return None
    features = y.shape[y.ndim - event_dim :].numel()
    try:
        stages = _stages_of(network, features)
    except NotImplementedError:
        return None
    if stages.linears[0].weight.dtype != y.dtype:
        return None

    event = y.shape[y.ndim - event_dim :]
    batch = y.shape[: y.ndim - event_dim]
    if c is not None:
        batch = torch.broadcast_shapes(batch, c.shape[:-1])
    y = y.expand(batch + event).reshape(-1, features).t().contiguous()
    context = y[:0] if c is None else c.expand(*batch, -1).reshape(y.shape[1], -1).t()
    evaluation = Evaluation(stages, context)
    x = torch.empty_like(y)

    def blocks() -> Iterator[tuple[Tensor, int, Callable[[Tensor], Tensor]]]:
        for i, (block, passes) in enumerate(zip(stages.blocks, stages.passes, strict=True), 1):
            evaluation.begin(i)
            target = y[block].t()

            def step(x: Tensor, target: Tensor = target) -> Tensor:
                h = evaluation(x).unflatten(0, (len(x), -1)).movedim(2, 0)
                return univariate(*unpack(h, shapes)).inv(target).t()

            yield block, passes, step
            evaluation(x[block], commit=True)

    return solve_blocks(blocks(), x, solver).reshape(batch + event)
