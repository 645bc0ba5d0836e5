"""The codecs as `torch.library` operators `lightning_actmem::*`, so that compilers and fake tensors see through them.

Each runs the reference or Triton as its `backend` argument says; both return the same bits. The operators have no
derivative: what they return is stored for backward, not differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from .reference import integer

_GRID_ENCODE = "(Tensor flat, int bits, int group_size, str rounding, int key, str backend) -> (Tensor, Tensor)"
_GRID_DECODE = (
    "(Tensor codes, Tensor grid, int bits, str rounding, int key, SymInt numel, ScalarType dtype, str backend)"
    " -> Tensor"
)

_dispatch_modes = torch._C._len_torch_dispatch_stack
_library: Any = torch.library.Library("lightning_actmem", "DEF")

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")
_Pair = tuple[Tensor, Tensor]

_overloads: dict[str, Callable[..., Any]] = {}


@cache
def _module(codec: str, backend: str) -> Implementation:
    # Imported when first used: the package must import where Triton is not installed.
    module = import_module(f"{__package__}.{'triton' if backend == 'triton' else 'reference'}.{codec}")
    return cast(Implementation, module)


def _register(
    name: str, schema: str, run: Callable[_Args, _Result], fake: Callable[_Args, _Result]
) -> Callable[_Args, _Result]:
    """Define one operator and return its overload, which skips the overload lookup of a plain `torch.ops` call."""
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lightning_actmem::{name}", fake, lib=_library)
    overload: Callable[_Args, _Result] = getattr(torch.ops.lightning_actmem, name).default
    _overloads[name] = overload
    return overload


class Implementation(Protocol):
    """The two functions of a codec, which take what its operators do but for the backend."""

    def encode(self, flat: Tensor, *parameters: Any) -> Any:
        """Pack a flat tensor."""

    def decode(self, stored: Tensor, *parameters: Any) -> Any:
        """Restore what `encode` returned."""


class _Operators:
    """The operators of a codec, called like the functions of its modules."""

    def __init__(self, codec: str, backend: str) -> None:
        self._codec = codec
        self._last = () if codec == "integer" else (backend,)

    def encode(self, flat: Tensor, *parameters: Any) -> Any:
        return _overloads[f"{self._codec}_encode"](flat, *parameters, *self._last)

    def decode(self, stored: Tensor, *parameters: Any) -> Any:
        return _overloads[f"{self._codec}_decode"](stored, *parameters, *self._last)


def implementation(codec: str, backend: str, tensor: Tensor) -> Implementation:
    """What encodes and decodes: the operators where the dispatcher has listeners, else directly what they run.

    The dispatcher takes the host 2 us, where all the rest of a call takes 5.

    Args:
        codec: Name of the modules of both backends.
        backend: `triton` or `torch`.
        tensor: What is to be encoded or decoded.

    Returns:
        Functions that return the same either way.
    """
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or _dispatch_modes():
        return _Operators(codec, backend)
    return _module(codec, backend)


def _grid_encode(codec: str) -> Callable[[Tensor, int, int, str, int, str], _Pair]:
    def run(flat: Tensor, bits: int, group_size: int, rounding: str, key: int, backend: str) -> _Pair:
        payload: _Pair = _module(codec, backend).encode(flat, bits, group_size, rounding, key)
        return payload

    return run


def _grid_decode(codec: str) -> Callable[[Tensor, Tensor, int, str, int, int, torch.dtype, str], Tensor]:
    def run(
        codes: Tensor, grid: Tensor, bits: int, rounding: str, key: int, numel: int, dtype: torch.dtype, backend: str
    ) -> Tensor:
        flat: Tensor = _module(codec, backend).decode(codes, grid, bits, rounding, key, numel, dtype)
        return flat

    return run


def _grid_encode_fake(meta_dtype: torch.dtype) -> Callable[[Tensor, int, int, str, int, str], _Pair]:
    def fake(flat: Tensor, bits: int, group_size: int, rounding: str, key: int, backend: str) -> _Pair:
        groups = (flat.numel() + group_size - 1) // group_size
        codes = flat.new_empty((groups, bits, group_size // 8), dtype=torch.uint8)
        return codes, flat.new_empty((groups,), dtype=meta_dtype)

    return fake


def _grid_decode_fake(
    codes: Tensor, grid: Tensor, bits: int, rounding: str, key: int, numel: int, dtype: torch.dtype, backend: str
) -> Tensor:
    return codes.new_empty((numel,), dtype=dtype)


def _rotated_encode(flat: Tensor, bits: int, group_size: int, centre: bool, key: int, backend: str) -> _Pair:
    payload: _Pair = _module("rotated", backend).encode(flat, bits, group_size, centre, key)
    return payload


def _rotated_encode_fake(flat: Tensor, bits: int, group_size: int, centre: bool, key: int, backend: str) -> _Pair:
    groups = (flat.numel() + group_size - 1) // group_size
    codes = flat.new_empty((groups, bits, group_size // 8), dtype=torch.uint8)
    return codes, flat.new_empty((groups, 1 + centre), dtype=torch.int16)


def _rotated_decode(
    codes: Tensor, scales: Tensor, bits: int, key: int, numel: int, dtype: torch.dtype, backend: str
) -> Tensor:
    flat: Tensor = _module("rotated", backend).decode(codes, scales, bits, key, numel, dtype)
    return flat


def _rotated_decode_fake(
    codes: Tensor, scales: Tensor, bits: int, key: int, numel: int, dtype: torch.dtype, backend: str
) -> Tensor:
    return codes.new_empty((numel,), dtype=dtype)


def _fp8_encode(flat: Tensor, name: str, group_size: int, rounding: str, key: int, backend: str) -> _Pair:
    payload: _Pair = _module("fp8", backend).encode(flat, name, group_size, rounding, key)
    return payload


def _fp8_encode_fake(flat: Tensor, name: str, group_size: int, rounding: str, key: int, backend: str) -> _Pair:
    groups = (flat.numel() + group_size - 1) // group_size
    codes = flat.new_empty((groups, 8, group_size // 8), dtype=torch.uint8)
    return codes, flat.new_empty((groups,), dtype=torch.uint8)


def _fp8_decode(codes: Tensor, exponents: Tensor, name: str, numel: int, dtype: torch.dtype, backend: str) -> Tensor:
    flat: Tensor = _module("fp8", backend).decode(codes, exponents, name, numel, dtype)
    return flat


def _fp8_decode_fake(
    codes: Tensor, exponents: Tensor, name: str, numel: int, dtype: torch.dtype, backend: str
) -> Tensor:
    return codes.new_empty((numel,), dtype=dtype)


def _fixed_encode(
    flat: Tensor, bits: int, group_size: int, low: float, high: float, rounding: str, key: int, backend: str
) -> Tensor:
    codes: Tensor = _module("fixed", backend).encode(flat, bits, group_size, low, high, rounding, key)
    return codes


def _fixed_encode_fake(
    flat: Tensor, bits: int, group_size: int, low: float, high: float, rounding: str, key: int, backend: str
) -> Tensor:
    groups = (flat.numel() + group_size - 1) // group_size
    return flat.new_empty((groups, bits, group_size // 8), dtype=torch.uint8)


def _fixed_decode(
    codes: Tensor,
    bits: int,
    low: float,
    high: float,
    rounding: str,
    key: int,
    numel: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    flat: Tensor = _module("fixed", backend).decode(codes, bits, low, high, rounding, key, numel, dtype)
    return flat


def _fixed_decode_fake(
    codes: Tensor,
    bits: int,
    low: float,
    high: float,
    rounding: str,
    key: int,
    numel: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return codes.new_empty((numel,), dtype=dtype)


def _mask_encode(flat: Tensor, backend: str) -> Tensor:
    packed: Tensor = _module("mask", backend).encode(flat)
    return packed


def _mask_encode_fake(flat: Tensor, backend: str) -> Tensor:
    return flat.new_empty(((flat.numel() + 7) // 8,), dtype=torch.uint8)


def _mask_decode(packed: Tensor, numel: int, backend: str) -> Tensor:
    flat: Tensor = _module("mask", backend).decode(packed, numel)
    return flat


def _mask_decode_fake(packed: Tensor, numel: int, backend: str) -> Tensor:
    return packed.new_empty((numel,), dtype=torch.bool)


def _integer_encode_fake(flat: Tensor, bits: int) -> Tensor:
    numel = -(-flat.numel() // 2) if bits == 4 else flat.numel()
    return flat.new_empty((numel,), dtype=integer.STORAGE[bits])


def _integer_decode_fake(narrow: Tensor, bits: int, dtype: torch.dtype, numel: int) -> Tensor:
    return narrow.new_empty((numel,), dtype=dtype)


uniform_encode = _register("uniform_encode", _GRID_ENCODE, _grid_encode("uniform"), _grid_encode_fake(torch.int32))
uniform_decode = _register("uniform_decode", _GRID_DECODE, _grid_decode("uniform"), _grid_decode_fake)
relu_encode = _register("relu_encode", _GRID_ENCODE, _grid_encode("relu"), _grid_encode_fake(torch.int16))
relu_decode = _register("relu_decode", _GRID_DECODE, _grid_decode("relu"), _grid_decode_fake)
bfp_encode = _register("bfp_encode", _GRID_ENCODE, _grid_encode("bfp"), _grid_encode_fake(torch.uint8))
bfp_decode = _register("bfp_decode", _GRID_DECODE, _grid_decode("bfp"), _grid_decode_fake)
fp8_encode = _register(
    "fp8_encode",
    "(Tensor flat, str name, int group_size, str rounding, int key, str backend) -> (Tensor, Tensor)",
    _fp8_encode,
    _fp8_encode_fake,
)
fp8_decode = _register(
    "fp8_decode",
    "(Tensor codes, Tensor exponents, str name, SymInt numel, ScalarType dtype, str backend) -> Tensor",
    _fp8_decode,
    _fp8_decode_fake,
)
rotated_encode = _register(
    "rotated_encode",
    "(Tensor flat, int bits, int group_size, bool centre, int key, str backend) -> (Tensor, Tensor)",
    _rotated_encode,
    _rotated_encode_fake,
)
rotated_decode = _register(
    "rotated_decode",
    "(Tensor codes, Tensor scales, int bits, int key, SymInt numel, ScalarType dtype, str backend) -> Tensor",
    _rotated_decode,
    _rotated_decode_fake,
)
fixed_encode = _register(
    "fixed_encode",
    "(Tensor flat, int bits, int group_size, float low, float high, str rounding, int key, str backend) -> Tensor",
    _fixed_encode,
    _fixed_encode_fake,
)
fixed_decode = _register(
    "fixed_decode",
    "(Tensor codes, int bits, float low, float high, str rounding, int key, SymInt numel, ScalarType dtype,"
    " str backend) -> Tensor",
    _fixed_decode,
    _fixed_decode_fake,
)
mask_encode = _register("mask_encode", "(Tensor flat, str backend) -> Tensor", _mask_encode, _mask_encode_fake)
mask_decode = _register(
    "mask_decode", "(Tensor packed, SymInt numel, str backend) -> Tensor", _mask_decode, _mask_decode_fake
)
# One dtype cast each way, which PyTorch runs as one kernel: there is nothing for Triton to add.
integer_encode = _register("integer_encode", "(Tensor flat, int bits) -> Tensor", integer.encode, _integer_encode_fake)
integer_decode = _register(
    "integer_decode",
    "(Tensor narrow, int bits, ScalarType dtype, SymInt numel) -> Tensor",
    integer.decode,
    _integer_decode_fake,
)
