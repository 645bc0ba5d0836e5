"""The Lightning layer: the callback, the strategies, and what they log and print."""

from .batch_size import ActMemBatchSizeFinder as ActMemBatchSizeFinder
from .callback import ActMem as ActMem
from .means import BitsPerElement as BitsPerElement
from .means import CompressionRatio as CompressionRatio
from .means import GradientNoise as GradientNoise
from .means import StoredBytes as StoredBytes
from .memory_plan import MemoryPlan as MemoryPlan
from .plan import plan as plan
from .strategies import ActMemDDPStrategy as ActMemDDPStrategy
from .strategies import ActMemStrategy as ActMemStrategy

__all__ = [
    "ActMem",
    "ActMemBatchSizeFinder",
    "ActMemDDPStrategy",
    "ActMemStrategy",
    "BitsPerElement",
    "CompressionRatio",
    "GradientNoise",
    "MemoryPlan",
    "StoredBytes",
    "plan",
]
