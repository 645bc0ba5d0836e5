"""Sites: where in the model a saved tensor comes from."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

_MASK = (1 << 64) - 1

#: A site's fields; a site is equal to them.
Place = tuple[str, str, str, int]


class Site(NamedTuple):
    """A place that saves a tensor: stable across steps, batches and skipped branches.

    Args:
        layer: Path of the innermost module that was running (``""`` for code outside every submodule).
        operation: Name of the operation that saved the tensor (``"linear"``, ``"gelu"``).
        role: What the tensor is to the operation: an argument's name (``"input"``) or ``"result"``.
        ordinal: How many tensors of this operation and role the same call of the layer had saved before.
    """

    layer: str
    operation: str
    role: str
    ordinal: int

    def __str__(self) -> str:
        """Return ``layer/operation.role`` with ``#ordinal`` from the second on."""
        return f"{self.layer}/{self.operation}.{self.role}" + (f"#{self.ordinal}" if self.ordinal else "")

    @property
    def stream(self) -> int:
        """A 64-bit number of its own: the site's part in the key of the rounding noise."""
        name = f"{self.layer}\0{self.operation}\0{self.role}\0{self.ordinal}".encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


class SiteTable(dict[Place, Site]):
    """Every site seen so far, by its fields, and the last key that each one has had in the current step."""

    def __init__(self) -> None:
        super().__init__()
        self._streams: dict[Place, int] = {}
        self._keys: dict[Place, int] = {}

    def start_step(self) -> None:
        """Forget the keys of the previous step; the sites stay."""
        self._keys.clear()

    def __missing__(self, fields: Place) -> Site:
        """Make a site at its first use."""
        site = self[fields] = Site(*fields)
        return site

    def noise_key(self, place: Place, base: int) -> int:
        """Return a noise key that no other tensor of this step has.

        Args:
            place: The site that is about to pack a tensor.
            base: 64-bit mix of seed, rank and step (see `mix64`).

        Returns:
            A signed 64-bit key.
        """
        last = self._keys.get(place)
        if last is None:
            stream = self._streams.get(place)
            if stream is None:
                stream = self._streams[place] = Site(*place).stream
            key = base ^ stream
        else:
            key = (last + 1) & _MASK  # no more mixing: Philox takes neighbouring keys for unrelated ones
        self._keys[place] = key
        return key - (1 << 64) if key >> 63 else key


def mix64(*words: int) -> int:
    """Hash integers to 64 bits, so that neighbouring inputs give unrelated keys.

    The finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014),
    once per word.

    Args:
        *words: Integers of any size; only their low 64 bits count.

    Returns:
        An unsigned 64-bit integer.
    """
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state
