"""Encode and decode a flat tensor by a `CodecSpec`, on the backend that suits its device."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from .ops import implementation
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
_GRIDS = ("uniform", "relu", "bfp")
# What each codec's modules are called, in either backend.
_MODULES = {name: name for name in _DTYPES} | {"fp8_e4m3": "fp8", "fp8_e5m2": "fp8", "two_valued": "mask"}
_TRITON_DEVICES = ("cuda", "xpu")
_TRITON_INSTALLED = find_spec("triton") is not None


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
        return (implementation("integer", "torch", flat).encode(flat, spec.bits),)
    codec = implementation(_MODULES[spec.codec], _backend_for(flat, backend), flat)
    payload: Payload
    if spec.codec in _GRIDS:
        payload = codec.encode(flat, spec.bits, spec.group_size, spec.rounding, key)
    elif spec.codec == "mask":
        payload = (codec.encode(flat),)
    elif spec.codec == "two_valued":
        value = flat.amax().view(1) if flat.numel() else flat.new_zeros(1)
        payload = codec.encode(flat != 0), value
    elif spec.codec == "rotated":
        payload = codec.encode(flat, spec.bits, spec.group_size, spec.centre, key)
    elif spec.codec == "fixed":
        payload = (codec.encode(flat, spec.bits, spec.group_size, spec.low, spec.high, spec.rounding, key),)
    else:
        payload = codec.encode(flat, spec.codec, spec.group_size, spec.rounding, key)
    return payload


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
    flat: Tensor
    if spec.codec == "integer":
        flat = implementation("integer", "torch", stored).decode(stored, spec.bits, dtype, numel)
        return flat
    codec = implementation(_MODULES[spec.codec], _backend_for(stored, backend), stored)
    if spec.codec in _GRIDS:
        flat = codec.decode(stored, payload[1], spec.bits, spec.rounding, key, numel, dtype)
    elif spec.codec == "mask":
        flat = codec.decode(stored, numel)
    elif spec.codec == "two_valued":
        flat = torch.where(codec.decode(stored, numel), payload[1], 0)
    elif spec.codec == "rotated":
        flat = codec.decode(stored, payload[1], spec.bits, key, numel, dtype)
    elif spec.codec == "fixed":
        flat = codec.decode(stored, spec.bits, spec.low, spec.high, spec.rounding, key, numel, dtype)
    else:
        flat = codec.decode(stored, payload[1], spec.codec, numel, dtype)
    return flat


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
        return "triton" if device.type in _TRITON_DEVICES and _TRITON_INSTALLED else "torch"
    if backend == "torch":
        return backend
    if backend != "triton":
        raise ValueError(f"backend must be 'triton', 'torch' or None, got {backend!r}. Use None for the faster one.")
    if not _TRITON_INSTALLED:
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


def _backend_for(tensor: Tensor, backend: str | None) -> str:
    """As `resolve_backend`; a device takes longer to name its type than a tensor to answer both questions."""
    if backend is not None:
        return resolve_backend(backend, tensor.device)
    return "triton" if (tensor.is_cuda or tensor.is_xpu) and _TRITON_INSTALLED else "torch"


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
