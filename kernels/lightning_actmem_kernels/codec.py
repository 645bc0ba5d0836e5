"""Encode and decode a flat tensor by a `CodecSpec`, on the backend that suits its device."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from . import ops
from .ops import call
from .spec import CodecSpec

Payload = tuple[Tensor, ...]

_GRID_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "uniform": _GRID_DTYPES,
    "rotated": _GRID_DTYPES,
    "relu": _GRID_DTYPES,
    "bfp": _GRID_DTYPES,
    "fp8_e4m3": _GRID_DTYPES,
    "fp8_e5m2": _GRID_DTYPES,
    "fixed": _GRID_DTYPES,
    "mask": (torch.bool,),
    "two_valued": (*_GRID_DTYPES, torch.float64),
    "integer": (torch.uint8, torch.int16, torch.int32, torch.int64),
}
_GRID_ENCODE = {"uniform": ops.uniform_encode, "relu": ops.relu_encode, "bfp": ops.bfp_encode}
_GRID_DECODE = {"uniform": ops.uniform_decode, "relu": ops.relu_decode, "bfp": ops.bfp_decode}
_TRITON_DEVICES = ("cuda", "xpu")


def encode(flat: Tensor, spec: CodecSpec, *, key: int, backend: str | None = None) -> Payload:
    """Pack a flat tensor.

    Args:
        flat: 1-D contiguous, in memory order (see `Layout.flatten`); never modified.
        spec: The codec and its parameters.
        key: The tensor's own noise stream: any integer in [-2**63, 2**63). Never use one for two tensors.
        backend: `triton`, `torch`, or None for the faster one that the device supports.

    Returns:
        Freshly allocated tensors, `spec.stored_bytes` in all, that share no memory with `flat`.

    Raises:
        TypeError: The codec does not take flat's dtype.
        ValueError: `flat` is not 1-D contiguous, or `key` is out of range, or `backend` is unknown.
        RuntimeError: Triton was asked for and cannot run here.

    Example:
        >>> import torch
        >>> spec = CodecSpec("uniform", bits=4)
        >>> x = torch.linspace(0, 1, 1024)
        >>> payload = encode(x, spec, key=7)
        >>> sum(t.nbytes for t in payload), x.nbytes
        (528, 4096)
        >>> restored = decode(payload, spec, numel=1024, dtype=x.dtype, key=7)
        >>> bool((restored - x).abs().max() < 0.02)
        True
    """
    _check(spec, flat.dtype, key)
    if flat.ndim != 1 or not flat.is_contiguous():
        raise ValueError(
            f"flat must be 1-D and contiguous, got size {tuple(flat.shape)} with stride {flat.stride()}. "
            "Pass Layout.of(t).flatten(t)."
        )
    flat = flat.detach() if flat.requires_grad else flat
    if spec.codec == "identity":
        return (flat.clone(),)
    if spec.codec == "integer":
        return (call(ops.integer_encode, flat, spec.bits),)
    engine = resolve_backend(backend, flat.device)
    if grid_encode := _GRID_ENCODE.get(spec.codec):
        return call(grid_encode, flat, spec.bits, spec.group_size, spec.rounding, key, engine)
    if spec.codec == "mask":
        return (call(ops.mask_encode, flat, engine),)
    if spec.codec == "two_valued":
        value = flat.amax().view(1) if flat.numel() else flat.new_zeros(1)
        return call(ops.mask_encode, flat != 0, engine), value
    if spec.codec == "rotated":
        return call(ops.rotated_encode, flat, spec.bits, spec.group_size, spec.centre, key, engine)
    if spec.codec == "fixed":
        bounds = spec.low, spec.high
        return (call(ops.fixed_encode, flat, spec.bits, spec.group_size, *bounds, spec.rounding, key, engine),)
    return call(ops.fp8_encode, flat, spec.codec, spec.group_size, spec.rounding, key, engine)


def decode(
    payload: Payload, spec: CodecSpec, *, numel: int, dtype: torch.dtype, key: int, backend: str | None = None
) -> Tensor:
    """Restore what `encode` packed; pure, so it may be asked again.

    Args:
        payload: What `encode` returned.
        spec: As given to `encode`.
        numel: Elements of the flat tensor.
        dtype: Its dtype.
        key: As given to `encode`.
        backend: `triton`, `torch` or None; it need not be the one that encoded.

    Returns:
        A new 1-D tensor of `numel` elements.

    Raises:
        TypeError: The codec does not restore `dtype`.
        ValueError: `key` is out of range, or `backend` is unknown.
        RuntimeError: Triton was asked for and cannot run here.
    """
    _check(spec, dtype, key)
    stored = payload[0]
    if spec.codec == "identity":
        return stored.clone()
    if spec.codec == "integer":
        return call(ops.integer_decode, stored, spec.bits, dtype, numel)
    engine = resolve_backend(backend, stored.device)
    if grid_decode := _GRID_DECODE.get(spec.codec):
        return call(grid_decode, stored, payload[1], spec.bits, spec.rounding, key, numel, dtype, engine)
    if spec.codec == "mask":
        return call(ops.mask_decode, stored, numel, engine)
    if spec.codec == "two_valued":
        return torch.where(call(ops.mask_decode, stored, numel, engine), payload[1], 0)
    if spec.codec == "rotated":
        return call(ops.rotated_decode, stored, payload[1], spec.bits, key, numel, dtype, engine)
    if spec.codec == "fixed":
        return call(ops.fixed_decode, stored, spec.bits, spec.low, spec.high, spec.rounding, key, numel, dtype, engine)
    return call(ops.fp8_decode, stored, payload[1], spec.codec, numel, dtype, engine)


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """The backend that will run.

    Args:
        backend: `triton`, `torch`, or None for Triton on CUDA, ROCm and XPU where it is installed, else torch.
        device: Where the tensors are.

    Returns:
        `triton` or `torch`.

    Raises:
        ValueError: `backend` is none of these.
        RuntimeError: Triton was asked for and is not installed, or does not run on this device.
    """
    if backend is None:
        return "triton" if device.type in _TRITON_DEVICES and _triton_installed() else "torch"
    if backend == "torch":
        return backend
    if backend != "triton":
        raise ValueError(f"backend must be 'triton', 'torch' or None, got {backend!r}. Use None for the faster one.")
    if not _triton_installed():
        raise RuntimeError(
            "backend 'triton' needs the package triton, which is not installed. Run `pip install 'triton>=3.2'`, "
            "or use backend='torch' for the PyTorch code that returns the same bits."
        )
    if device.type not in _TRITON_DEVICES and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"backend 'triton' needs a tensor on a CUDA, ROCm or XPU device, got one on '{device}'. Move it there, use "
            "backend='torch', or set TRITON_INTERPRET=1 before the start to run the kernels in Triton's interpreter."
        )
    return backend


@lru_cache(maxsize=1)
def _triton_installed() -> bool:
    return find_spec("triton") is not None


def _check(spec: CodecSpec, dtype: torch.dtype, key: int) -> None:
    accepted = _DTYPES.get(spec.codec, (dtype,))
    if dtype not in accepted:
        raise TypeError(
            f"codec {spec.codec!r} takes {', '.join(map(str, accepted))}, got {dtype}. "
            "Use CodecSpec('identity') to keep the tensor as it is."
        )
    if spec.codec == "integer" and spec.bits > 8 * dtype.itemsize:
        raise TypeError(
            f"codec 'integer' at {spec.bits} bits would widen {dtype}. Use at most {8 * dtype.itemsize} bits."
        )
    if not -(1 << 63) <= key < 1 << 63:
        raise ValueError(
            f"key must be in [-2**63, 2**63), got {key}. Take it modulo 2**64 and shift it into the range."
        )
