r"""Forward substitution: the inverse of a map whose parameters a masked network computes.

To invert :math:`y_i = \tau(x_i; h_i(x_{<i}))`, features are computed one after the other, like the
unknowns of a triangular system of equations. A hidden unit is computed once, as soon as the
features that it depends on are known. An inverse therefore evaluates the network once, in as many
stages as there are features.
"""

from __future__ import annotations

from functools import cached_property
from operator import is_
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from zuko.nn import MaskedLinear, MaskedMLP, Residual

from ._torch import ELEMENT_WISE, is_dropout, plain_modules, versions
from .kernels import ACTIVATIONS, Schedule
from .masks import feature_ranks
from .networks import MaskedNetwork

_SIZE = 16  # features in a block; a block has more if a single stage has more
_KINDS = (MaskedNetwork, MaskedLinear, MaskedMLP, Residual, nn.Sequential)
_FORWARD = [(kind, kind.forward) for kind in _KINDS]


class _Skip(NamedTuple):
    """The beginning or the end of a residual connection."""

    begins: bool


Operation = nn.Module | _Skip


def operations(module: nn.Module) -> list[Operation]:
    """Returns the operations of a network in order.

    Raises:
        NotImplementedError: If the network has parts other than masked layers, residual connections
            and element-wise activations.
    """
    kind = type(module)
    if kind is MaskedLinear:
        return [module]
    if kind in (nn.Sequential, MaskedMLP, Residual):
        flat = [operation for child in module.children() for operation in operations(child)]
        return [_Skip(True), *flat, _Skip(False)] if kind is Residual else flat
    if is_dropout(module):  # in evaluation mode
        return []
    if kind not in ELEMENT_WISE or module.state_dict():
        raise NotImplementedError(f"{kind.__name__} may mix units.")
    return [module]


class _Units(NamedTuple):
    """The units of a layer, sorted by the stage in which they are computed."""

    order: Tensor
    cuts: list[int]  # the number of units computed before each stage

    sizes: list[int]  # the number of units computed in each stage

    @classmethod
    def sort(cls, stage: Tensor, count: int) -> _Units:
        ordered, order = stage.sort(stable=True)
        bounds = torch.arange(count + 1, device=stage.device)
        cuts = torch.searchsorted(ordered, bounds)
        return cls(order, cuts.tolist(), cuts.diff().tolist())


