"""What the tests share."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import pyro
import pytest
import torch
from hypothesis import settings
from torch import nn

settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("default")

EXAMPLES = Path(__file__).parent.parent / "examples"

M = TypeVar("M", bound=nn.Module)

FLOAT = {torch.float32: 5e-6, torch.float64: 1e-13}


def _fake_gpu() -> str | None:
    """Returns the name of a device for fake tensors.

    Without a CUDA device, autograd of fake CUDA tensors fails. A backend that is no more than its
    name does as well: fake tensors that meet on different devices raise an error.
    """
    if torch.cuda.is_available():
        return "cuda"
    register = getattr(
        torch.utils.backend_registration, "_setup_privateuseone_for_python_backend", None
    )
    if register is None:
        return None
    register("fakegpu")
    return "fakegpu"


FAKE_GPU = _fake_gpu()  # at once: autograd counts the devices at the first backward pass


@pytest.fixture(autouse=True)
def _seed() -> None:
    pyro.set_rng_seed(0)
    pyro.clear_param_store()


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports an example script, or a module of theirs, by its name."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def perturb(module: M, scale: float = 0.3) -> M:
    """Moves the parameters away from where they start, which is the identity for some."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def replicate(module: M) -> M:
    """What nn.DataParallel makes on each of its devices, where parameters are plain tensors."""
    replicas = {m: m._replicate_for_data_parallel() for m in module.modules()}
    for part, replica in replicas.items():
        for name, child in part._modules.items():
            if child is not None:
                setattr(replica, name, replicas[child])
        for name, parameter in part._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.clone())
    return replicas[module]


def residual(f: Callable, x: torch.Tensor, y: torch.Tensor) -> float:
    """The largest |f(x) - y| / (1 + |x| + |y|)."""
    with torch.no_grad():
        error = (f(x) - y).abs() / (1 + x.abs() + y.abs())
    return float(error.max()) if error.numel() else 0.0


def slogdet(f: Callable, x: torch.Tensor, event_dim: int) -> torch.Tensor:
    """The log-determinant of the Jacobian that autograd computes, for a batch of events."""
    n = x.shape[x.ndim - event_dim :].numel()
    flat = x.reshape(-1, *x.shape[x.ndim - event_dim :])
    jacobians = [torch.autograd.functional.jacobian(f, row).reshape(n, n) for row in flat]
    return torch.stack(jacobians).slogdet().logabsdet.reshape(x.shape[: x.ndim - event_dim])
