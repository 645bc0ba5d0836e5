"""Compressed activations for PyTorch Lightning: one callback or one strategy, no change to the model."""

from .config import ActMemConfig as ActMemConfig
from .engine import ActMemEngine as ActMemEngine
from .errors import ActMemError as ActMemError
from .errors import ActMemWarning as ActMemWarning
from .integration import ActMem as ActMem
from .integration import ActMemBatchSizeFinder as ActMemBatchSizeFinder
from .integration import ActMemDDPStrategy as ActMemDDPStrategy
from .integration import ActMemStrategy as ActMemStrategy
from .integration import BitsPerElement as BitsPerElement
from .integration import CompressionRatio as CompressionRatio
from .integration import GradientNoise as GradientNoise
from .integration import MemoryPlan as MemoryPlan
from .integration import StoredBytes as StoredBytes
from .integration import plan as plan
from .report import LayerRow as LayerRow
from .report import StepReport as StepReport

__all__ = [
    "ActMem",
    "ActMemBatchSizeFinder",
    "ActMemConfig",
    "ActMemDDPStrategy",
    "ActMemEngine",
    "ActMemError",
    "ActMemStrategy",
    "ActMemWarning",
    "BitsPerElement",
    "CompressionRatio",
    "GradientNoise",
    "LayerRow",
    "MemoryPlan",
    "StepReport",
    "StoredBytes",
    "plan",
]
