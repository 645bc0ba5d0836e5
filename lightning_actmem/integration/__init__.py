"""The Lightning layer: the callback, the strategies, and what they log and print."""

from .batch_size import ActMemBatchSizeFinder as ActMemBatchSizeFinder
from .callback import ActMem as ActMem
from .memory_plan import MemoryPlan as MemoryPlan
from .plan import plan as plan
from .strategies import ActMemDDPStrategy as ActMemDDPStrategy
from .strategies import ActMemStrategy as ActMemStrategy

__all__ = ["ActMem", "ActMemBatchSizeFinder", "ActMemDDPStrategy", "ActMemStrategy", "MemoryPlan", "plan"]
