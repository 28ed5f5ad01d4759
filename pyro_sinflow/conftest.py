"""Names that the docstrings' examples use."""

from typing import Any

import pyro
import pytest
import torch
import zuko

import pyro_sinflow


@pytest.fixture(autouse=True)
def _namespace(doctest_namespace: dict[str, Any]) -> None:
    torch.manual_seed(0)
    doctest_namespace.update(torch=torch, pyro=pyro, zuko=zuko)
    doctest_namespace.update((n, getattr(pyro_sinflow, n)) for n in pyro_sinflow.__all__)
