"""Attention whose backward is consistent with what is stored of its inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

_PLAIN = (Tensor, nn.Parameter)
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

    kernels = _enabled_kernels()

    def run(*tensors: Any) -> Tensor:
        # The kernel of the forward, whatever is allowed when backward runs.
        chosen = contextlib.nullcontext() if _enabled_kernels() == kernels else sdpa_kernel(kernels)
        with torch._C.DisableTorchFunction(), chosen:
            return function(*tensors, **given)

    tensors = [value for value in positional if isinstance(value, Tensor)]
    if not all(type(tensor) in _PLAIN and not tensor.is_nested for tensor in tensors):
        return function(*arguments, **keywords)
    if not any(tensor.requires_grad for tensor in tensors):
        return run(*positional)
    result: Tensor = checkpoint(run, *positional, use_reentrant=False, preserve_rng_state=dropout)
    return result


def _enabled_kernels() -> list[SDPBackend]:
    backends = torch.backends.cuda
    enabled = {
        SDPBackend.FLASH_ATTENTION: backends.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: backends.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: backends.cudnn_sdp_enabled(),
        SDPBackend.MATH: backends.math_sdp_enabled(),
    }
    return [backend for backend, is_enabled in enabled.items() if is_enabled]
