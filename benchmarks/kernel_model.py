"""How long a kernel should take on an H100, from what it reads and writes and from the instructions it compiles to.

``max(bytes / bandwidth, instructions / issue rate)``, as `.ci/check_kernels.py` prints it. It needs no GPU,
only Triton.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from lightning_actmem_kernels import CodecSpec
from lightning_actmem_kernels.spec import LOSSLESS

TARGET = "sm_90"
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@lru_cache
def _check() -> ModuleType:
    path = Path(__file__).parents[1] / ".ci/check_kernels.py"
    spec = importlib.util.spec_from_file_location("check_kernels", path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"expected the kernel check at {path}, found nothing. Run this from a checkout.")
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_kernels"] = module  # where its dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@lru_cache
def _seconds_per_element(codec: str, bits: int, dtype: str, encodes: bool) -> float:
    check = _check()
    case, target = check.Case(codec, bits, dtype, encodes), check.TARGETS[TARGET]
    slots = check.read_cuda(case.compile(target), case.elements(target)).slots
    return max(case.bytes_per_element / check.BYTES_PER_SECOND, slots / check.INSTRUCTIONS_PER_SECOND)


def predicted_ms(spec: CodecSpec, dtype: str, elements: int, direction: str) -> float:
    """Milliseconds on an H100, without what a launch takes.

    Args:
        spec: The codec; groups of 256.
        dtype: Of the tensor: ``"float32"``, ``"bfloat16"``, ``"float16"``, or that of lossless codecs.
        elements: Of the tensor.
        direction: ``"encode"`` or ``"decode"``.
    """
    if spec.codec in LOSSLESS:  # memory alone: a few instructions for each word
        itemsize = {"bool": 1, "int64": 8, "float32": 4}.get(dtype, 2)
        seconds = (itemsize + spec.bits / 8) / _check().BYTES_PER_SECOND
    else:
        codec = "centred" if spec.centre else spec.codec
        seconds = _seconds_per_element(codec, spec.bits, NAMES[dtype], direction == "encode")
    return seconds * elements * 1e3


def predicted_copy_ms(nbytes: int) -> float:
    """Milliseconds that an H100 takes to copy so many bytes."""
    return 2 * nbytes / float(_check().BYTES_PER_SECOND) * 1e3
