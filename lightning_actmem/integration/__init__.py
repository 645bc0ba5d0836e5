"""The Lightning layer: the callback, the strategies, and what they log and print."""

from .callback import ActMem as ActMem
from .strategies import ActMemDDPStrategy as ActMemDDPStrategy
from .strategies import ActMemStrategy as ActMemStrategy

__all__ = ["ActMem", "ActMemDDPStrategy", "ActMemStrategy"]
