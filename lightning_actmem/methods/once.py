"""What can be differentiated once says so when it is to be differentiated twice."""

from __future__ import annotations

import torch

from ..errors import ActMemError


def require_first_order(operation: str, mode: str) -> None:
    """Refuse a backward pass that is itself to be differentiated.

    At once, and not like ``torch.autograd.function.once_differentiable`` only when a second backward pass arrives: of
    that one, ``torch.autograd.grad`` may leave out the part that would raise the error.

    Args:
        operation: Name of the operation, for the message.
        mode: The setting that it is replaced by, likewise.

    Raises:
        ActMemError: If the backward pass runs with ``create_graph=True``.
    """
    if torch.is_grad_enabled():
        raise ActMemError(
            f"cannot run the backward of {operation} with create_graph=True: with activations={mode!r} only what its "
            f"first derivative needs is stored. Use activations='derive', or exact=['op:{operation}'] to leave this "
            "operation alone."
        )
