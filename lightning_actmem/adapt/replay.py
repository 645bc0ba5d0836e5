"""Replay: one forward pass, and then backward passes over its graph in which chosen sites alone are rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_actmem_kernels import CodecSpec

from ..saved.probe import Rounding, SiteUse
from ..saved.site import Site
from .linear import ClosedForm
from .outputs import Outputs

Specs = Mapping[Site, CodecSpec]


class Replay:
    """The graph of one loss, kept exact.

    Args:
        loss: The loss, computed while ``rounding`` stored the tensors.
        rounding: What backward rounds.
        closed_form: The linear layers that were run.
        outputs: The gradients behind the operations.
    """

    def __init__(self, loss: Tensor, rounding: Rounding, closed_form: ClosedForm, outputs: Outputs) -> None:
        self.closed_form = closed_form
        self.outputs = outputs
        self._loss = loss
        self._rounding = rounding

    @property
    def uses(self) -> Mapping[Site, SiteUse]:
        """The sites whose codec may be chosen, in the order of the forward pass."""
        return self._rounding.uses

    @property
    def stored_bytes(self) -> int:
        """Bytes that were stored for backward when the forward pass had ended, exact copies and all."""
        return self._rounding.ledger.peak_saved_bytes

    def segments(self, site: Site, spec: CodecSpec) -> Iterator[Tensor]:
        """Yield the tensors of a site as this codec would encode them, 1-D."""
        return self._rounding.segments(site, spec)

    def backward(self, parameters: Sequence[Tensor], specs: Specs, visit: Callable[[int, Tensor], None]) -> None:
        """Compute the gradient and show it to ``visit``, one parameter after the other, each freed at once.

        Nothing is accumulated in ``.grad`` and no hook of a gradient accumulator (DDP's) runs.

        Args:
            parameters: The parameters.
            specs: The sites that are rounded, and how; with noise of its own in each call.
            visit: Called with a parameter's index and its gradient.
        """
        self._rounding.choose(specs)
        hooks = [parameter.register_hook(partial(_visit, visit, index)) for index, parameter in enumerate(parameters)]
        try:
            torch.autograd.grad(self._loss, list(parameters), retain_graph=True, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
            self._rounding.choose({})


def _visit(visit: Callable[[int, Tensor], None], index: int, gradient: Tensor) -> Tensor:
    dense = gradient.detach()
    visit(index, dense.to_dense() if dense.is_sparse else dense)
    # Autograd would hold every parameter's gradient until the pass ends; one number of that shape takes no memory.
    return torch.zeros((), dtype=gradient.dtype, device=gradient.device).expand(gradient.shape)


class ExactGradient:
    """The exact gradient of one sub-batch: what the others are compared with, held once.

    Args:
        parameters: The parameters that require gradients.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = tuple(parameters)
        self._gradient: dict[int, Tensor] = {}

    def take(self, replay: Replay) -> tuple[Tensor, Tensor]:
        """Hold a sub-batch's exact gradient from now on.

        Returns:
            Its squared size, and its squared distance to the one held before: scalars on the device.
        """
        size, distance = self._zero(), self._zero()

        def visit(index: int, gradient: Tensor) -> None:
            before = self._gradient.get(index)
            size.add_(self._square(gradient))
            distance.add_(self._square(gradient if before is None else gradient - before))
            if before is None:
                self._gradient[index] = gradient.clone()
            else:
                before.copy_(gradient)

        replay.closed_form.collecting = True
        replay.backward(self._parameters, {}, visit)
        replay.closed_form.collecting = False
        return size, distance

    def error(self, replay: Replay, specs: Specs) -> Tensor:
        """Return ``|g' - g|^2`` for one draw of the rounding noise at these sites, a scalar on the device."""
        total = self._zero()

        def visit(index: int, gradient: Tensor) -> None:
            total.add_(self._square(gradient - self._gradient[index]))

        replay.backward(self._parameters, specs, visit)
        return total

    def bias(self, replay: Replay, specs: Specs, draws: int) -> Tensor:
        """Return the squared bias ``|E g' - g|^2``, estimated without bias from products of independent draws.

        With the errors e_1 ... e_n: ``(|sum e_i|^2 - sum |e_i|^2) / (n (n - 1))``. It holds one gradient more.

        Args:
            replay: The graph.
            specs: The sites that are rounded.
            draws: Number of draws n, at least 2.

        Returns:
            A scalar on the device; it may be below zero by chance.
        """
        if draws < 2:
            raise ValueError(f"draws must be at least 2, got {draws}. A bias shows in the product of two draws.")
        sums: dict[int, Tensor] = {}
        squares = self._zero()

        def visit(index: int, gradient: Tensor) -> None:
            error = gradient - self._gradient[index]
            squares.add_(self._square(error))
            sums[index] = error if index not in sums else sums[index].add_(error)

        for _ in range(draws):
            replay.backward(self._parameters, specs, visit)
        product = self._zero()
        for total in sums.values():
            product.add_(self._square(total))
        return (product - squares) / (draws * (draws - 1))

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self._parameters[0].device)

    def _square(self, x: Tensor) -> Tensor:
        # A model may lie on several devices.
        size: Tensor = torch.linalg.vector_norm(x, dtype=torch.float32)
        return size.square().to(self._parameters[0].device)
