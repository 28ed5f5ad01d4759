"""Sinusoidal Flows for Pyro and zuko."""

from ._version import __version__
from .compilation import compile_kernels
from .conditioners import LazyTriangular
from .flows import FastInverse, SinusoidalFlow, fast_inverse
from .inversion import Inversion, InversionError, InversionWarning, Solver, record_inversions
from .modules import LDU, ConditionalLDU, Sinusoidal, conditional_ldu, ldu, sinusoidal
from .networks import MaskedNetwork, PixelCNN
from .transforms import LDUTransform, SinusoidalTransform, TriangularTransform

__all__ = [
    "LDU",
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
    "compile_kernels",
    "conditional_ldu",
    "fast_inverse",
    "ldu",
    "record_inversions",
    "sinusoidal",
]
