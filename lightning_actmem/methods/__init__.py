"""What replaces an operation, rather than a tensor that it saves: chosen by ``activations``, ``layer_activations``."""

from .by_place import Method as Method
from .by_place import MethodsByPlace as MethodsByPlace
from .derivative import DerivativeChains as DerivativeChains
from .gate import Gate as Gate
from .inverted import InvertedActivations as InvertedActivations

__all__ = ["DerivativeChains", "Gate", "InvertedActivations", "Method", "MethodsByPlace"]
