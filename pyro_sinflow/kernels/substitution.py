"""Forward substitution on a GPU: the inverse of an autoregressive map in one launch of a kernel.

A program computes a block of rows. For each feature in turn, it evaluates the hidden units that
have become known, the parameters of the feature, and the inverse of its affine map and sinusoids. A
masked network is so evaluated once, and not once for each pass.

The import of this module fails if Triton is not installed, or too old.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._torch import can_branch_on
from ..solvers import Root, report
from . import AffineChain, Schedule
from .triton import _constrain, _expm1, _solve, _tanh, chain_constants, solver_constants

_MEMORY = 2**26  # features, units and outputs of all rows of a launch
_UNITS = 8  # units that a program computes at a time
_TILE = 512  # inputs times rows of a step


@triton.jit
def _product(
    weights, unit, unit_ok, inputs, state, row, ok, rows, known,
    units: tl.constexpr, depth: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Returns the product of some rows of a weight matrix with the inputs that are known."""
    total = tl.zeros([units, depth, block], state.dtype.element_ty)
    for begin in range(0, known, depth):
        i = begin + tl.arange(0, depth)
        inside = i < known  # what is not known yet has not been written
        at = weights + unit[:, None] * inputs + i[None, :]
        w = tl.load(at, unit_ok[:, None] & inside[None, :], other=0.0)
        h = tl.load(state + i[:, None] * rows + row[None, :], inside[:, None] & ok, other=0.0)
        total += w[:, :, None] * h[None, :, :]
    return tl.sum(total, axis=1)


@triton.jit
def _activate(h, kind: tl.constexpr):
    if kind == "ReLU":
        return tl.where(h < 0, 0.0, h)  # tl.maximum would drop NaN
    elif kind == "Tanh":  # noqa: RET505 - Triton compiles what follows a return
        return _tanh(h)
    elif kind == "SiLU":
        return h / (1 + tl.exp(-h))
    else:
        return tl.where(h < 0, _expm1(h), h)  # NaN stays NaN


