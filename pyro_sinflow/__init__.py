"""Sinusoidal Flows for Pyro and zuko."""

from ._version import __version__
from .autoregressive import AutoregressiveMap
from .block import ConditionalLDU
from .element_wise import SinusoidalTransform
from .fast import FastInverse, fast_inverse
from .flows import SinusoidalFlow
from .guides import AutoLDU
from .lazy import LazyTriangular
from .modules import LDU, Sinusoidal, conditional_ldu, ldu, sinusoidal
from .networks import MaskedNetwork
from .pixelcnn import PixelCNN
from .solvers import Inversion, InversionError, InversionWarning, Solver, record_inversions
from .transforms import LDUTransform, TriangularTransform

__all__ = [
    "LDU",
    "AutoLDU",
    "AutoregressiveMap",
    "ConditionalLDU",
    "FastInverse",
    "Inversion",
    "InversionError",
    "InversionWarning",
    "LDUTransform",
    "LazyTriangular",
    "MaskedNetwork",
    "PixelCNN",
    "Sinusoidal",
    "SinusoidalFlow",
    "SinusoidalTransform",
    "Solver",
    "TriangularTransform",
    "__version__",
    "conditional_ldu",
    "fast_inverse",
    "ldu",
    "record_inversions",
    "sinusoidal",
]
