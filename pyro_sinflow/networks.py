r"""Networks that map features, and a context, to the parameters of triangular maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from zuko.nn import MaskedLinear, MaskedMLP, Residual
from zuko.utils import broadcast

from ._checks import (
    check_callable,
    check_dtype,
    check_event,
    check_flag,
    check_real,
    check_shape,
    check_size,
    check_sizes,
    check_tensor,
)


def check_context(c: Tensor | None, context: int, dtype: torch.dtype) -> None:
    """Requires a context tensor where there are context features, and none where there are none."""
    if context == 0:
        if c is not None:
            raise ValueError("The context should be None, as there are no context features.")
    elif c is None:
        raise ValueError(f"The context should be a tensor of shape (*, {context}), got None.")
    else:
        check_tensor("context", c)
        check_event("context", c, Size([context]))
        check_dtype("context", c, dtype)


def check_order(order: Sequence[int] | Tensor | None, features: Size) -> Tensor:
    """Requires a permutation of the features, and returns it."""
    n = features.numel()
    if order is None:
        return torch.arange(n)
    ranks = torch.as_tensor(order).flatten()
    if ranks.is_floating_point() or ranks.dtype == torch.bool or len(ranks) != n:
        raise ValueError(f"'order' should hold {n} integers, got {order}.")
    if sorted(ranks.tolist()) != list(range(n)):
        raise ValueError(f"'order' should be a permutation of 0, ..., {n - 1}, got {order}.")
    return ranks.long()


def check_activation(
    activation: Callable[[], nn.Module] | None, dropout: float
) -> Callable[[], nn.Module]:
    """Requires the constructor of a module, or None for that of rectifiers, and a probability.

    Returns:
        The constructor of the activation, which dropout follows unless its probability is zero.
    """
    check_real("dropout", dropout, 0.0, 1.0, closed=True)
    if isinstance(activation, nn.Module):  # which can be called, but not for this
        raise TypeError(
            f"'activation' should be a constructor, such as torch.nn.ReLU, got {activation}."
        )
    make = nn.ReLU if activation is None else check_callable("activation", activation)
    return make if dropout == 0 else lambda: nn.Sequential(make(), nn.Dropout(dropout))


class Shortcut(nn.Module):
    r"""Adds a linear map of the inputs to the first of every n outputs of a network.

    Rectifiers take many steps to agree on a linear map. With one of its own, a flow has learned the
    correlations of its features within a few, and its networks are free for the rest. Where
    gradients are noisy, as those of an ELBO of few particles are, it passes the noise on.

    Args:
        network: The network.
        linear: The linear map, with one output for every n of the network. The larger its mask,
            the faster it learns.
    """

    def __init__(self, network: nn.Module, linear: MaskedLinear) -> None:
        super().__init__()

        self.network = network
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """Returns the sum."""
        y, h = self.linear(x), self.network(x)
        if y.shape == h.shape:
            return h + y
        first, others = h.unflatten(-1, (y.shape[-1], -1)).tensor_split((1,), dim=-1)
        return torch.cat((first + y.unsqueeze(-1), others), dim=-1).flatten(-2)

    def preconditioner(self) -> Tensor:
        """Returns Q, such that I + Q inverts x plus the linear map of x.

        It is as triangular as the mask: a linear map of features in this order would be inverted in
        one pass.
        """
        n = self.linear.out_features
        mask, weight = self.linear.mask[:, :n], self.linear.weight[:, :n]
        order = mask.sum(dim=1).argsort()  # by the number of features that come before
        w = (mask * weight)[order][:, order].to(torch.promote_types(weight.dtype, torch.float32))
        q = torch.linalg.solve_triangular(w, -w, upper=False, unitriangular=True)
        back = order.argsort()
        return q[back][:, back]


class MaskedNetwork(nn.Module):
    r"""Creates a network :math:`h_i(x_{<i}, c)`.

    It is :class:`zuko.nn.MaskedMLP` over events of any shape and a context, perhaps with a
    :class:`~pyro_sinflow.networks.Shortcut` to the first output of each feature, its shift.

    Args:
        features: The shape of an event.
        context: The number of context features.
        outputs: The number of outputs for each feature.
        order: The rank of each feature. If :py:`None`, features are in ascending order.
        hidden_features: The numbers of hidden features.
        activation: The activation function constructor. If :py:`None`, :class:`torch.nn.ReLU`.
        residual: Whether to use residual blocks or not.
        dropout: The probability that a hidden unit is dropped in training.
        shortcut: How many times faster than other weights the
            :class:`~pyro_sinflow.networks.Shortcut` learns, by an optimiser that moves each by
            about the learning rate, as Adam does. 0 for no shortcut.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size is not positive, ``order`` no permutation, or a number out of range.

    Example:
        >>> network = MaskedNetwork((3,), context=2, outputs=4)
        >>> network(torch.randn(5, 3), torch.randn(2)).shape
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
        shortcut: float = 0.0,
    ) -> None:
        super().__init__()

        self.features = check_sizes("features", features)
        self.context = check_size("context", context, minimum=0)
        self.outputs = check_size("outputs", outputs)
        sizes = check_shape("hidden_features", hidden_features)
        hidden = [check_size("hidden_features", h) for h in sizes]
        check_flag("residual", residual)
        check_real("shortcut", shortcut, 0.0, math.inf, closed=True)
        rank = check_order(order, self.features)
        activate = check_activation(activation, dropout)

        adjacency = rank[:, None] > rank
        adjacency = torch.cat(
            (adjacency, torch.ones(len(rank), self.context, dtype=torch.bool)), dim=1
        )
        if adjacency.any():
            mlp = MaskedMLP(
                adjacency.repeat_interleave(self.outputs, dim=0),
                hidden_features=hidden,
                activation=activate,
                residual=residual,
            )
            self.network: nn.Module | None = mlp
            if shortcut and hidden:
                linear = MaskedLinear(adjacency, bias=False)
                nn.init.zeros_(linear.weight)
                self.network = Shortcut(mlp, linear)
            for layer in self.network.modules():
                if isinstance(layer, MaskedLinear):
                    # A product with booleans is several times slower.
                    layer.mask = layer.mask.to(layer.weight.dtype)
            if isinstance(self.network, Shortcut):
                self.network.linear.mask *= shortcut
        else:  # one feature without a context: nothing to depend on
            self.network = None
            self.constant = nn.Parameter(torch.zeros(self.outputs))

    @property
    def bias(self) -> Tensor:
        """The bias of the last layer."""
        if self.network is None:
            return self.constant
        mlp: Any = self.network.network if isinstance(self.network, Shortcut) else self.network
        return mlp[-1].bias

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
            ValueError: If the shape of x or c is wrong, or c is missing or superfluous.
            TypeError: If x or c has the wrong dtype.
        """
        dtype = next(self.parameters()).dtype
        check_event("x", x, self.features)
        check_dtype("x", x, dtype)
        check_context(c, self.context, dtype)

        if self.network is None:
            return self.bias.to(x.dtype).expand(*x.shape, self.outputs)
        flat = x.flatten(x.ndim - len(self.features))
        if c is not None:
            flat = torch.cat(broadcast(flat, c, ignore=1), dim=-1)
        h = self.network(flat.to(dtype))
        return h.to(x.dtype).reshape(*h.shape[:-1], *self.features, self.outputs)


class MaskedConv2d(nn.Conv2d):
    r"""Creates a convolution whose units see what comes before them in the raster order.

    Each unit of a layer is described by the last position that it may see, relative to its own
    pixel: a row, and a column times the number of channels plus a channel. A unit feeds another
    where, at the offset of the kernel between them, its last position is not after that of the
    other.

    Args:
        before: The positions of the inputs, with shape :math:`(I, 2)`.
        after: The positions of the outputs, with shape :math:`(O, 2)`.
        channels: The number of channels of the image.
        kernel_size: The height and width of the kernel.
        bias: Whether there is a bias or not.
    """

    mask: Tensor

    def __init__(
        self, before: Tensor, after: Tensor, channels: int, kernel_size: int, bias: bool = True
    ) -> None:
        super().__init__(len(before), len(after), kernel_size, padding=kernel_size // 2, bias=bias)
        offset = torch.arange(kernel_size) - kernel_size // 2
        row = before[:, 0, None, None] + offset[:, None]
        column = before[:, 1, None, None] + offset * channels
        last_row, last_column = after[:, :, None, None, None].unbind(1)
        mask = (row < last_row) | (row == last_row) & (column <= last_column)
        self.register_buffer("mask", mask.to(self.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the convolution of x, with shape :math:`(N, I, H, W)`."""
        return self._conv_forward(x, self.mask * self.weight, self.bias)


