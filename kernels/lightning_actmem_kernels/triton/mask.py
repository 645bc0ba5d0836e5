"""Booleans in one bit each; `lightning_actmem_kernels.reference.mask` says where each bit goes."""

# mypy: allow-untyped-decorators

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Case, as_bytes, as_it_is, case_of
from .tiles import elements_per_program


def encode(flat: Tensor) -> Tensor:
    """As `reference.mask.encode`."""
    numel = flat.numel()
    size = -(-numel // 8)
    packed = flat.new_empty(size, dtype=torch.uint8)
    if size:
        case, programs = _launch(True, size, flat.get_device())
        case.launch(programs, (flat, packed), (numel, size))
    return packed


def decode(packed: Tensor, numel: int) -> Tensor:
    """As `reference.mask.decode`."""
    flat, size = packed.new_empty(numel, dtype=torch.bool), packed.numel()
    if numel:
        case, programs = _launch(False, size, packed.get_device())
        case.launch(programs, (packed, flat), (numel, size))
    return flat


@lru_cache(maxsize=1024)
def _launch(encodes: bool, size: int, device: int) -> tuple[Case, int]:
    """What runs for this many bytes, and the number of programs."""
    width = elements_per_program(size)
    if encodes:
        case = case_of(_encode, (width,), (as_bytes, as_it_is), torch.bool, device)
    else:
        case = case_of(_decode, (width,), (as_it_is, as_bytes), torch.uint8, device)
    return case, -(-size // width)


@triton.jit(do_not_specialize=["numel", "plane_size"])
def _encode(
    bools_ptr: tl.tensor, packed_ptr: tl.tensor, numel: tl.int64, plane_size: tl.int64, WIDTH: tl.constexpr
) -> None:
    place = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    byte = tl.zeros((WIDTH,), tl.int32)
    for S in tl.static_range(8):
        element = S * plane_size + place
        bit = tl.load(bools_ptr + element, (place < plane_size) & (element < numel), other=0)
        byte |= bit.to(tl.int32) << S
    tl.store(packed_ptr + place, byte.to(tl.uint8), place < plane_size)


@triton.jit(do_not_specialize=["numel", "plane_size"])
def _decode(
    packed_ptr: tl.tensor, bools_ptr: tl.tensor, numel: tl.int64, plane_size: tl.int64, WIDTH: tl.constexpr
) -> None:
    place = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    byte = tl.load(packed_ptr + place, place < plane_size, other=0).to(tl.int32)
    for S in tl.static_range(8):
        element = S * plane_size + place
        tl.store(bools_ptr + element, ((byte >> S) & 1).to(tl.uint8), (place < plane_size) & (element < numel))
