r"""Masked convolutions, which map images and a context to the parameters of triangular maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zuko.nn import Residual
from zuko.utils import broadcast

from . import _validate as check
from ._torch import can_branch_on
from .masks import check_order
from .networks import check_activation, check_context, check_element_wise


class MaskedConv2d(nn.Conv2d):
    r"""Creates a convolution whose units depend only on earlier features in raster order.

    Each unit has a limit: the last position that it may depend on, relative to its own pixel, as a
    row, and a column times the number of channels plus a channel. A weight is kept if the limit of
    its input, moved by the offset of the weight in the kernel, is not after that of its output.

    Args:
        before: The limits of the inputs, with shape :math:`(I, 2)`.
        after: The limits of the outputs, with shape :math:`(O, 2)`.
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
        return F.conv2d(x, self.mask * self.weight, self.bias, padding=self.padding)


def _take_order(network: PixelCNN, _: Any) -> None:
    """Takes the order of the features from the state, which may be loaded from another network."""
    if can_branch_on(network.reverse):
        network.mirrored = bool(network.reverse)


class PixelCNN(nn.Module):
    r"""Creates a convolutional network :math:`h_i(x_{<i}, c)` for images.

    Features are in raster order: pixel by pixel, and channel by channel within a pixel. Some hidden
    maps depend on the rows above a pixel only, the others also on the pixels to its left, so that
    there is no blind spot: after n convolutions with a kernel of size k, a feature depends on all
    earlier pixels within :math:`n \lfloor k / 2 \rfloor` rows and columns. With m hidden sizes
    there are :math:`m + 1` convolutions, or :math:`2m + 2` with residual blocks of equal size.

    References:
        | Conditional Image Generation with PixelCNN Decoders (van den Oord et al., 2016)
        | https://arxiv.org/abs/1606.05328

    Args:
        features: The shape of an image, :math:`(C, H, W)`.
        context: The number of context features.
        outputs: The number of outputs for each feature.
        order: The rank of each feature: ascending for raster order, or descending for the reverse.
            If :py:`None`, ascending.
        hidden_features: The numbers of hidden maps, each greater than the number of channels. With
            ``residual``, each is the size of a residual block. The paper uses (16, 16) for MNIST
            and CIFAR-10.
        activation: The activation function constructor. If :py:`None`, :class:`torch.nn.ReLU`.
        residual: Whether to use residual blocks or not.
        dropout: The probability, in :math:`[0, 1)`, that a hidden unit is dropped in training.
        kernel_size: The height and width of the kernels, an odd number of at least 3.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``features`` does not have three dimensions, a size is too small,
            ``kernel_size`` is even, ``order`` is neither ascending nor descending, or
            ``activation`` is not element-wise.

    Example:
        >>> network = PixelCNN((3, 8, 8), context=2, outputs=4)
        >>> network(torch.randn(5, 3, 8, 8), torch.randn(2)).shape
        torch.Size([5, 3, 8, 8, 4])
        >>> flow = SinusoidalFlow((3, 8, 8), network=PixelCNN, hidden_features=(16, 16))
        >>> flow().sample((5,)).shape
        torch.Size([5, 3, 8, 8])
    """

    reverse: Tensor

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

        self.features = check.sizes("features", features)
        if len(self.features) != 3:
            raise ValueError(
                f"'features' should be channels, height and width, got {tuple(self.features)}."
            )
        channels = self.features[0]
        self.context = check.size("context", context, minimum=0)
        self.outputs = check.size("outputs", outputs)
        hidden = check.shape("hidden_features", hidden_features, minimum=channels + 1)
        check.flag("residual", residual)
        if check.size("kernel_size", kernel_size, minimum=3) % 2 == 0:
            raise ValueError(f"'kernel_size' should be odd, got {kernel_size}.")
        rank = check_order(order, self.features).tolist()
        self.mirrored = rank != sorted(rank)
        if self.mirrored and rank != sorted(rank, reverse=True):
            raise ValueError(
                "'order' should be ascending or descending for a PixelCNN, without 'randperm', got "
                f"{', '.join(map(str, rank[:4]))}, ..."
            )
        # Saved with the weights, which belong to one of the orders. A float can be averaged.
        self.register_buffer("reverse", torch.tensor(float(self.mirrored)))
        self.register_load_state_dict_post_hook(_take_order)
        activate = check_activation(activation, dropout)
        layers = self._layers(hidden, activate, residual, kernel_size)
        self.first, *rest = layers
        self.rest = nn.Sequential(*rest)
        if self.context > 0:
            width = [*hidden, channels * self.outputs][0]
            self.inject = nn.Linear(self.context, width, bias=False)
        self.bias = nn.Parameter(torch.zeros(*self.features, self.outputs))

    def _layers(
        self,
        hidden: Sequence[int],
        activate: Callable[[], nn.Module],
        residual: bool,
        kernel_size: int,
    ) -> list[nn.Module]:
        channels, *size = self.features

        convolve = partial(MaskedConv2d, channels=channels, kernel_size=kernel_size)

        def activation(maps: int) -> nn.Module:
            module = activate()
            check_element_wise(module, [maps, *size])
            return module

        pixel = torch.tensor([[0.0, c] for c in range(channels)])
        seen = pixel - torch.tensor([0.0, 1.0])  # up to the previous channel
        above = torch.tensor([[-1.0, math.inf]])  # up to the end of the row above
        kinds = torch.cat((above, seen))

        layers: list[nn.Module] = []
        before = pixel
        for maps in hidden:
            after = kinds[torch.arange(maps) % len(kinds)]
            if not residual or len(before) != maps or not layers:
                layers.append(convolve(before, after))
            layers.append(
                Residual(convolve(after, after), activation(maps), convolve(after, after))
                if residual
                else activation(maps)
            )
            before = after
        layers.append(convolve(before, seen.repeat_interleave(self.outputs, dim=0), bias=False))
        return layers

    def set_bias(self, bias: Tensor) -> None:
        """Sets the bias of the outputs.

        Args:
            bias: The bias, with as many elements as there are outputs, features in raster order.
        """
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
            ValueError: If the shape of x or c is wrong, c is missing, or c is given to a network
                without context features.
            TypeError: If x or c has the wrong dtype.
        """
        check.event("x", x, self.features)
        check.dtype("x", x, self.bias.dtype)
        check_context(c, self.context, self.bias.dtype)

        if c is not None:
            check.broadcast(x=x.shape[:-3], context=c.shape[:-1])
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
