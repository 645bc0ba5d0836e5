"""Amounts of memory as people write them."""

from __future__ import annotations

import re

_FACTORS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}


def parse_bytes(text: str) -> int:
    """Return the number of bytes that a text means.

    Args:
        text: A number and a unit: ``"4GiB"``, ``"1.5 GB"``, ``"800MB"``, ``"1000000"``; upper or lower case.

    Returns:
        Bytes; ``GiB`` is 2**30, ``GB`` is 10**9.

    Raises:
        ValueError: If it is no such text.

    Example:
        >>> parse_bytes("1.5 KiB")
        1536
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    factor = None if match is None else _FACTORS.get(match[2].lower())
    if match is None or factor is None:
        raise ValueError(f"an amount of memory must look like '4GiB', '800MB' or '1000000', got {text!r}.")
    return int(float(match[1]) * factor)
