"""How much of its memory a tensor is, and how much its code would be."""

from __future__ import annotations

from torch import Tensor

from lightning_actmem_kernels import CodecSpec, Layout


def fills(tensor: Tensor, layout: Layout) -> bool:
    """Whether a tensor is all of its storage."""
    return layout.dense and tensor.untyped_storage().nbytes() == tensor.nbytes


def has_rows(tensor: Tensor, layout: Layout) -> bool:
    """Whether memory holds what the first dimension counts one behind the other."""
    return bool(layout.size) and layout.dense and tensor.stride(0) * layout.size[0] == layout.numel


def code_bytes(spec: CodecSpec | None, layout: Layout | None, tensor: Tensor, nbytes: int) -> int | None:
    """Bytes of a tensor's code; ``None`` where it has none, or one that takes no less than the storage's ``nbytes``."""
    if spec is None or layout is None:
        return None
    code_bytes = spec.stored_bytes(layout.numel, tensor.dtype)
    return code_bytes if code_bytes < nbytes or spec.codec == "identity" else None
