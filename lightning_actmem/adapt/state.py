"""Sites, codecs and averages as what a checkpoint may hold: lists, texts and numbers."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lightning_actmem_kernels import CodecSpec

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def as_list(value: DataclassInstance | None) -> list[Any] | None:
    """Return the fields of a flat dataclass in their order; ``None`` stays ``None``."""
    return None if value is None else [getattr(value, part.name) for part in fields(value)]


def spec_of(state: list[Any] | None) -> CodecSpec | None:
    """Return the codec of a list; ``None`` is exact."""
    return None if state is None else CodecSpec(*state)
