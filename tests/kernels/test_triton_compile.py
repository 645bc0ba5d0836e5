"""Every kernel compiles without a GPU, to the arithmetic that bit-equality rests on and within its limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parents[2] / ".ci/check_kernels.py"


@pytest.mark.slow
def test_kernels_compile_for_a_gpu(tmp_path):
    # In a process of its own: under the interpreter nothing compiles, and Triton decides that once.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run(
        [sys.executable, SCRIPT, "--quick"], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.endswith("kernels check passed\n")
