"""Attention whose backward is consistent with what is stored of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False}


def recomputed_attention(
    function: Callable[..., Tensor], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> Tensor:
    """Run scaled_dot_product_attention so that its backward recomputes everything from the stored query, key and value.

    The fused kernels save the output and the log-sum-exp of the scores. With rounded queries and keys beside the exact
    log-sum-exp, ``exp(q k - lse)`` is no longer a probability: at 2 bits gradients are off by many orders of magnitude.
    Running the forward again from what is stored makes the backward the exact gradient at a rounded point, whichever
    kernel runs, with mask, causality, grouped queries and the forward's own dropout.

    Args:
        function: ``torch.nn.functional.scaled_dot_product_attention``.
        arguments: Its positional arguments.
        keywords: Its keyword arguments.

    Returns:
        The output of attention.
    """
    given = {**_DEFAULTS, **dict(zip(_POSITIONAL, arguments, strict=False)), **keywords}
    dropout = given["dropout_p"] > 0  # only then is the random state worth its copy
    positional = [given.pop(name) for name in _POSITIONAL]

    def run(*tensors: Any) -> Tensor:
        with torch._C.DisableTorchFunction():
            return function(*tensors, **given)

    if not any(isinstance(value, Tensor) and value.requires_grad for value in positional):
        return run(*positional)
    result: Tensor = checkpoint(run, *positional, use_reentrant=False, preserve_rng_state=dropout)
    return result
