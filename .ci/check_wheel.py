"""Build the wheel, install it outside the checkout and import it there.

An editable install hides what a wheel lacks. It also hides a `kernels` directory that would end up as a top-level
package and shadow the one of Hugging Face, which transformers imports.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lightning_actmem", "lightning_actmem_kernels")

PROBE = """
import importlib.util, sys
from pathlib import Path

installed = Path(sys.argv[1])

def inside(module):
    return installed in Path(module.__file__).resolve().parents

import lightning_actmem, lightning_actmem_kernels
for module in (lightning_actmem, lightning_actmem_kernels):
    if not inside(module):
        sys.exit(f"{module.__name__} must come from the wheel in {installed}, got {module.__file__}.")

import kernels
if not getattr(kernels, "__file__", None) or inside(kernels) or not hasattr(kernels, "get_kernel"):
    sys.exit(f"`import kernels` must be Hugging Face's package, got {kernels!r}.")

from lightning.pytorch.strategies import StrategyRegistry
missing = {"actmem", "actmem_ddp"} - set(StrategyRegistry.available_strategies())
if missing:
    sys.exit(f"import lightning_actmem must register the strategies actmem and actmem_ddp, missing: {sorted(missing)}.")
"""


def run(step: str, *command: str, cwd: Path, **env: str) -> None:
    """Run a Python command and, if it fails, end with the step's name and what it printed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"wheel check failed: {step}\n{done.stdout.rstrip()}")


def build_wheel(out_dir: Path) -> Path:
    """Build the wheel into `out_dir` with the hatchling of this environment."""
    run("build", "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out_dir), str(ROOT), cwd=out_dir)
    (wheel,) = out_dir.glob("*.whl")
    return wheel


def wrong_contents(files: list[str]) -> Iterator[str]:
    """Say what is missing from a wheel's `files` and what must not be there."""
    top_level = {name.split("/")[0] for name in files}
    unexpected = {name for name in top_level if name not in PACKAGES and not name.endswith(".dist-info")}
    if unexpected:
        yield f"expected only {' and '.join(PACKAGES)} at the top level, got also {sorted(unexpected)}"
    for package in PACKAGES:
        for file in (f"{package}/__init__.py", f"{package}/py.typed"):
            if file not in files:
                yield f"{file} is missing"
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in files):
        yield "the LICENSE is missing"


def main() -> None:
    """Build, look inside, install, import."""
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch).resolve()
        wheel_dir, installed, elsewhere = base / "wheel", base / "installed", base / "elsewhere"
        wheel_dir.mkdir()
        elsewhere.mkdir()
        wheel = build_wheel(wheel_dir)
        problems = list(wrong_contents(zipfile.ZipFile(wheel).namelist()))
        if problems:
            sys.exit("wheel check failed: contents\n" + "\n".join(f"- {problem}" for problem in problems))
        pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(installed))
        run("install", *pip, str(wheel), cwd=elsewhere)
        run("import", "-c", PROBE, str(installed), cwd=elsewhere, PYTHONPATH=str(installed))
        print(f"{wheel.name}: built, installed and imported outside the checkout")


if __name__ == "__main__":
    main()
