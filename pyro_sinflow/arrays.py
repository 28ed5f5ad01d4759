"""Array functions whose names or arguments differ between numpy and torch.

The formulas of sinusoids are written once, for arrays of numpy and tensors of torch. A call of
numpy has about a third of the overhead of a call of torch, which matters for small arrays.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Array = Any  # of numpy or torch

_SAME = (
    *("amax", "clip", "concatenate", "cos", "exp", "finfo", "full_like", "hypot", "log", "matmul"),
    *("maximum", "minimum", "sin", "stack", "tanh", "where"),
)


def _numpy_addcmul(x: Any, a: Any, b: Any, value: float = 1.0) -> Any:
    product = a * b
    if value != 1.0:
        product *= value
    product += x
    return product


def _numpy_softmax(x: Any, axis: int) -> Any:
    e = np.exp(x - x.max(axis, keepdims=True))
    e /= e.sum(axis, keepdims=True)
    return e


def _numpy_waves(x: Any, a: Any) -> Any:
    k = a.shape[-2]
    waves = np.empty((*a.shape[:-2], 2 * k, x.shape[-1]), x.dtype)
    p, q = waves[..., :k, :], waves[..., k:, :]
    np.multiply(a, x, out=p)
    np.sin(p, out=q)
    np.cos(p, out=p)
    p *= q
    q *= q
    return waves


def _torch_waves(x: Tensor, a: Tensor) -> Tensor:
    k = a.shape[-2]
    waves = x.new_empty(*a.shape[:-2], 2 * k, x.shape[-1])
    p, q = waves[..., :k, :], waves[..., k:, :]
    # One tangent takes less time than a sine and a cosine. No digits are lost, because no
    # floating-point number is a pole of the tangent.
    torch.mul(a, x, out=q).tan_()
    torch.mul(q, q, out=p).add_(1.0)
    torch.div(q, p, out=p)
    q.mul_(p)
    return waves


def _plain_waves(x: Tensor, a: Tensor) -> Tensor:
    t = a * x
    sine = t.sin()
    return torch.cat((sine * t.cos(), sine * sine), dim=-2)


NUMPY = SimpleNamespace(
    **{name: getattr(np, name) for name in _SAME},
    addcmul=_numpy_addcmul,
    contiguous=np.ascontiguousarray,
    softmax=_numpy_softmax,
    softplus=lambda x: np.logaddexp(x, 0.0),
    waves=_numpy_waves,
)
TORCH = SimpleNamespace(
    **{name: getattr(torch, name) for name in _SAME},
    addcmul=torch.addcmul,
    contiguous=torch.Tensor.contiguous,
    softmax=torch.softmax,
    softplus=F.softplus,
    waves=_torch_waves,  # without a graph
)
PLAIN = SimpleNamespace(**{**vars(TORCH), "waves": _plain_waves})  # differentiable operations