class Stages:
    """The stages in which a masked network can be evaluated.

    The first stage holds the units that depend on no feature. The features of each later stage
    depend only on features of earlier stages. A fully autoregressive network has one feature in
    each stage; a coupling has two stages of features.

    Args:
        network: A :class:`zuko.nn.MaskedMLP` or :class:`~pyro_sinflow.MaskedNetwork`.
        features: The number of features, which come before the context in the network's input.
        size: The number of features in a block of stages. A block has more if a single stage has.

    Raises:
        NotImplementedError: If the network has other parts than masked layers, activations,
            residual connections and dropout, or is not triangular.
    """

    def __init__(self, network: nn.Module, features: int, size: int = _SIZE) -> None:
        self.modules = plain_modules(network)
        self.features = features
        mlp = network.mlp if type(network) is MaskedNetwork else network
        if mlp is None or self.modules is None:
            raise NotImplementedError("The network has no layers, or hooks that may change them.")
        self.operations = operations(mlp)
        if not isinstance(self.operations[-1], MaskedLinear):
            raise NotImplementedError("The last operation should be a masked layer.")
        self.linears = [o for o in self.operations if isinstance(o, MaskedLinear)]
        self.masks = [layer.mask for layer in self.linears]
        self.versions = versions(*self.masks)
        # A product with a boolean mask is several times slower.
        self.factors = [layer.mask.to(layer.weight.dtype) for layer in self.linears]
        if self.linears[0].in_features < features:
            raise NotImplementedError(f"The network has fewer inputs than {features} features.")
        rank = feature_ranks(mlp, self.linears[0].in_features, features)
        if (rank == features).any():
            raise NotImplementedError("The network is not triangular.")
        self.stages = [(rank == i).nonzero().squeeze(1) for i in range(-1, int(rank.max()) + 1)]
        self._sort(rank + 1)
        self.blocks, total = [range(1)], size
        for i in range(1, len(self.stages)):
            if total + len(self.stages[i]) > size:
                self.blocks.append(range(i, i))
                total = 0
            self.blocks[-1] = range(self.blocks[-1].start, i + 1)
            total += len(self.stages[i])

    @cached_property
    def schedule(self) -> Schedule | None:
        """What the kernel of forward substitution needs to know of the network.

        :py:`None` if the kernel does not support it, or if there are few stages of many features,
        as in a coupling, where passes are faster.
        """
        layers, activations = self.operations[::2], self.operations[1::2]
        names = {type(a).__name__ for a in activations}
        alternate = layers == self.linears and len(names) <= 1 and names <= {*ACTIVATIONS}
        if not alternate or self.features > 2 * (len(self.stages) - 1):
            return None
        if any(getattr(a, "alpha", 1.0) != 1.0 for a in activations):
            return None
        stages = [i for i, stage in enumerate(self.stages) for _ in stage]
        known, places = [], []
        at_input = at_weight = at_bias = 0
        for layer, (inputs, _) in zip(self.linears, self.units, strict=True):
            known.append([inputs.cuts[i] for i in stages])
            size, units = len(inputs.order), layer.out_features
            places.append([size, at_input, at_weight, at_bias])
            at_input, at_bias = at_input + size, at_bias + units
            at_weight += size * units
        device = self.masks[0].device
        return Schedule(
            next(iter(names), "ReLU"),
            torch.tensor(known, dtype=torch.int32, device=device),
            torch.tensor(places, device=device),
        )

    def _sort(self, level: Tensor) -> None:
        """Sorts inputs and outputs of each layer by the stage in which they are computed."""
        count, stage = len(self.stages), level
        self.units: list[tuple[_Units, _Units]] = []
        units = _Units.sort(stage, count)
        skipped: list[Tensor] = []
        for operation, following in zip(self.operations, [*self.operations[1:], None], strict=True):
            if isinstance(operation, MaskedLinear):
                mask = operation.mask[:, : len(stage)].bool()  # without the context
                stage = torch.where(mask, stage, 0).amax(dim=1)
                if following is None:
                    stage = level.repeat_interleave(len(mask) // self.features)
                elif isinstance(following, _Skip) and not following.begins:
                    branch, stage = stage, skipped.pop()  # in the order of the sum
                    if bool((branch > stage).any()):
                        raise NotImplementedError("A residual branch sees later features.")
                inputs, units = units, _Units.sort(stage, count)
                self.units.append((inputs, units))
            elif isinstance(operation, _Skip) and operation.begins:
                skipped.append(stage)

    def suit(self, network: nn.Module, features: int) -> bool:
        """Whether the network is still the one that these stages were built from."""
        if self.features != features or self.modules != plain_modules(network):
            return False
        for kind, forward in _FORWARD:
            if kind.forward is not forward:
                return False
        masks = [layer.mask for layer in self.linears]
        return all(map(is_, masks, self.masks)) and versions(*masks) == self.versions


_stages: WeakKeyDictionary[nn.Module, Stages] = WeakKeyDictionary()


def stages_of(network: nn.Module, features: int) -> Stages | None:
    """Returns the stages of a network, or :py:`None` if it cannot be evaluated in stages.

    They are built again if the masks or modules of the network have changed.
    """
    stages = _stages.get(network)
    if stages is None or not stages.suit(network, features):
        try:
            stages = _stages[network] = Stages(network, features)
        except NotImplementedError:
            return None
    return stages


def frozen_weights(stages: Stages, c: Tensor | None, ordered: bool) -> list[tuple[Tensor, Tensor]]:
    """Returns weights, with shape (O, I), and biases, (O, N) or (O, 1), of a network's layers.

    They have the current values and no graph. The context, with shape (N, C) or (1, C), is added to
    the biases. If ``ordered``, units are in the order in which stages compute them.
    """
    layers, n = [], stages.features
    for layer, factor, (inputs, outputs) in zip(
        stages.linears, stages.factors, stages.units, strict=True
    ):
        weight = factor.to(layer.weight.dtype) * layer.weight.detach()
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
        bias = bias.unsqueeze(1)
        if layer is stages.linears[0] and c is not None:
            bias = torch.addmm(bias, weight[:, n:], c.t())
            weight = weight[:, :n]
        if ordered:
            weight, bias = weight[outputs.order].index_select(1, inputs.order), bias[outputs.order]
        layers.append((weight, bias))
    return layers


class WholeEvaluation:
    """Evaluates a whole network at once, with its current weights and without a graph."""

    def __init__(self, stages: Stages, c: Tensor | None) -> None:
        self.operations = stages.operations
        self.layers = [(w.t(), b.t()) for w, b in frozen_weights(stages, c, ordered=False)]

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the outputs, with shape (N, outputs), at x, with shape (N, D)."""
        layers = iter(self.layers)
        skipped = []
        for operation in self.operations:
            if isinstance(operation, MaskedLinear):
                weight, bias = next(layers)
                x = torch.addmm(bias, x, weight)
            elif isinstance(operation, _Skip):
                if operation.begins:
                    skipped.append(x)
                else:
                    x = x + skipped.pop()
            else:
                x = operation.forward(x)
        return x


class StagedEvaluation:
    """Evaluates a network stage by stage, with its current weights and without a graph.

    Tensors have units first and rows of the batch last, so that the units of a stage are
    contiguous. The units before a block of stages contribute to the whole block by one matrix
    product, so that the products of a single stage are small.
    """

    def __init__(self, stages: Stages, c: Tensor | None, rows: int) -> None:
        self.hidden = stages.operations[:-1]
        self.layers = []
        for (weight, bias), units in zip(
            frozen_weights(stages, c, ordered=True), stages.units, strict=True
        ):
            known = weight.new_zeros(weight.shape[1], rows)
            self.layers.append((weight, bias, *units, known))
        self.blocks = iter(stages.blocks)
        self._begin(next(self.blocks))

    def _begin(self, block: range) -> None:
        """Begins a block of stages, after the units of all earlier stages have been computed."""
        self.stage, self.size = 0, len(block)
        self.parts = []
        within = slice(block.start, block.stop)
        for weight, bias, inputs, outputs, known in self.layers:
            before, until = inputs.cuts[block.start], inputs.cuts[block.stop]
            new = slice(outputs.cuts[block.start], outputs.cuts[block.stop])
            rows, sizes = weight[new], outputs.sizes[within]
            base = torch.addmm(bias[new], rows[:, :before], known[:before])
            current = known[before:until]
            slots = current.split(inputs.sizes[within])
            self.parts.append(
                (base.split(sizes), rows[:, before:until].split(sizes), current, slots)
            )

    def advance(self, x: Tensor) -> Tensor:
        """Takes the features of a stage, and returns the outputs for the features of the next.

        Shapes are (features, N), with no features in the first call, and (outputs, N).
        """
        stage = self.stage
        parts = iter(self.parts)
        skipped = []
        for operation in self.hidden:
            if isinstance(operation, MaskedLinear):
                base, weight, known, slots = next(parts)
                slots[stage].copy_(x)
                x = base[stage].addmm_(weight[stage], known)
            elif isinstance(operation, _Skip):
                if operation.begins:
                    skipped.append(x)
                else:
                    x = x + skipped.pop()
            else:
                x = operation(x)
        *_, slots = next(parts)
        slots[stage].copy_(x)
        self.stage += 1
        if self.stage == self.size:
            self._begin(next(self.blocks))
        base, weight, known, _ = self.parts[-1]
        return base[self.stage].addmm_(weight[self.stage], known)
