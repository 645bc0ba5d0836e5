"""What the distribution declares and holds, and which package may import which."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE_DIRS = {
    "lightning_actmem": ROOT / "lightning_actmem",
    "lightning_actmem_kernels": ROOT / "kernels" / "lightning_actmem_kernels",
}
MAX_LINES = 400  # one concept per file
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared() -> list[Requirement]:
    """Every requirement of the project and its extras."""
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]]


def pins() -> list[Requirement]:
    """Every line of constraints.txt that is not a comment."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def sources(package: str) -> list[Path]:
    """Every module of a package; a package without modules is a mistake in this file."""
    found = sorted(PACKAGE_DIRS[package].rglob("*.py"))
    assert found, f"no module in {PACKAGE_DIRS[package]}"
    return found


def test_installed_version_is_the_declared_one() -> None:
    assert importlib.metadata.version("lightning-actmem") == PROJECT["version"]


def test_declared_ranges() -> None:
    assert PROJECT["requires-python"] == ">=3.10"
    ranges = {r.name: (str(r.specifier), str(r.marker or "")) for r in map(Requirement, PROJECT["dependencies"])}
    assert ranges == {
        "lightning": ("<2.7,>=2.5", ""),
        "omegaconf": (">=2.3", ""),
        "torch": (">=2.8", ""),
        "torchmetrics": (">=1.0", ""),
        "triton": (">=3.2", 'platform_system == "Linux"'),
    }


def test_constraints_pin_exactly() -> None:
    loose = [str(pin) for pin in pins() if len(pin.specifier) != 1 or not str(pin.specifier).startswith("==")]
    assert loose == []
    local = [str(pin) for pin in pins() if "+" in str(pin.specifier)]
    assert local == [], "a local version such as 2.13.0+cpu exists only on its own index"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_requirement_has_one_pin_within_its_range(python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.0", "platform_system": "Linux"}
    pinned: dict[str, str] = {}
    for pin in pins():
        if pin.marker is None or pin.marker.evaluate(environment):
            name = canonicalize_name(pin.name)
            assert name not in pinned, f"{name} has two pins on Python {python}"
            pinned[name] = str(pin.specifier).removeprefix("==")
    for requirement in declared():
        if requirement.marker is None or requirement.marker.evaluate(environment):
            version = pinned.get(canonicalize_name(requirement.name))
            assert version is not None, f"{requirement.name} is not pinned on Python {python}"
            assert version in requirement.specifier, f"{requirement} does not allow the pinned {version}"


@pytest.mark.parametrize("package", PACKAGE_DIRS)
def test_package_is_typed(package: str) -> None:
    assert (PACKAGE_DIRS[package] / "py.typed").is_file()


def test_kernels_directory_does_not_shadow_hugging_face() -> None:
    """transformers imports Hugging Face's `kernels`; a package of ours by that name would break it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is not None
    assert spec.origin is not None
    assert not Path(spec.origin).is_relative_to(ROOT / "kernels")


@pytest.mark.parametrize("package", PACKAGE_DIRS)
def test_files_stay_short(package: str) -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(package)}
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}


@dataclass(frozen=True)
class Layer:
    """A part of the library and the modules it must not import; `above` are the parts that may use it."""

    name: str
    above: tuple[str, ...]
    exempt: tuple[str, ...] = ()

    def modules(self) -> Iterator[tuple[str, Path]]:
        """The dotted name and the file of every module of this layer."""
        package = self.name.split(".")[0]
        for path in sources(package):
            parts = path.relative_to(PACKAGE_DIRS[package].parent).with_suffix("").parts
            name = ".".join(parts)
            if within(name, self.name) and not any(within(name, other) for other in self.exempt):
                yield name, path


LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")
LAYERS = [
    Layer("lightning_actmem_kernels", above=(*LIGHTNING, "lightning_actmem", "torch.autograd")),
    Layer(
        "lightning_actmem.saved",
        above=(
            *LIGHTNING,
            "lightning_actmem.adapt",
            "lightning_actmem.methods",
            "lightning_actmem.engine",
            "lightning_actmem.integration",
        ),
    ),
    Layer(
        "lightning_actmem.adapt",
        above=(*LIGHTNING, "lightning_actmem.methods", "lightning_actmem.engine", "lightning_actmem.integration"),
    ),
    Layer(
        "lightning_actmem.methods",
        above=(*LIGHTNING, "lightning_actmem.adapt", "lightning_actmem.engine", "lightning_actmem.integration"),
    ),
    Layer(
        "lightning_actmem",
        above=(*LIGHTNING, "lightning_actmem.integration"),
        exempt=("lightning_actmem.integration", "lightning_actmem.__init__", "lightning_actmem.__main__"),
    ),
]


def within(name: str, parent: str) -> bool:
    """Whether the dotted `name` is `parent` or lies below it."""
    return name == parent or name.startswith(f"{parent}.")


def imported(source: str, module: str) -> Iterator[str]:
    """Every dotted name that a module's `source` imports, wherever in the file, relative imports resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `module` ends in __init__ for a package, so one level up is its own package in both cases.
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_imports_go_downwards(layer: Layer) -> None:
    modules = list(layer.modules())
    assert modules, f"{layer.name} has no module"
    upward = [
        f"{module} imports {name}"
        for module, path in modules
        for name in imported(path.read_text(), module)
        if any(within(name, forbidden) for forbidden in layer.above)
    ]
    assert upward == []


@pytest.mark.parametrize(
    ("source", "module", "names"),
    [
        ("import a.b, c as d", "p.q", ["a.b", "c"]),
        ("from a import b", "p.q", ["a.b"]),
        ("from . import r", "p.q", ["p.r"]),
        ("from .r import s", "p.q.__init__", ["p.q.r.s"]),
        ("from ..r import s", "p.q.t", ["p.r.s"]),
        ("def f():\n    import a", "p.q", ["a"]),
    ],
)
def test_imported_finds_every_form(source: str, module: str, names: list[str]) -> None:
    assert list(imported(source, module)) == names
