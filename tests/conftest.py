"""What every test runs under: the Triton interpreter without a GPU, a fixed seed, and a search for leaks."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import tqdm
from torch.nn.modules import module as nn_module

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    # Before anything imports triton: it decides once, when a kernel is defined, whether to interpret it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # two workers share two cores
tqdm.tqdm.monitor_interval = 0  # the first progress bar would start a monitor thread that never ends

# Without a deadline: the first example pays for imports and compilation. The same examples in every run.
hypothesis.settings.register_profile("actmem", deadline=None, derandomize=True)
hypothesis.settings.load_profile("actmem")

# Set when scikit-learn, lightning or torch.compile is first used, which may well be inside a test: left alone.
SET_ONCE = ("KMP_", "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_", "_TORCHINDUCTOR_")
# Set by Lightning for seeds, deterministic runs and process groups, and left by it: taken back, not reported.
SET_BY_LIGHTNING = frozenset(
    {
        "CUBLAS_WORKSPACE_CONFIG",
        "CUDA_DEVICE_ORDER",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "NODE_RANK",
        "OMP_NUM_THREADS",
        "PL_GLOBAL_SEED",
        "PL_SEED_WORKERS",
        "WORLD_SIZE",
    }
)
THREAD_END_S = 5.0  # a closed writer's thread still has to notice that it was closed

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Watch:
    """A piece of process-wide state that a test must leave as it was, and how to put it back."""

    name: str
    read: Callable[[], Any]
    restore: Callable[[Any], object]
    reported: bool = True  # False for what Lightning changes and leaves: put back without blaming the test


def _top_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _pop_hooks(wanted: Any) -> None:
    while _top_hooks() not in (None, wanted):
        torch._C._autograd._pop_saved_tensors_default_hooks()


def _pop_function_modes(wanted: int) -> None:
    while torch._C._len_torch_function_stack() > wanted:
        torch._C._pop_torch_function_stack()


def _pop_dispatch_modes(wanted: int) -> None:
    while torch._C._len_torch_dispatch_stack() > wanted:
        torch._C._pop_torch_dispatch_stack(None)


def _global_module_hooks() -> list[dict[Any, Any]]:
    names = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    return [dict(getattr(nn_module, f"_global_{name}")) for name in names]


def _restore_global_module_hooks(wanted: list[dict[Any, Any]]) -> None:
    names = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    for name, hooks in zip(names, wanted, strict=True):
        registry = getattr(nn_module, f"_global_{name}")
        registry.clear()
        registry.update(hooks)


def _environment() -> dict[str, str]:
    unwatched = SET_BY_LIGHTNING | {"PYTEST_CURRENT_TEST"}
    return {k: v for k, v in os.environ.items() if k not in unwatched and not k.startswith(SET_ONCE)}


def _restore_environment(wanted: dict[str, str]) -> None:
    for name in _environment().keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)


def _lightning_environment() -> dict[str, str]:
    return {name: os.environ[name] for name in SET_BY_LIGHTNING & os.environ.keys()}


def _restore_lightning_environment(wanted: dict[str, str]) -> None:
    for name in _lightning_environment().keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)


def _visible_files() -> set[str]:
    return {path.name for path in REPOSITORY.iterdir() if not path.name.startswith((".", "__pycache__"))}


WATCHES = (
    Watch("saved-tensor hooks", _top_hooks, _pop_hooks),
    Watch("torch-function modes", torch._C._len_torch_function_stack, _pop_function_modes),
    Watch("torch-dispatch modes", torch._C._len_torch_dispatch_stack, _pop_dispatch_modes),
    Watch("global module hooks", _global_module_hooks, _restore_global_module_hooks),
    Watch("grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
    Watch("default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Watch("environment variables", _environment, _restore_environment),
    Watch("working directory", os.getcwd, os.chdir),
    Watch("files in the repository", _visible_files, lambda _: None),
    Watch("Lightning's variables", _lightning_environment, _restore_lightning_environment, reported=False),
    Watch("torch threads", torch.get_num_threads, torch.set_num_threads, reported=False),
    Watch(
        "deterministic algorithms",
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
        reported=False,
    ),
)


def _difference(before: Any, after: Any) -> str:
    """Show two readings, and of dictionaries and sets only what differs."""
    if isinstance(before, dict):
        before, after = ({k: v for k, v in a.items() if b.get(k) != v} for a, b in ((before, after), (after, before)))
    elif isinstance(before, set):
        before, after = before - after, after - before
    return f"{before!r} -> {after!r}"


def _changed_state(before: list[Any]) -> Iterator[str]:
    """Restore every watched state that differs from `before` and name those that a test answers for."""
    for watch, wanted in zip(WATCHES, before, strict=True):
        found = watch.read()
        if found != wanted:
            watch.restore(wanted)
            if watch.reported:
                yield f"{watch.name}: {_difference(wanted, found)}"


def _new_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    # Foreign threads (autograd's device threads) show up as dummies; they belong to the process.
    return [t for t in set(threading.enumerate()) - before if not isinstance(t, threading._DummyThread)]


def _left_threads(before: set[threading.Thread]) -> list[str]:
    """Name the threads that a test started and that do not end by themselves."""
    if not _new_threads(before):
        return []
    gc.collect()
    end = time.monotonic() + THREAD_END_S
    for thread in _new_threads(before):
        thread.join(max(0.0, end - time.monotonic()))
    return [f"thread: {thread!r}" for thread in _new_threads(before)]


@pytest.fixture(autouse=True)
def _fail_on_leaks() -> Iterator[None]:
    """Fail a test that leaves hooks, modes, threads, variables, files or torch settings behind."""
    threads = set(threading.enumerate())
    state = [watch.read() for watch in WATCHES]
    yield
    leaks = [*_changed_state(state), *_left_threads(threads)]
    if leaks:
        pytest.fail("the test left behind\n" + "\n".join(f"- {leak}" for leak in leaks), pytrace=False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if HAS_CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
