"""Compile every Triton kernel for four GPUs, without a GPU, and hold each to its limits.

For every kernel: instructions per element, registers, spilled bytes, the widest access to memory, and a model of the
time on an H100: max(bytes / bandwidth, instructions / issue rate). `--quick` compiles for sm_90 only, `--codec`
one codec.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_actmem_kernels.reference.bf16 import reciprocal_below
from lightning_actmem_kernels.reference.bfp import largest_mantissa
from lightning_actmem_kernels.reference.exponent import carry_and_shift
from lightning_actmem_kernels.reference.fp8 import FORMATS
from lightning_actmem_kernels.spec import WIDTHS
from lightning_actmem_kernels.triton import bfp, fixed, fp8, launch, mask, relu, rotated, tiles, uniform

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
WARPS = 4
GROUP_SIZE = 256
# H100: what a copy reaches, and 132 multiprocessors x 4 schedulers x 1.98 GHz x 32 lanes.
BYTES_PER_SECOND = 4.3e12 * 3.35 / 4.8
INSTRUCTIONS_PER_SECOND = 132 * 4 * 1.98e9 * 32
# A 64-bit product takes four issue slots.
SLOTS = {"IMAD.WIDE": 4, "IMAD.HI": 4}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
KERNELS = {
    "uniform": uniform,
    "relu": relu,
    "fixed": fixed,
    "rotated": rotated,
    "centred": rotated,
    "bfp": bfp,
    "fp8_e4m3": fp8,
    "fp8_e5m2": fp8,
}
POINTERS = {
    "codes_ptr": "*u8",
    "grids_ptr": "*i32",
    "steps_ptr": "*i16",
    "scales_ptr": "*i16",
    "exponents_ptr": "*u8",
}
META_BYTES = {
    "uniform": 4,
    "fixed": 0,
    "relu": 2,
    "rotated": 2,
    "centred": 4,
    "bfp": 1,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
}
FLOATS = frozenset(["low", "high", "scale", "factor", "offset"])

# Instructions per element, (encode, decode): 13 and 9 for uniform bf16, on every GPU; for the others, on sm_90, a few
# per cent above what was measured, to see a regression.
LIMITS = {
    **{("uniform", bits, "bf16"): (13.0, 9.0) for bits in WIDTHS["uniform"]},
    ("uniform", 4, "fp32"): (12.6, 8.6),
    ("relu", 4, "bf16"): (18.3, 12.4),
    ("relu", 4, "fp32"): (19.5, 12.8),
    ("fixed", 4, "bf16"): (13.1, 9.2),
    ("fixed", 2, "bf16"): (13.2, 9.3),
    ("fixed", 4, "fp32"): (13.1, 9.5),
    ("rotated", 1, "bf16"): (30.2, 21.5),
    ("rotated", 2, "bf16"): (34.5, 23.0),
    ("rotated", 4, "bf16"): (63.5, 30.0),
    ("rotated", 1, "fp32"): (36.8, 25.8),
    ("rotated", 4, "fp32"): (78.5, 40.0),
    # Rotated with the mean of the group apart.
    ("centred", 1, "bf16"): (32.2, 22.2),
    ("centred", 2, "bf16"): (36.4, 23.7),
    ("centred", 1, "fp32"): (39.7, 26.7),
    ("bfp", 8, "bf16"): (10.8, 8.1),
    ("bfp", 4, "bf16"): (10.9, 8.2),
    ("bfp", 2, "bf16"): (10.9, 8.2),
    ("bfp", 4, "fp32"): (10.8, 8.5),
    ("fp8_e4m3", 8, "bf16"): (19.3, 13.6),
    ("fp8_e4m3", 8, "fp32"): (19.3, 12.6),
    ("fp8_e5m2", 8, "bf16"): (19.3, 13.6),
}


@dataclass(frozen=True)
class Case:
    """One kernel to compile."""

    codec: str
    bits: int
    dtype: str
    encodes: bool

    @property
    def kernel(self) -> Any:
        """The Triton function."""
        module = KERNELS[self.codec]
        return module._encode if self.encodes else module._decode

    def elements(self, target: GPUTarget) -> int:
        """Elements of a program: a full tile, as the launcher chooses it."""
        sub_blocks, threads = 8 if KERNELS[self.codec] is rotated else 16, target.warp_size * WARPS
        itemsize = ITEMSIZE[self.dtype]
        return tiles.groups_per_program(1 << 30, GROUP_SIZE, itemsize, sub_blocks, threads) * GROUP_SIZE

    @property
    def limit(self) -> float:
        """Instructions per element."""
        return LIMITS[self.codec, self.bits, self.dtype][not self.encodes]

    @property
    def bytes_per_element(self) -> float:
        """What the kernel reads and writes."""
        return ITEMSIZE[self.dtype] + self.bits / 8 + META_BYTES[self.codec] / GROUP_SIZE

    def compile(self, target: GPUTarget) -> Any:
        """The compiled kernel, as the launcher specialises it."""
        constants = {"BITS": self.bits, "GROUP_SIZE": GROUP_SIZE, "ROWS": self.elements(target) // GROUP_SIZE}
        constants |= {
            "RAGGED": False,
            "NEAREST": False,
            "DITHER": True,
            "CENTRE": self.codec == "centred",
            "TINY": 2.0**-126,
        }
        constants |= {"RECIPROCAL": reciprocal_below((1 << self.bits) - (2 if self.codec == "relu" else 1))}
        if self.codec == "bfp":
            constants |= _scaled(largest_mantissa(self.bits))
        elif self.codec in FORMATS:
            form = FORMATS[self.codec]
            constants |= _scaled(form.largest) | {"MANTISSA": form.mantissa, "BIAS": form.bias}
        bf16 = "*i32" if self.encodes else "*i16"
        flat = bf16 if self.dtype == "bf16" else f"*{self.dtype}"
        codes = "*u8" if self.kernel in (rotated._encode, rotated._decode, fp8._decode) else "*i32"
        return compile_kernel(self.kernel, constants, {"flat_ptr": flat, "codes_ptr": codes}, target)

    def __str__(self) -> str:
        return f"{self.codec} {self.bits} bit {self.dtype} {'encode' if self.encodes else 'decode'}"


def _scaled(top: float) -> dict[str, float]:
    """Constants of the codecs with one power of two per group, whose codes reach up to `top`."""
    return {"TOP": top, **dict(zip(("CARRY", "SHIFT"), carry_and_shift(top), strict=True))}


CASES = [Case(codec, bits, dtype, encodes) for codec, bits, dtype in LIMITS for encodes in (True, False)]


def compile_kernel(kernel: Any, constants: dict[str, Any], pointers: dict[str, str], target: GPUTarget) -> Any:
    """Compile with every pointer aligned to 16 bytes, as fresh tensors are."""
    names = kernel.arg_names
    pointers = POINTERS | {"bools_ptr": "*u8", "packed_ptr": "*u8"} | pointers
    numbers = dict.fromkeys(FLOATS, "fp32")
    signature = {name: "constexpr" if name.isupper() else (pointers | numbers).get(name, "i64") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointers}
    source = ASTSource(kernel, signature, {name: constants[name] for name in names if name.isupper()}, aligned)
    with mock.patch.object(launch.AMD, "value", target.backend == "hip"):
        return triton.compile(source, target=target, options={**launch.EXACT, "num_warps": WARPS})


@dataclass(frozen=True)
class Report:
    """What a compiled kernel consists of."""

    instructions: float  # per element
    slots: float  # per element, with products at their price
    registers: int
    spilled_bytes: int
    access_bytes: int  # the widest access to global memory


def cuda_tool(name: str, *arguments: str) -> str:
    """Output of a tool of the CUDA toolkit that Triton brings along."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def read_cuda(compiled: Any, elements: int) -> Report:
    """Disassemble."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass, usage = cuda_tool("nvdisasm", "-c", file.name), cuda_tool("cuobjdump", "-res-usage", file.name)
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", sass, re.MULTILINE)
    names = [name for name in names if name != "NOP"]
    slots = sum(next((n for prefix, n in SLOTS.items() if name.startswith(prefix)), 1) for name in names)
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))  # type: ignore[index]
    widths = [int(width) // 8 for name in names for width in re.findall(r"(?:LDG|STG)\.\S*?(\d+)$", name)]
    threads = 32 * WARPS
    return Report(len(names) * threads / elements, slots * threads / elements, registers, stack, max(widths, default=4))


def read_hip(compiled: Any, elements: int) -> Report:
    """Read the assembly: no disassembler for AMD comes with Triton."""
    text = compiled.asm["amdgcn"]
    names = re.findall(r"^\s+([vs]_\w+|global_\w+|ds_\w+|buffer_\w+)\b", text, re.MULTILINE)
    names = [name for name in names if name not in ("s_nop", "s_waitcnt")]
    count = len(names) * 64 * WARPS / elements
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])  # type: ignore[index]
    spilled = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])  # type: ignore[index]
    widths = [4 * int(n) for n in re.findall(r"(?:global|buffer)_(?:load|store)_dwordx(\d)", text)]
    return Report(count, count, registers, spilled, max(widths, default=4))


def inexact(case: Case, compiled: Any) -> set[str]:
    """Instructions that would not round as the reference does."""
    # These decode by fma a product that is exact, so that it rounds once either way.
    fma = "" if case.codec in ("uniform", "relu", "bfp") and not case.encodes else r"fma\.|"
    # Older Triton flushes denormals in its exact division, which the kernels allow for.
    return set(re.findall(fma + r"(?<!div\.rn)\.ftz|\.approx|div\.full", compiled.asm.get("ptx", "")))


def faults(case: Case, name: str, compiled: Any, report: Report) -> list[str]:
    """What exceeds its limit."""
    rounding = inexact(case, compiled)
    found = [f"{case} on {name}: expected exact arithmetic, got {sorted(rounding)}"] if rounding else []
    if report.spilled_bytes:
        found.append(f"{case} on {name}: expected no spilled registers, got {report.spilled_bytes} bytes")
    if report.access_bytes < 16:
        found.append(f"{case} on {name}: expected accesses of 16 bytes, got {report.access_bytes}")
    if (name == "sm_90" or case.codec == "uniform") and report.instructions > case.limit:
        found.append(f"{case} on {name}: expected {case.limit} instructions per element, got {report.instructions:.2f}")
    return found


def check(names: list[str], codecs: list[str]) -> list[str]:
    """Compile, print a line per kernel and return what exceeds its limit."""
    found = []
    print(f"{'kernel':<28}{'target':<8}{'instr/el':>9}{'regs':>6}{'spill':>6}{'access':>7}{'ms/GB':>7}  bound by")
    for case in CASES:
        if case.codec not in codecs:
            continue
        # float32 differs in nothing that depends on the target.
        for name in names if case.dtype == "bf16" else ["sm_90"]:
            compiled = case.compile(TARGETS[name])
            read = read_cuda if name.startswith("sm") else read_hip
            report = read(compiled, case.elements(TARGETS[name]))
            memory, issue = case.bytes_per_element / BYTES_PER_SECOND, report.slots / INSTRUCTIONS_PER_SECOND
            seconds = max(memory, issue) / ITEMSIZE[case.dtype] * 1e9
            print(
                f"{case!s:<28}{name:<8}{report.instructions:>9.1f}{report.registers:>6}{report.spilled_bytes:>6}"
                f"{report.access_bytes:>7}{seconds * 1e3:>7.2f}  {'memory' if memory > issue else 'instructions'}"
                f" {min(memory, issue) / max(memory, issue):.2f}"
            )
            found += faults(case, name, compiled, report)
    for kernel in (mask._encode, mask._decode):
        for name in names:
            compile_kernel(kernel, {"WIDTH": 4096}, {}, TARGETS[name])
    return found


def main() -> None:
    """Run the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="compile for sm_90 only")
    parser.add_argument("--codec", choices=list(KERNELS), action="append", help="none but this one and masks")
    options = parser.parse_args()
    found = check(["sm_90"] if options.quick else list(TARGETS), options.codec or list(KERNELS))
    if found:
        sys.exit("kernels check failed:\n" + "\n".join(found))
    print("kernels check passed")


if __name__ == "__main__":
    main()
