"""What codecs of independent groups share: memory for codes, and the loops over chunks of groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..noise import noise_of, words_by_chunk
from .chunks import group_chunks, groups_of, load_groups
from .compiled import run
from .memory import empty

MAGIC = 2.0**23  # added to a float32 from 0 to 2**22, it rounds it to an integer in the low bits


def empty_codes(flat: Tensor, bits: int, group_size: int) -> Tensor:
    """Memory for the codes of a flat tensor: uint8 [N, b, G/8]."""
    return flat.new_empty(-(-flat.numel() // group_size), bits, group_size // 8, dtype=torch.uint8)


def encode_by_chunk(
    function: Callable[..., tuple[Tensor, ...]],
    constants: tuple[Any, ...],
    flat: Tensor,
    group_size: int,
    key: int,
    outputs: Sequence[Tensor],
) -> None:
    """Write what `function(x, words, *constants)` returns of the groups x [R, G] of a flat tensor.

    Args:
        function: Takes groups, which it may not write to, and their `group_words`; returns a tensor for each output.
        constants: What else it takes.
        flat: 1-D contiguous, n elements in N = ceil(n / G) groups.
        group_size: Elements per group G.
        key: 64-bit key of the noise stream.
        outputs: Each with N rows.
    """
    chunks = group_chunks(flat.numel(), group_size, flat.device)
    for first, last, words in words_by_chunk(key, chunks, flat.device):
        # Not in the function: compiled, the conversion of bfloat16 takes longer than all the rest.
        x = load_groups(flat, first, last, group_size).to(torch.float32)
        for output, rows in zip(outputs, run(function, (x, words), constants, x.numel()), strict=True):
            output[first:last] = rows


def decode_by_chunk(
    function: Callable[..., None],
    constants: tuple[Any, ...],
    payload: tuple[Tensor, ...],
    key: int,
    numel: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the flat tensor that `function(*payload, words, out, *constants)` writes, groups out [R, G] at a time.

    Args:
        function: Takes rows of the payload, the groups' `group_words`, and the memory to write to.
        constants: What else it takes.
        payload: Tensors with N rows, the codes, uint8 [N, b, G/8], first.
        key: 64-bit key of the noise stream.
        numel: Elements n.
        dtype: float32, bfloat16 or float16.
    """
    codes = payload[0]
    group_size = 8 * codes.shape[2]
    flat = empty(numel, dtype, codes.device)
    for first, last, words in words_by_chunk(key, group_chunks(numel, group_size, codes.device), codes.device):
        with groups_of(flat, first, last, group_size) as out:
            rows = (part[first:last] for part in payload)
            run(function, (*rows, words, out), constants, out.numel())
    return flat


def rounded(v: Tensor, words: Tensor, rounding: str) -> Tensor:
    """Codes of fixed-point numbers with 8 bits of fraction in the low bits of v, float32 [R, G], which is overwritten.

    Args:
        v: `MAGIC` and 256 times the position on the grid: the magic number leaves it in the mantissa.
        words: From `group_words`.
        rounding: `nearest` adds a half; the others add the noise, so that the next code is taken in proportion.
    """
    lanes = v.view(torch.int32).add_(128 if rounding == "nearest" else noise_of(words, v.shape[1]))
    return lanes.bitwise_right_shift_(8).to(torch.uint8)
