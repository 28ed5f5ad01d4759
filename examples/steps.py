"""Training steps by maximum likelihood, which a CUDA graph can capture."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from torch import Tensor, nn


def adamw(parameters: Iterable[Any], lr: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """Returns an optimizer whose steps a CUDA graph can capture, if its parameters are on a GPU.

    Args:
        parameters: The parameters, or groups of them.
        lr: The initial learning rate. A scheduler of torch can change it.
        weight_decay: The weight decay.
    """
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=weight_decay)
    use_device(optimizer)
    return optimizer


def use_device(optimizer: torch.optim.Optimizer) -> None:
    """Lets an optimizer count its steps, and read learning rates, on the device of its parameters.

    A CUDA graph repeats its kernels, so that numbers of Python would stay constant.
    """
    for group in optimizer.param_groups:
        device, lr = group["params"][0].device, float(group["lr"])
        group["capturable"] = device.type == "cuda"
        group["lr"] = torch.tensor(lr, device=device) if group["capturable"] else lr
        for state in (optimizer.state[p] for p in group["params"] if p in optimizer.state):
            state["step"] = state["step"].to(device)


def likelihood_step(
    optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], clip: float = 10.0
) -> Callable[[], Tensor]:
    """Returns a step of maximum likelihood that a CUDA graph can capture.

    Args:
        optimizer: The optimizer.
        loss: A function that returns the loss of the current batch. It reads the batch from the
            same tensor each time.
        clip: The largest norm of the gradient.

    Returns:
        A function that takes a step and returns the loss before it.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)  # so that the graph overwrites the gradients
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, clip)  # does not wait for the device
        optimizer.step()
        return value.detach()  # a graph that outlives the step would keep its stream

    return step


def captured(step: Callable[[], Tensor], warm_up: int = 3) -> Callable[[], Tensor]:
    """Captures a step in a CUDA graph, which launches all of its kernels at once.

    The tensors of the step must stay in the same memory. Validation is off during the step, because
    a graph cannot read values.

    Args:
        step: The step, which returns a tensor.
        warm_up: The number of steps before the capture, at least one.

    Returns:
        A function that takes a step. Once the graph is captured, it returns the same tensor each
        time, with a new value.
    """
    # A capture needs a stream other than the default one, and the warm-up takes the same stream.
    # The warm-up compiles Triton's kernels and allocates the workspaces of cuBLAS and the state of
    # the optimizer, which is not possible during a capture.
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    taken, result = 0, torch.empty(0)

    def take() -> Tensor:
        nonlocal taken, result
        taken += 1
        with pyro.validation_enabled(False):
            if taken <= warm_up:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    result = step()
                torch.cuda.current_stream().wait_stream(stream)
                return result
            if taken == warm_up + 1:
                with torch.cuda.graph(graph, stream=stream):
                    result = step()  # records the kernels, and does not run them
        graph.replay()
        return result

    return take
