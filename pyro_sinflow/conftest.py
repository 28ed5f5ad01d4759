"""The names that the examples in docstrings use."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pyro
import pytest
import torch
import zuko

import pyro_sinflow

collect_ignore = []
try:
    from pyro_sinflow.kernels import triton as _  # noqa: F401
except ImportError:  # not installed, or too old
    collect_ignore += ["kernels/triton.py", "kernels/substitution.py"]
if find_spec("sbi") is None:  # its examples need it
    collect_ignore.append("sbi.py")


@pytest.fixture(autouse=True)
def _namespace(doctest_namespace: dict[str, Any]) -> Iterator[None]:
    torch.manual_seed(0)
    doctest_namespace.update(torch=torch, pyro=pyro, zuko=zuko)
    doctest_namespace.update((n, getattr(pyro_sinflow, n)) for n in pyro_sinflow.__all__)
    yield
    pyro.clear_param_store()
