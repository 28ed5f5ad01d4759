r"""A linear transform, as the product of two triangular matrices."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from . import _validate as check
from ._torch import without_autocast
from .bijection import Bijection, at_least_float32

_FULL_RATE = 64  # features, beyond which parameters are scaled down


class Linear(Bijection):
    r"""Creates a linear transformation.

    .. math:: f(x) = L U x

    L is lower triangular with ones on its diagonal. U is upper triangular, and its diagonal lies
    between 1/1000 and 1000, so that the inverse always exists.

    References:
        | Neural Spline Flows (Durkan et al., 2019), Section 3.2
        | https://arxiv.org/abs/1906.04032

    Args:
        matrix: The unconstrained parameters, with shape :math:`(D, D)`: below its diagonal L, above
            it U, and on it the logarithms of the diagonal of U. Zeros make the identity. For more
            than 64 features, they are multiplied by 64 / D: an optimizer such as Adam moves each
            parameter by about the learning rate, so that a step would move the sum of many far.
    """

    _event_dim = 1

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()

        self.matrix = matrix
        self._event_shape = Size(matrix.shape[-1:])

    def __repr__(self) -> str:
        return f"Linear(features: {self.matrix.shape[-1]})"

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns L without its diagonal, U, and the logarithms of the diagonal of U."""
        # At each use: stored values would be out of date after a step of the optimizer, and their
        # graph freed by the first backward pass.
        matrix = at_least_float32(self.matrix)
        if len(matrix) > _FULL_RATE:
            matrix = matrix * (_FULL_RATE / len(matrix))
        diagonal = matrix.diagonal()
        log_diagonal = diagonal / (1 + diagonal.abs() / math.log(1e3))
        upper = matrix.triu(1) + log_diagonal.exp().diag_embed()
        return matrix.tril(-1), upper, log_diagonal

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check.dtype("x", x, self.matrix.dtype)
        lower, upper, log_diagonal = self._factors()
        with without_autocast(x):  # the inverse has the precision of x, and so has its residual
            y = _product(upper, x)
            return y + _product(lower, y), log_diagonal.sum().expand(x.shape[:-1])

    def _inverse(self, y: Tensor) -> Tensor:
        check.dtype("y", y, self.matrix.dtype)
        lower, upper, _ = self._factors()
        rows = y.reshape(-1, y.shape[-1])
        rows = torch.linalg.solve_triangular(
            lower.mT, rows, upper=True, left=False, unitriangular=True
        )
        rows = torch.linalg.solve_triangular(upper.mT, rows, upper=False, left=False)
        return rows.reshape(y.shape)


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiplies vectors, with shape (*, D), by a matrix."""
    # For a single vector, only 'mv' supports batched forward-mode differentiation in torch.
    return torch.mv(matrix, x) if x.ndim == 1 else F.linear(x, matrix)
