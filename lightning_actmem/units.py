"""Amounts of memory as people write them."""

from __future__ import annotations

import re

_FACTORS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}


def parse_bytes(size: int | str) -> int:
    """Return the number of bytes that a number or a text means.

    Args:
        size: Bytes, or a text with a number and perhaps a unit: ``"4GiB"``, ``"1.5 GB"``, ``"800MB"``, ``"1000000"``;
            upper or lower case.

    Returns:
        Bytes; ``KiB`` to ``TiB`` are powers of 1024, ``kB`` to ``TB`` of 1000.

    Raises:
        ValueError: If it is no such text, or not above 0.
        TypeError: If it is neither a whole number nor a text.

    Example:
        >>> parse_bytes("4GiB"), parse_bytes("1.5 kB"), parse_bytes("1000"), parse_bytes(1000)
        (4294967296, 1500, 1000, 1000)
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", size)
        factor = None if match is None else _FACTORS.get(match[2].lower())
        if match is None or factor is None or ("." in match[1] and factor == 1):
            raise ValueError(f"an amount of memory must look like '4GiB', '800MB' or '1000000', got {size!r}.")
        count = int(float(match[1]) * factor)
    elif type(size) is int:
        count = size
    else:
        raise TypeError(f"an amount of memory must be a number of bytes or a text such as '4GiB', got {size!r}.")
    if count <= 0:
        raise ValueError(f"an amount of memory must be above 0 bytes, got {size!r}.")
    return count
