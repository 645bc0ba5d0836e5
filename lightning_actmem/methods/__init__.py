"""What replaces an operation, rather than a tensor that it saves: chosen by the setting ``activations``."""

from .derivative import DerivativeChains as DerivativeChains
from .gate import Gate as Gate
from .inverted import InvertedActivations as InvertedActivations

__all__ = ["DerivativeChains", "Gate", "InvertedActivations"]
