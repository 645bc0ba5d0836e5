"""Amounts of memory, the same for every setting and argument that takes one."""

from __future__ import annotations

import pytest

from lightning_actmem.units import parse_bytes


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("4GiB", 4 * 2**30),
        ("500 MB", 500 * 10**6),
        ("1.5kib", 1536),
        ("2TB", 2 * 10**12),
        ("7b", 7),
        ("1000000", 1000000),
        (12, 12),
    ],
)
def test_sizes(size: int | str, count: int) -> None:
    assert parse_bytes(size) == count


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        ("4 gigs", ValueError, "like '4GiB', '800MB' or '1000000', got '4 gigs'"),
        ("GiB", ValueError, "like '4GiB'"),
        ("-4GiB", ValueError, "like '4GiB'"),
        (0, ValueError, "above 0 bytes, got 0"),
        ("0", ValueError, "above 0 bytes, got '0'"),
        ("4.5", ValueError, "like '4GiB', '800MB' or '1000000', got '4.5'"),
        ("4.5 b", ValueError, "like '4GiB', '800MB' or '1000000', got '4.5 b'"),
        (True, TypeError, "got True"),
        (1.5, TypeError, "got 1.5"),
    ],
)
def test_bad_sizes(size: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_bytes(size)  # type: ignore[arg-type]
