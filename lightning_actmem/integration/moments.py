"""The moments of a training step, for a meter: every module of the forward pass, every node of backward, the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from .shadow import shadow


@contextmanager
def told_moments(trainer: Trainer, begin: Callable[[], None], mark: Callable[[], None]) -> Iterator[None]:
    """Tell when the moments of training steps begin.

    The same steps with another batch size have the same moments, whatever happens within one of them.

    Args:
        trainer: The trainer, whose strategy runs the steps.
        begin: Called where a step begins.
        mark: Called where the next moment of it begins.

    Yields:
        Nothing.
    """
    strategy = trainer.strategy
    training_step, backward = strategy.training_step, strategy.backward

    def tell(*_: Any) -> None:
        if not torch.compiler.is_compiling():  # not a part of what a compiled module does
            mark()

    def stepping(*args: Any, **kwargs: Any) -> Any:
        begin()
        with ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(tell).remove)
            stack.callback(register_module_forward_hook(tell).remove)
            return training_step(*args, **kwargs)

    def going_back(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        mark()
        with ExitStack() as stack:
            for node in _nodes(loss.grad_fn):
                stack.callback(node.register_prehook(tell).remove)
            result = backward(loss, *args, **kwargs)
        mark()  # what follows is the optimizer's
        return result

    with ExitStack() as stack:
        shadow(stack, strategy, training_step=stepping, backward=going_back)
        yield


def _nodes(root: Node | None) -> set[Node]:
    """Return the nodes of a graph."""
    found: set[Node] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return found
