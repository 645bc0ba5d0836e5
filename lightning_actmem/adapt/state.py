"""Codecs, averages and plans as what a checkpoint may hold: lists, texts and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lightning_actmem_kernels import CodecSpec

from ..saved.site import Site

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def as_list(value: DataclassInstance | None) -> list[Any] | None:
    """Return the fields of a flat dataclass in their order; ``None`` stays ``None``."""
    return None if value is None else [getattr(value, part.name) for part in fields(value)]


def plan_state(plan: Mapping[Site, CodecSpec | None]) -> list[Any]:
    """Return a plan as lists, texts and numbers."""
    return [[list(site), as_list(spec)] for site, spec in plan.items()]


def plan_of(state: list[Any]) -> dict[Site, CodecSpec | None]:
    """Return the plan that `plan_state` was given."""
    return {Site(*site): None if spec is None else CodecSpec(*spec) for site, spec in state}
