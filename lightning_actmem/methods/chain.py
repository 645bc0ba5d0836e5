"""Chains of element-wise operations: a result as a function of the tensors that the chain began with."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..saved.ledger import Charge
from .rules import Bounds, Curve


class Factor(NamedTuple):
    """The derivative of a chain's result with respect to one of its roots, element by element: ``weight * value``.

    Args:
        root: The root.
        versions: Of root and value, as they were.
        weight: A number.
        value: A tensor; ``None`` as long as the derivative is the same for all elements.
        bounds: A range that the value lies in whatever the root is, if there is one.
        own: Whether the value was made for the chain: nobody else writes to it.
        from_leaf: Whether the root was a leaf of autograd's graph.
    """

    root: Tensor
    versions: tuple[int, int]
    weight: float = 1.0
    value: Tensor | None = None
    bounds: Bounds | None = None
    own: bool = True
    from_leaf: bool = False

    @staticmethod
    def of(root: Tensor) -> Factor:
        """The factor of a root itself."""
        return Factor(root, (root._version, 0), from_leaf=root.is_leaf)

    @property
    def intact(self) -> bool:
        """Whether neither root nor value has been changed in place, nor the root detached."""
        root = self.root
        attached = root.requires_grad and root.is_leaf == self.from_leaf
        return attached and self.versions == (root._version, _version(self.value))

    def scaled(self, weight: float) -> Factor:
        """The factor of the result times a number."""
        return self._replace(weight=self.weight * weight)

    def times(self, other: Tensor) -> Factor:
        """The factor of the result times a tensor that does not depend on the root."""
        if self.value is None:
            return self._with(other, own=False)
        return self._with(self.value * other)

    def plus(self, other: Factor) -> Factor:
        """The factor of the sum of two results with the same root."""
        if self.value is None and other.value is None:
            return self._replace(weight=self.weight + other.weight)
        total = self._product() + other._product()
        assert isinstance(total, Tensor), "one of the two is a tensor"
        return self._with(total)._replace(weight=1.0)

    def through(self, curve: Curve, x: Tensor, y: Tensor) -> Factor:
        """The factor of a function of the result.

        Args:
            curve: The function.
            x: The result.
            y: Its function, of the same dtype.
        """
        if self.value is not None:
            return self._with(curve.chain(self.value, x, y))
        if curve.multiple is not None:
            return self._with(x.detach(), own=False).scaled(curve.multiple)
        one = y.new_ones(()).expand_as(y)  # takes no memory
        return self._with(curve.chain(one, x, y), curve.bounds)

    def _product(self) -> Tensor | float:
        return self.weight if self.value is None else self.value * self.weight

    def _with(self, value: Tensor, bounds: Bounds | None = None, own: bool = True) -> Factor:
        versions = self.versions[0], value._version
        return self._replace(versions=versions, value=value, bounds=bounds, own=own)


class Chain(NamedTuple):
    """A tensor as an element-wise function of one or two others.

    Args:
        factors: A derivative for each of its roots that needs gradient.
        charges: For the memory that plain autograd would keep for it.
    """

    factors: tuple[Factor, ...]
    charges: tuple[Charge, ...] = ()

    @property
    def linear(self) -> bool:
        """Whether it is linear in its roots: then autograd itself keeps nothing."""
        return all(factor.value is None for factor in self.factors)


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


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor._version
