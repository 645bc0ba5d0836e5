"""A training step that leaves no trace: its loss and its graph are wanted, and nothing else of it."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import is_namedtuple
from torch import Tensor, nn

from .shadow import shadow

# What every module has of its own: parameters, submodules, hooks. A training step does not exchange these.
_OWN_TABLES = frozenset(vars(nn.Module()))


class NoLossError(Exception):
    """A ``training_step`` gave no loss: it returned ``None``, or optimised by hand without ``manual_backward``."""


class _LossFound(BaseException):
    """Ends a ``training_step`` at its first ``manual_backward``; passes a user's ``except Exception``."""


@contextmanager
def quiet(trainer: Trainer) -> Iterator[None]:
    """Keep what training steps inside this context do away from the rest of the run.

    Restored or held back: the global random states (Python, NumPy, PyTorch, devices), ``.grad``, loggers, steps of
    optimizers and schedulers, buffers, and parameters that require no gradient (a momentum encoder's): the module has
    copies of them inside, so that the originals stay what they were, to the bit, and so does the version counter that
    autograd looks at.

    Args:
        trainer: The trainer, in ``fit``.
    """
    module = trainer.lightning_module
    with _own_buffers(module), _own_frozen(module), ExitStack() as stack:
        _restore_random_states(trainer.strategy.root_device, stack)
        for parameter in module.parameters():
            stack.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None  # a manual `zero_grad` would clear what has been accumulated
        stack.callback(setattr, trainer, "loggers", trainer.loggers)
        trainer.loggers = [DummyLogger() for _ in trainer.loggers]
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        for target in (*trainer.optimizers, *schedulers):
            shadow(stack, target, step=_nothing)
        shadow(stack, trainer.strategy, optimizer_step=_nothing)
        yield


def quiet_loss(trainer: Trainer, batch: Any, batch_idx: int) -> Tensor:
    """Run ``training_step`` on a batch and return its loss; call it inside `quiet`.

    It runs as in training, under the precision plugin's autocast, but on the module itself: no reducer of DDP hears of
    it. Under manual optimisation it ends at the first ``manual_backward``, whose argument is the loss. Nothing is
    logged. Metric states, tensors, random generators, lists, dicts, sets and deques in any nesting, and all other
    attributes of every submodule are afterwards what they were; nothing of them keeps the graph alive. Out of reach:
    what the step modifies in place in other objects, what the user's own hooks do, and what lies outside the module.

    Args:
        trainer: The trainer, in ``fit``.
        batch: The batch, on the device.
        batch_idx: Its number, as ``training_step`` gets it.

    Returns:
        The loss, with its graph.

    Raises:
        NoLossError: If the step gives none.
    """
    module = trainer.lightning_module
    arguments = [batch]
    if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
        arguments.append(batch_idx)
    found: list[Tensor] = []

    def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        found.append(loss)
        raise _LossFound

    with _own_attributes(module), ExitStack() as stack:
        shadow(stack, module, log=_nothing, log_dict=_nothing, manual_backward=manual_backward)
        with trainer.strategy.precision_plugin.train_step_context():
            try:
                output = module.training_step(*arguments)
            except _LossFound:
                return found[0]
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise NoLossError("training_step gave no loss to differentiate")
    return loss


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _restore_random_states(device: torch.device, stack: ExitStack) -> None:
    """Restore the global random states of Python, NumPy, the CPU and the devices when the stack unwinds."""
    stack.callback(_set_rng_states, _collect_rng_states(include_cuda=device.type == "cuda"))
    if device.type not in ("cpu", "cuda"):
        backend = torch.get_device_module(device)
        stack.callback(backend.set_rng_state, backend.get_rng_state())


@contextmanager
def _own_buffers(root: nn.Module) -> Iterator[None]:
    """Give every submodule copies of its buffers, and take them away at the end."""
    copies: dict[int, Any] = {}
    with ExitStack() as stack:
        for module in root.modules():
            stack.callback(_put_back, module._buffers, dict(module._buffers))
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else _copy_tensor(buffer, copies)
        yield


@contextmanager
def _own_frozen(root: nn.Module) -> Iterator[None]:
    """Give every submodule copies of its parameters without gradient, and take them away at the end."""
    copies: dict[int, nn.Parameter] = {}
    with ExitStack() as stack:
        for module in root.modules():
            if isinstance(module, nn.RNNBase):
                continue  # runs on a list of its weights; nobody exchanges that
            stack.callback(_put_back, module._parameters, dict(module._parameters))
            for name, parameter in module._parameters.items():
                # Classes of their own hold more than their data (quantised weights), and no step updates them.
                if type(parameter) is not nn.Parameter or parameter.requires_grad:
                    continue
                if id(parameter) not in copies:
                    stack.callback(parameter.requires_grad_, False)
                    copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                module._parameters[name] = copies[id(parameter)]
        yield


@contextmanager
def _own_attributes(root: nn.Module) -> Iterator[None]:
    """Give every submodule copies of metric states, tensors, generators and containers, and take them away again."""
    copies: dict[int, Any] = {}
    with ExitStack() as stack:
        for parameter in root.parameters():  # `toggle_optimizer` changes it
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
        for module in root.modules():
            stack.callback(_put_back, vars(module), dict(vars(module)))
            states = getattr(module, "_defaults", ())  # those of torchmetrics
            for name, value in list(vars(module).items()):
                if name in states and isinstance(value, Tensor):
                    vars(module)[name] = _copy_tensor(value, copies)
                elif name not in _OWN_TABLES:
                    vars(module)[name] = _copy(value, copies)
        yield


def _put_back(table: dict[str, Any], before: dict[str, Any]) -> None:
    """Give a table its former entries."""
    for name in table.keys() - before.keys():
        del table[name]
    table.update(before)


def _copy_tensor(tensor: Tensor, copies: dict[int, Any]) -> Tensor:
    """Return one and the same copy of a tensor wherever it is met, without its graph."""
    if id(tensor) not in copies:
        copies[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.is_leaf and tensor.requires_grad)
    made: Tensor = copies[id(tensor)]
    return made


def _copy(value: Any, copies: dict[int, Any]) -> Any:
    """Return one and the same copy of a tensor, generator or container, and of what it holds, wherever it is met."""
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, Tensor):
        has_own_data = value.grad_fn is None and not isinstance(value, nn.Parameter)
        return _copy_tensor(value, copies) if has_own_data else value
    if isinstance(value, torch.Generator):
        copies[id(value)] = value.clone_state()
    elif isinstance(value, (random.Random, np.random.Generator, np.random.RandomState)):
        copies[id(value)] = copy.deepcopy(value)
    elif isinstance(value, (list, dict, set, deque)):
        return _copy_container(value, copies)
    elif type(value) is tuple or is_namedtuple(value):
        parts = [_copy(part, copies) for part in value]
        copies[id(value)] = type(value)(*parts) if is_namedtuple(value) else tuple(parts)
    return copies.get(id(value), value)


def _copy_container(value: Any, copies: dict[int, Any]) -> Any:
    try:
        made = copy.copy(value)
    except Exception:  # of whatever class it is: then it stays
        return value
    copies[id(value)] = made  # before its contents, which may refer to it
    if isinstance(made, dict):
        for key, part in list(made.items()):
            dict.__setitem__(made, key, _copy(part, copies))
    elif isinstance(made, list):
        made[:] = [_copy(part, copies) for part in made]
    elif isinstance(made, deque):
        parts = [_copy(part, copies) for part in made]
        made.clear()
        made.extend(parts)
    return made