class PixelCNN(nn.Module):
    r"""Creates a convolutional network :math:`h_i(x_{<i}, c)` for images.

    Features are in raster order: pixel by pixel, and within a pixel channel by channel. Some of the
    hidden maps see all of the rows above a pixel, the others the pixels to its left as well, so
    that there is no blind spot: after n convolutions with a kernel of size k, a feature depends on
    the pixels before it within :math:`n \lfloor k / 2 \rfloor` rows and columns. There are as many
    convolutions as hidden sizes and one, or twice as many as hidden sizes and two with residual
    blocks of equal size.

    References:
        | Conditional Image Generation with PixelCNN Decoders (van den Oord et al., 2016)
        | https://arxiv.org/abs/1606.05328

    Args:
        features: The shape of an image, :math:`(C, H, W)`.
        context: The number of context features.
        outputs: The number of outputs for each feature.
        order: The rank of each feature: ascending for the raster order, descending for its mirror
            image. If :py:`None`, ascending.
        hidden_features: The numbers of hidden maps, each greater than that of channels. With
            ``residual``, each stands for a residual block: (16, 16) is what the paper has for
            MNIST and CIFAR-10.
        activation: The activation function constructor. If :py:`None`, :class:`torch.nn.ReLU`.
        residual: Whether to use residual blocks or not.
        dropout: The probability that a hidden unit is dropped in training.
        kernel_size: The height and width of the kernels, an odd number.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``features`` is no shape of an image, a size too small, ``kernel_size`` even,
            or ``order`` neither ascending nor descending.

    Example:
        >>> network = PixelCNN((3, 8, 8), context=2, outputs=4)
        >>> network(torch.randn(5, 3, 8, 8), torch.randn(2)).shape
        torch.Size([5, 3, 8, 8, 4])
        >>> flow = SinusoidalFlow((3, 8, 8), network=PixelCNN, hidden_features=(16, 16))
        >>> flow().sample((5,)).shape
        torch.Size([5, 3, 8, 8])
    """

    def __init__(
        self,
        features: Sequence[int],
        context: int = 0,
        outputs: int = 1,
        order: Sequence[int] | Tensor | None = None,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] | None = None,
        residual: bool = False,
        dropout: float = 0.0,
        kernel_size: int = 3,
    ) -> None:
        super().__init__()

        self.features = check_sizes("features", features)
        if len(self.features) != 3:
            raise ValueError(
                f"'features' should be channels, height and width, got {tuple(self.features)}."
            )
        channels = self.features[0]
        self.context = check_size("context", context, minimum=0)
        self.outputs = check_size("outputs", outputs)
        sizes = check_shape("hidden_features", hidden_features)
        hidden = [check_size("hidden_features", h, channels + 1) for h in sizes]
        check_flag("residual", residual)
        if check_size("kernel_size", kernel_size, minimum=3) % 2 == 0:
            raise ValueError(f"'kernel_size' should be odd, got {kernel_size}.")
        rank = check_order(order, self.features).tolist()
        self.mirrored = rank != sorted(rank)
        if self.mirrored and rank != sorted(rank, reverse=True):
            raise ValueError(
                "'order' should be ascending or descending for a PixelCNN, without 'randperm', got "
                f"{', '.join(map(str, rank[:4]))}, ..."
            )
        activate = check_activation(activation, dropout)

        def convolve(before: Tensor, after: Tensor, bias: bool = True) -> MaskedConv2d:
            return MaskedConv2d(before, after, channels, kernel_size, bias)

        pixel = torch.tensor([[0.0, c] for c in range(channels)])
        seen = pixel - torch.tensor([0.0, 1.0])  # up to the channel before
        above = torch.tensor([[-1.0, math.inf]])  # up to the end of the row above
        kinds = torch.cat((above, seen))

        layers: list[nn.Module] = []
        before = pixel
        for size in hidden:
            after = kinds[torch.arange(size) % len(kinds)]
            if not residual or len(before) != size or not layers:
                layers.append(convolve(before, after))
            layers.append(
                Residual(convolve(after, after), activate(), convolve(after, after))
                if residual
                else activate()
            )
            before = after
        layers.append(convolve(before, seen.repeat_interleave(self.outputs, dim=0), bias=False))

        self.first, *rest = layers
        self.rest = nn.Sequential(*rest)
        if self.context > 0:
            width = [*hidden, channels * self.outputs][0]
            self.inject = nn.Linear(self.context, width, bias=False)
        self.bias = nn.Parameter(torch.zeros(*self.features, self.outputs))

    def set_bias(self, bias: Tensor) -> None:
        """Sets the bias of the outputs, as :class:`MaskedNetwork` does."""
        with torch.no_grad():
            self.bias.copy_(bias.view_as(self.bias))

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        r"""Computes the parameters.

        Args:
            x: The images, with shape :math:`(*, C, H, W)`.
            c: The context, with shape :math:`(*, \text{context})`.

        Returns:
            The parameters, with shape :math:`(*, C, H, W, \text{outputs})`.

        Raises:
            ValueError: If the shape of x or c is wrong, or c is missing or superfluous.
            TypeError: If x or c has the wrong dtype.
        """
        check_event("x", x, self.features)
        check_dtype("x", x, self.bias.dtype)
        check_context(c, self.context, self.bias.dtype)

        if c is not None:
            x, c = broadcast(x, c, ignore=(3, 1))
        h = x.reshape(-1, *self.features).to(self.bias.dtype)
        if self.mirrored:
            h = h.flip(1, 2, 3)
        h = self.first(h)
        if c is not None:
            h = h + self.inject(c.reshape(-1, self.context).to(self.bias.dtype))[..., None, None]
        h = self.rest(h).unflatten(1, (-1, self.outputs)).movedim(2, -1)
        if self.mirrored:
            h = h.flip(1, 2, 3)
        return (h + self.bias).to(x.dtype).reshape(*x.shape, self.outputs)