@triton.jit(do_not_specialize=["rows", "features", "layers"])
def _substitute(
    y_in, context_in, weights, biases, known, places, state, parameters, report_out,
    rows, features, layers,
    activation: tl.constexpr, outputs: tl.constexpr, has_context: tl.constexpr,
    log_max: tl.constexpr, m: tl.constexpr, count: tl.constexpr,
    width: tl.constexpr, limit: tl.constexpr, smallest: tl.constexpr, eps: tl.constexpr,
    aim: tl.constexpr, max_iter: tl.constexpr, banach: tl.constexpr, units: tl.constexpr,
    depth: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Computes the features, and for each program the largest error and number of iterations.

    Matrices have a row for each unit, and a column for each row of the batch: the values, the
    bias of the first layer if there is a context, and ``state``, which holds the inputs of all
    layers.
    """
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    ok = (row < rows)[None, :]
    column, column_ok = row[:, None], (row < rows)[:, None]
    size: tl.constexpr = 3 * count + 1
    worst = tl.zeros([block, 1], y_in.dtype.element_ty)
    most = tl.zeros([block, 1], tl.int32)
    for i in range(features):
        for layer in range(layers):
            last = layer + 1 == layers
            inputs = tl.load(places + 4 * layer)
            begin, end = i * outputs, (i + 1) * outputs
            if not last:
                begin = tl.load(known + (layer + 1) * features + i - 1, i > 0, other=0)
                end = tl.load(known + (layer + 1) * features + i)
            for first in range(begin, end, units):
                unit = first + tl.arange(0, units)
                unit_ok = unit < end
                h = _product(
                    weights + tl.load(places + 4 * layer + 2), unit, unit_ok, inputs,
                    state + tl.load(places + 4 * layer + 1) * rows, row, ok, rows,
                    tl.load(known + layer * features + i), units, depth, block,
                )  # fmt: skip
                bias_ok, inside = unit_ok, unit_ok[:, None] & ok
                if has_context:  # the context is part of the first bias
                    bias_ok = unit_ok & (layer > 0)
                bias = biases + tl.load(places + 4 * layer + 3) + unit
                h += tl.load(bias, bias_ok, other=0.0)[:, None]
                if has_context:
                    at = context_in + unit[:, None] * rows + row[None, :]
                    h += tl.load(at, inside & (layer == 0), other=0.0)
                if last:
                    at = parameters + row[None, :] * outputs + (unit - i * outputs)[:, None]
                    tl.store(at, h, inside)
                else:
                    at = state + tl.load(places + 4 * layer + 5) * rows
                    at += unit[:, None] * rows + row[None, :]
                    tl.store(at, _activate(h, activation), inside)
            tl.debug_barrier()  # other threads read what this one has written
        x = tl.load(y_in + i * rows + column, column_ok, other=0.0)
        at = parameters + column * outputs
        for step in range(m):
            _, a, _, _, amplitude, u, v, shift = _constrain(
                at + 2 + (m - 1 - step) * size, column_ok, count, width, limit, smallest, False
            )
            x, error, iterations = _solve(
                x, column_ok, a, amplitude, u, v, shift, eps, aim, max_iter, banach
            )
            worst = tl.maximum(worst, tl.where(column_ok, error, 0.0))
            most = tl.maximum(most, iterations)
        x -= tl.load(at, column_ok, other=0.0)
        if outputs > 1:
            scale = tl.load(at + 1, column_ok, other=0.0)
            x = x / tl.exp(scale / (1 + tl.abs(scale) / log_max))
        tl.store(state + i * rows + column, x, column_ok)
        tl.debug_barrier()
    at = report_out + 2 * tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    tl.store(at, tl.max(worst, axis=0))
    tl.store(at + 1, tl.max(most, axis=0).to(worst.dtype))


def substitute(
    y: Tensor, layers: Sequence[tuple[Tensor, Tensor]], schedule: Schedule, form: AffineChain
) -> Tensor:
    """Returns the root.

    The host waits once to read the number of iterations and the error of sinusoids, so that a
    failure is reported. During the capture of a CUDA graph, it cannot wait.

    Args:
        y: The values to invert, with shape (D, N), features in the order of their computation.
        layers: The weight, with shape (O, I), and the bias, (O, N) or (O, 1), of each layer, units
            in the order of their computation. Only the bias of the first layer may differ between
            rows.
        schedule: When the units of the network are computed.
        form: The element-wise map.

    Warns:
        InversionWarning: If the tolerance of the sinusoids is missed.
    """
    features, rows = y.shape
    weights = torch.cat([weight.flatten() for weight, _ in layers])
    biases = torch.cat([bias[:, 0] for _, bias in layers])
    context = layers[0][1]
    has_context = context.shape[1] > 1
    inputs = sum(weight.shape[1] for weight, _ in layers)
    length = max(1, _MEMORY // (inputs + len(layers[-1][0])))
    block = 16 if rows <= 2048 else 32
    constants = {
        **chain_constants(*form.sinusoids, form.min_slope, y.dtype),
        **solver_constants(form.solver, y.dtype),
        "log_max": form.log_max,
    }
    outputs = len(layers[-1][0]) // features
    roots, reports = [], []
    for begin in range(0, rows, length):
        part = slice(begin, begin + length)
        values = y[:, part].contiguous()
        n = values.shape[1]
        state, parameters = y.new_empty(inputs, n), y.new_empty(n, outputs)
        found = y.new_empty(triton.cdiv(n, block), 2)
        with torch.cuda.device_of(y):
            _substitute[(len(found),)](
                values, context[:, part].contiguous() if has_context else biases, weights, biases,
                schedule.known, schedule.places, state, parameters, found, n, features, len(layers),
                activation=schedule.activation, outputs=outputs, has_context=has_context,
                units=_UNITS, depth=_TILE // block, block=block, **constants,
            )  # fmt: skip
        roots.append(state[:features])
        reports.append(found)
    x = torch.cat(roots, dim=1)
    if form.sinusoids[0] and can_branch_on(y):
        worst, iterations = torch.cat(reports).amax(0).tolist()
        found_roots = form.sinusoids[0] * [Root(x, int(iterations), worst)]
        report(found_roots, x.numel(), form.solver, torch.finfo(y.dtype).eps)
    return x


def probe(device: torch.device) -> None:
    """Launches a kernel on a device, which raises an error if it does not run there."""
    one = torch.ones(1, 1, device=device)
    known = torch.zeros(1, 1, dtype=torch.int32, device=device)
    places = torch.tensor([[1, 0, 0, 0]], device=device)
    substitute(one, [(one, one)], Schedule("ReLU", known, places), AffineChain())
