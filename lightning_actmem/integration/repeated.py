"""The repeated blocks of a model, and how to run them inside ``torch.utils.checkpoint``."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from .shadow import shadow


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return what is usually checkpointed: the blocks that a model is a sequence of.

    Blocks are modules with submodules, of one class, two or more of which stand in one ``nn.ModuleList`` or
    ``nn.Sequential``. Of several such classes it is the one with most parameters; all of its blocks count, so that
    the four stages of a ResNet are taken together.

    Args:
        model: The model.

    Returns:
        The blocks by name, in the model's order; empty if nothing is repeated.
    """
    found: dict[type[nn.Module], dict[str, nn.Module]] = {}
    for path, container in model.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)):
            continue
        blocks = [(name, block) for name, block in container.named_children() if any(block.children())]
        classes = [type(block) for _, block in blocks]
        for name, block in blocks:
            if classes.count(type(block)) > 1:
                found.setdefault(type(block), {})[f"{path}.{name}" if path else name] = block
    return max(found.values(), key=_parameters, default={})


def matching(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """Return the submodules whose names match one of the patterns.

    Raises:
        ValueError: If none does.
    """
    matched = {
        name: module for name, module in model.named_modules() if any(fnmatch.fnmatch(name, p) for p in patterns)
    }
    if not matched:
        raise ValueError(f"checkpointed must match submodules of the model, got {list(patterns)}: none matches.")
    return matched


@contextmanager
def checkpointing(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Run these modules inside ``torch.utils.checkpoint``, each by itself."""
    with ExitStack() as stack:
        for module in modules.values():
            if "forward" not in vars(module):
                shadow(stack, module, forward=partial(checkpoint, module.forward, use_reentrant=False))
        yield


def _parameters(blocks: Mapping[str, nn.Module]) -> int:
    return sum(parameter.numel() for parameter in nn.ModuleList(blocks.values()).parameters())
