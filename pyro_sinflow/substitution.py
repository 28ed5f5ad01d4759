r"""Forward substitution through masked networks, for whole batches of triangular maps.

To invert :math:`y_i = \tau(x_i; h_i(x_{<i}))`, features are settled one after the other, as the
unknowns of a triangular system of equations are. A hidden unit is computed once, as soon as the
features that it sees are known. A whole inverse thus evaluates the network once, in as many steps
as there are features, and iterates only where :math:`\tau^{-1}` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Transform
from torch.nn.modules import activation
from torch.nn.modules.dropout import _DropoutNd
from zuko.nn import MaskedLinear, MaskedMLP, Residual
from zuko.utils import unpack

from ._checks import autocasting, version
from .networks import Shortcut
from .triangular import solved

_SIZE = 16  # features in a block, unless a single stage has more
# With fewer rows than these for each stage, and in all, a few passes through the whole are faster.
_LEAST, _ENOUGH = 3, 384


# torch's own, as far as they treat all units alike, and each by itself.
_MIXING = {nn.GLU, nn.LogSoftmax, nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.Softmin}
_ACTIVATIONS = {getattr(nn, name) for name in activation.__all__} - _MIXING | {nn.Identity}


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that may change what it returns."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class _Skip(NamedTuple):
    """The beginning or the end of a residual connection."""

    begins: bool


def _operations(module: nn.Module) -> list[nn.Module | _Skip]:
    """Returns the operations of a network in their order.

    Raises:
        NotImplementedError: If there are others than masked layers, residual connections and
            activations.
    """
    if has_hooks(module):
        raise NotImplementedError("Hooks may change what a module returns.")
    if type(module) is MaskedLinear:
        return [module]
    if type(module) in (nn.Sequential, MaskedMLP, Residual):
        flat = [operation for child in module.children() for operation in _operations(child)]
        return [_Skip(True), *flat, _Skip(False)] if isinstance(module, Residual) else flat
    random = isinstance(module, _DropoutNd | nn.RReLU) and module.training
    if isinstance(module, _DropoutNd) and not random:
        return []
    if type(module) not in _ACTIVATIONS or random or module.state_dict():
        raise NotImplementedError(f"{type(module).__name__} may mix units.")
    return [module]


class _Units(NamedTuple):
    """The units of a layer, sorted by the stage in which they become known."""

    order: Tensor
    cuts: list[int]  # how many are known before each stage

    @classmethod
    def sort(cls, stage: Tensor, count: int) -> _Units:
        ordered, order = stage.sort(stable=True)
        bounds = torch.arange(count + 1, device=stage.device)
        return cls(order, torch.searchsorted(ordered, bounds).tolist())

    def known(self, block: range) -> slice:
        """The units that are known before a block of stages."""
        return slice(0, self.cuts[block.start])

    def new(self, block: range) -> slice:
        """The units of a block of stages."""
        return slice(self.cuts[block.start], self.cuts[block.stop])

    def sizes(self, block: range) -> list[int]:
        """How many units become known in each stage of a block."""
        return [self.cuts[i + 1] - self.cuts[i] for i in block]


def _split(network: nn.Module) -> tuple[list[nn.Module | _Skip], MaskedLinear | None]:
    """Returns the operations of a network, and the layer of its shortcut, if it has one."""
    shortcut = None
    if type(network) is Shortcut and not has_hooks(network):
        (shortcut,) = _operations(network.linear)
        network = network.network
    return _operations(network), shortcut


class Stages:
    """The stages of a masked network: first its context, then its features.

    The features of a stage depend on those of earlier stages alone. Fully autoregressive networks
    have one feature in each stage, a coupling has two stages.

    Args:
        network: A :class:`zuko.nn.MaskedMLP`, with a :class:`~pyro_sinflow.networks.Shortcut` or
            without.
        features: The number of features, which come before the context in the network's input.
        context: The number of context features.
        size: The number of features in a block of stages, unless a single stage has more.

    Raises:
        NotImplementedError: If the network is not made of masked layers and activations alone, or
            takes other inputs.
    """

    def __init__(
        self, network: nn.Module, features: int, context: int = 0, size: int = _SIZE
    ) -> None:
        self.operations, self.shortcut = _split(network)
        if not isinstance(self.operations[-1], MaskedLinear):
            raise NotImplementedError("The last operation should be a masked layer.")
        self.sizes = features, context
        self.linears = [o for o in self.operations if isinstance(o, MaskedLinear)]
        masked = [*self.linears, *([] if self.shortcut is None else [self.shortcut])]
        self.masks = [(layer, layer.mask, version(layer.mask)) for layer in masked]
        if self.linears[0].in_features != features + context:
            raise NotImplementedError(f"{features} features and {context} of a context are given.")
        device = self.linears[0].mask.device

        reach = torch.eye(features + context, dtype=torch.float32, device=device)
        skips: list[Tensor] = []
        for operation in self.operations:
            if isinstance(operation, MaskedLinear):
                reach = (operation.mask.float() @ reach).sign()
            elif isinstance(operation, _Skip):
                if operation.begins:
                    skips.append(reach)
                else:
                    reach = (reach + skips.pop()).sign()
        outputs = len(reach) // features
        needs = reach[:, :features].unflatten(0, (features, -1)).any(dim=1)
        if self.shortcut is not None:
            needs |= self.shortcut.mask[:, :features].bool()
        # A feature is in the stage after the last of those that it depends on.
        level = torch.zeros(features, dtype=torch.long, device=device)
        missing = needs.sum(dim=1)
        self.features = [level[:0]]
        while len(ready := (missing == 0).nonzero().squeeze(1)):
            level[ready] = len(self.features)
            self.features.append(ready)
            missing -= needs[:, ready].sum(dim=1)
            missing[ready] = -1
        if not level.all():
            raise NotImplementedError("The network is not triangular.")
        count = len(self.features)
        self.blocks, total = [range(1)], size  # the context is a block by itself
        for i in range(1, count):
            if total + len(self.features[i]) > size:
                self.blocks.append(range(i, i))
                total = 0
            self.blocks[-1] = range(self.blocks[-1].start, i + 1)
            total += len(self.features[i])

        inputs = stage = F.pad(level, (0, context))
        self.units = []  # inputs and outputs of each layer
        units = _Units.sort(stage, count)
        skipped: list[Tensor] = []
        for operation, following in zip(self.operations, [*self.operations[1:], None], strict=True):
            if isinstance(operation, MaskedLinear):
                if following is None and self.shortcut is not None:
                    # Its inputs are more inputs of the last layer.
                    units = _Units.sort(torch.cat((stage, inputs)), count)
                stage = torch.where(operation.mask.bool(), stage, 0).amax(dim=1)
                if following is None:
                    stage = level.repeat_interleave(outputs)
                elif isinstance(following, _Skip) and not following.begins:
                    branch, stage = stage, skipped.pop()  # sorted like what they are added to
                    if (branch > stage).any():
                        raise NotImplementedError("A residual branch sees more than it adds to.")
                ins, units = units, _Units.sort(stage, count)
                self.units.append((ins, units))
            elif isinstance(operation, _Skip) and operation.begins:
                skipped.append(stage)

    def suit(self, network: nn.Module, *sizes: int) -> bool:
        """Whether network, masks and sizes are still those that the stages were made from."""
        return (self.operations, self.shortcut, self.sizes) == (*_split(network), sizes) and all(
            layer.mask is mask and version(mask) == seen for layer, mask, seen in self.masks
        )

    def weight(self, layer: MaskedLinear) -> Tensor:
        """Returns the weight of a layer, which for the last one is that of the shortcut as well."""
        weight = layer.mask * layer.weight
        if self.shortcut is None or layer is not self.linears[-1]:
            return weight
        short = self.shortcut.mask * self.shortcut.weight
        wide = short.new_zeros(len(weight), short.shape[1])
        wide[:: len(wide) // len(short)] = short
        return torch.cat((weight, wide), dim=1)


class _Part(NamedTuple):
    """A layer, as far as a block of stages is concerned; lists hold an item for each stage."""

    base: tuple[Tensor, ...]  # of the new outputs, what inputs from before the block contribute
    weight: tuple[Tensor, ...]  # from the new inputs to the new outputs
    inputs: Tensor  # the new ones, zero until they are known
    slots: tuple[Tensor, ...]  # the same memory, for each stage to fill

    def outputs(self, stage: int) -> Tensor:
        """Returns the outputs of a stage, once: it adds to the base."""
        return self.base[stage].addmm_(self.weight[stage], self.inputs)


class Evaluation:
    """An evaluation of a network, stage after stage, with the weights that it has now.

    Units come first here, and rows of the batch last, so that the units of a stage are contiguous.
    What is known before a block of stages contributes to all of the block by one matrix product, so
    that the products of a single stage are small.

    Args:
        stages: The stages of the network.
        context: The context, with shape :math:`(C, N)`.
    """

    def __init__(self, stages: Stages, context: Tensor) -> None:
        self.hidden = stages.operations[:-1]
        self.shortcut = stages.shortcut is not None
        self.layers = []
        for layer, (ins, outs) in zip(stages.linears, stages.units, strict=True):
            weight = stages.weight(layer)[outs.order].index_select(1, ins.order)
            bias = torch.zeros_like(weight[:, 0]) if layer.bias is None else layer.bias[outs.order]
            inputs = context.new_zeros(len(ins.order), context.shape[1])
            self.layers.append((weight, bias.unsqueeze(1), ins, outs, inputs))
        self.begin(range(1))
        self.commit(0, context)

    def begin(self, block: range) -> None:
        """Begins a block of stages, once all stages before it are committed."""
        self.start = block.start
        self.parts = []
        for weight, bias, ins, outs, inputs in self.layers:
            rows, old, new = weight[outs.new(block)], ins.known(block), ins.new(block)
            base = torch.addmm(bias[outs.new(block)], rows[:, old], inputs[old])
            sizes = outs.sizes(block)
            self.parts.append(
                _Part(
                    base.split(sizes),
                    rows[:, new].split(sizes),
                    inputs[new],
                    inputs[new].split(ins.sizes(block)),
                )
            )

    def outputs(self, stage: int) -> Tensor:
        """Returns the network's outputs for the features of a stage, with shape (outputs, N).

        Once for each stage: it adds to what the block has begun with.
        """
        return self.parts[-1].outputs(stage - self.start)

    def commit(self, stage: int, x: Tensor) -> None:
        """Takes the features of a stage, with shape (size, N), to the units that they complete."""
        stage -= self.start
        parts = iter(self.parts)
        features, skipped = x, []
        for operation in self.hidden:
            if isinstance(operation, MaskedLinear):
                part = next(parts)
                part.slots[stage].copy_(x)
                x = part.outputs(stage)
            elif isinstance(operation, _Skip):
                if operation.begins:
                    skipped.append(x)
                else:
                    x = x + skipped.pop()
            else:
                x = operation(x)
        last = next(parts).slots[stage]
        if self.shortcut:
            torch.cat((x, features), out=last)
        else:
            last.copy_(x)


_stages: WeakKeyDictionary[nn.Module, Stages] = WeakKeyDictionary()


def _stages_of(network: nn.Module, *sizes: int) -> Stages:
    """Returns the stages of a network, made anew when its masks have changed."""
    stages = _stages.get(network)
    if stages is None or not stages.suit(network, *sizes):
        stages = _stages[network] = Stages(network, *sizes)
    return stages


def substitute(
    network: nn.Module | None,
    univariate: Callable[..., Transform],
    shapes: Sequence[Sequence[int]],
    c: Tensor | None,
    event_dim: int,
    y: Tensor,
) -> Tensor | None:
    r"""Inverts a triangular map whose parameters come from a masked network.

    Args:
        network: The network, which sees features and context side by side.
        univariate: The constructor of :math:`\tau`.
        shapes: The shapes of its arguments, for one feature.
        c: The context, with shape :math:`(*, C)`, if there is one.
        event_dim: The number of dimensions of an event.
        y: The values to invert.

    Returns:
        The root, or :py:`None` where passes through the whole network are faster, or where the
        network is not one that can be evaluated in stages.
    """
    if network is None or y.device.type != "cpu" or autocasting(y):
        return None
    event, batch = y.shape[y.ndim - event_dim :], y.shape[: y.ndim - event_dim]
    if c is not None:
        batch = torch.broadcast_shapes(batch, c.shape[:-1])
    features, rows = event.numel(), batch.numel()
    if rows < 2 * _LEAST:  # the stages are at least two, and cost time to find
        return None
    try:
        stages = _stages_of(network, features, 0 if c is None else c.shape[-1])
    except NotImplementedError:
        return None
    least = min(_LEAST * len(stages.features), _ENOUGH)
    if rows < least or stages.linears[0].weight.dtype != y.dtype:
        return None

    y = y.expand(batch + event).reshape(rows, features).t()
    context = y[:0] if c is None else c.to(y.dtype).expand(*batch, -1).reshape(rows, -1).t()
    evaluation = Evaluation(stages, context)
    order = torch.cat(stages.features)
    roots = []

    targets = iter(y[order].t().split([len(f) for f in stages.features[1:]], dim=1))
    for block in stages.blocks[1:]:
        evaluation.begin(block)
        for stage in block:
            target = next(targets)
            h = evaluation.outputs(stage).view(target.shape[1], -1, rows).permute(2, 0, 1)
            # The same for scalars, in one call: this is where small operations add up.
            parameters = unpack(h, shapes) if any(shapes) else h.unbind(-1)
            root = univariate(*parameters).inv(target).t()
            evaluation.commit(stage, root)
            roots.append(root)

    x = y.new_empty(features, rows).index_copy_(0, order, torch.cat(roots))
    return solved(x.t()).reshape(batch + event)
