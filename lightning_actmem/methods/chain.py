"""Chains of element-wise operations: a result as a function of the tensors that the chain began with."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..saved.ledger import Charge
from .rules import Bounds

_LARGEST_WEIGHT = 2.0**64


class Factor(NamedTuple):
    """The derivative of a chain's result with respect to one of its roots, element by element.

    Args:
        root: The root.
        value: The derivative; a number as long as it is the same for all elements.
        bounds: A range that it lies in whatever the root is, if there is one.
        own: Whether the tensor was made for the chain: nobody else writes to it.
        versions: Of root and value, as they were.
    """

    root: Tensor
    value: Tensor | float
    bounds: Bounds | None
    own: bool
    versions: tuple[int, int]

    @staticmethod
    def of(root: Tensor, value: Tensor | float, bounds: Bounds | None = None, own: bool = True) -> Factor:
        """Make a factor of tensors as they are now."""
        version = value._version if isinstance(value, Tensor) else 0
        return Factor(root, value, bounds, own, (root._version, version))

    @property
    def constant(self) -> bool:
        """Whether the derivative is the same for all elements."""
        return not isinstance(self.value, Tensor)

    @property
    def intact(self) -> bool:
        """Whether neither root nor derivative has been changed in place."""
        version = self.value._version if isinstance(self.value, Tensor) else 0
        return self.versions == (self.root._version, version)

    def scaled(self, weight: float) -> Factor:
        """The factor of the result times a number."""
        if weight == 1.0:
            return self
        return Factor.of(self.root, self.value * weight, scaled(self.bounds, weight))

    def times(self, other: Tensor) -> Factor:
        """The factor of the result times a tensor that does not depend on the root."""
        if self.constant and self.value == 1.0:
            return Factor.of(self.root, other, own=False)
        return Factor.of(self.root, other * self.value)

    def plus(self, other: Factor) -> Factor:
        """The factor of the sum of two results with the same root."""
        return Factor.of(self.root, self.value + other.value)


class Chain(NamedTuple):
    """A tensor as an element-wise function of one or two others.

    Args:
        factors: A derivative for each of its roots that needs gradient.
        charges: For the memory that plain autograd would keep for it.
    """

    factors: tuple[Factor, ...]
    charges: tuple[Charge, ...] = ()

    @property
    def constant(self) -> bool:
        """Whether it is linear in its roots: then autograd itself keeps nothing."""
        return all(factor.constant for factor in self.factors)


def scaled(bounds: Bounds | None, weight: float) -> Bounds | None:
    """Return the range of values in ``bounds`` times a number, unless it is too wide or narrow for float32."""
    if bounds is None or not 1 / _LARGEST_WEIGHT < abs(weight) < _LARGEST_WEIGHT:
        return None
    low, high = sorted(weight * bound for bound in bounds)
    return low, high


def merged(*parts: tuple[Factor, ...]) -> tuple[Factor, ...]:
    """Return the factors of a sum of chains: those of the same root added."""
    by_root: dict[int, Factor] = {}
    for factor in (factor for part in parts for factor in part):
        known = by_root.get(id(factor.root))
        by_root[id(factor.root)] = factor if known is None else known.plus(factor)
    return tuple(by_root.values())


def root_count(*chains: Chain) -> int:
    """Return how many roots chains have together."""
    return len({id(factor.root) for chain in chains for factor in chain.factors})
