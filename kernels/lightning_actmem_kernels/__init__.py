"""Codecs for saved activations: tensors in, tensors out.

The pure-torch code in `lightning_actmem_kernels.reference` defines every codec; the Triton kernels in
`lightning_actmem_kernels.triton` return the same bits. Nothing here knows of autograd or Lightning.
"""

from .codec import decode as decode
from .codec import encode as encode
from .codec import resolve_backend as resolve_backend
from .layout import Layout as Layout
from .reference.compiled import cpu_path as cpu_path
from .reference.integer import integer_bits as integer_bits
from .spec import CodecSpec as CodecSpec

__all__ = ["CodecSpec", "Layout", "cpu_path", "decode", "encode", "integer_bits", "resolve_backend"]
