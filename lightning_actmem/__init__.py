"""Compressed activations for PyTorch Lightning: one callback or one strategy, no change to the model."""

from .config import ActMemConfig as ActMemConfig
from .engine import ActMemEngine as ActMemEngine
from .errors import ActMemError as ActMemError
from .errors import ActMemWarning as ActMemWarning
from .report import LayerRow as LayerRow
from .report import StepReport as StepReport

__all__ = [
    "ActMemConfig",
    "ActMemEngine",
    "ActMemError",
    "ActMemWarning",
    "LayerRow",
    "StepReport",
]
