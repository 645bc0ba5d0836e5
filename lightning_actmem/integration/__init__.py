"""The Lightning layer: the callback, the strategies, and what they log and print."""

from .callback import ActMem as ActMem
from .means import BitsPerElement as BitsPerElement
from .means import CompressionRatio as CompressionRatio
from .means import GradientNoise as GradientNoise
from .means import StoredBytes as StoredBytes
from .strategies import ActMemDDPStrategy as ActMemDDPStrategy
from .strategies import ActMemStrategy as ActMemStrategy

__all__ = [
    "ActMem",
    "ActMemDDPStrategy",
    "ActMemStrategy",
    "BitsPerElement",
    "CompressionRatio",
    "GradientNoise",
    "StoredBytes",
]
