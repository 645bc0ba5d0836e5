"""Kernels compile without a GPU, to the arithmetic that bit-equality rests on and within their limits.

Of one codec for one GPU: `make kernels-check` compiles all of them for all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parents[2] / ".ci/check_kernels.py"


@pytest.mark.slow
def test_fp8_kernels_compile_for_a_gpu(tmp_path):
    # In a process of its own: under the interpreter nothing compiles, and Triton decides that once.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, SCRIPT, "--quick", "--codec", "fp8_e4m3"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.endswith("kernels check passed\n")
    assert ran.stdout.count("fp8_e4m3 8 bit bf16") == 2  # each way
    assert "uniform" not in ran.stdout
