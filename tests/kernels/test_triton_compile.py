"""Every kernel compiles without a GPU, and compiles to the arithmetic that bit-equality rests on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# In a process of its own: under the interpreter nothing compiles, and Triton decides that once.
COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lightning_actmem_kernels.triton import launch, mask, relu, rotated, uniform

MEMORY = {"flat_ptr": None, "codes_ptr": "*u8", "grids_ptr": "*i32", "steps_ptr": "*i16", "bools_ptr": "*u8",
          "packed_ptr": "*u8", "scales_ptr": "*i16", "numel": "i64", "key": "i64", "plane_size": "i64",
          "first_tile": "i64"}
ROUNDING = {"NEAREST": False, "DITHER": True, "TINY": 2.0**-126}

def ptx(kernel, flat="*fp32", **constants):
    constants = {name: ROUNDING.get(name, constants.get(name, 0.5)) for name in kernel.arg_names if name.isupper()}
    signature = {name: "constexpr" if name in constants else MEMORY[name] or flat for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.EXACT).asm["ptx"]

def check(kernel, **arguments):
    text = ptx(kernel, **arguments)
    # Older Triton flushes denormals in its exact division, which the kernels allow for.
    inexact = re.findall(r"fma\\.|(?<!div\\.rn)\\.ftz|\\.approx|div\\.full", text)
    assert not inexact, (kernel.__name__, arguments, set(inexact))

cases = [(4, 256, "*fp32"), (3, 32, "*i16"), (8, 1024, "*fp16"), (1, 256, "*i16")]
for bits, group_size, flat in cases:
    for codec in (uniform, relu)[: 1 if bits == 1 else 2]:
        for kernel in (codec._encode, codec._decode):
            check(kernel, flat=flat, BITS=bits, GROUP_SIZE=group_size, ROWS=4096 // group_size)
for bits, group_size, flat in ((1, 256, "*i16"), (4, 64, "*fp32")):
    for kernel in (rotated._encode, rotated._decode):
        tile = {"ROWS": 4096 // group_size, "RAGGED": False, "CENTRE": True}
        check(kernel, flat=flat, BITS=bits, GROUP_SIZE=group_size, **tile)
for kernel in (mask._encode, mask._decode):
    check(kernel, WIDTH=4096)
print("compiled")
"""


def test_kernels_compile_for_a_gpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "compiled\n"
