"""Errors and warnings of this package."""

from __future__ import annotations


class ActMemError(RuntimeError):
    """Something that compressed activations cannot do, with what to do instead."""


class ActMemWarning(UserWarning):
    """Something that works, but not as the user may expect."""
