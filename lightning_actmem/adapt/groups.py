"""What the size of its groups, and keeping their means, does to a rotated code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_actmem_kernels import CodecSpec


def regrouped(segments: Iterable[Tensor], measured: CodecSpec, wanted: Sequence[CodecSpec]) -> dict[CodecSpec, Tensor]:
    """Return what other groups do to the variance that one kind of them has been measured to make.

    A rotation spreads a group's error evenly over its elements, and the error is a fixed share of the group's energy:
    of ``sum (x - mean)^2``, with the mean of the group where it is kept apart, else 0. So the variances differ as the
    sums of these over all groups; measured on a GPT and a ResNet, whose energies differ by up to a factor of 2, within
    the scatter of a few draws.

    Args:
        segments: The site's tensors as they are encoded, 1-D; taken one by one.
        measured: The codec that was measured.
        wanted: Codecs, of which those are considered that differ from it only in the size of the groups and in whether
            these keep their mean.

    Returns:
        For each of these: its variance over that of ``measured``, a scalar on the device. Nothing where no segment is
        left: what the loss does not need dies with the forward pass, and no size makes a difference.
    """
    others = [spec for spec in wanted if spec != measured and _regrouped(spec, measured) == measured]
    if measured.codec != "rotated" or not others or not segments:
        return {}
    found = [torch.stack([_energy(segment.float(), spec) for spec in (measured, *others)]) for segment in segments]
    base, *energies = torch.stack(found).sum(0).unbind()
    return {spec: torch.where(base > 0, energy / base, 1.0) for spec, energy in zip(others, energies, strict=True)}


def _regrouped(spec: CodecSpec, like: CodecSpec) -> CodecSpec:
    return replace(spec, group_size=like.group_size, centre=like.centre)


def _energy(x: Tensor, spec: CodecSpec) -> Tensor:
    # Zeros fill up the last group; the Hadamard transform keeps its error off most of them.
    groups = F.pad(x, (0, -x.numel() % spec.group_size)).view(-1, spec.group_size)
    centred = groups - groups.mean(1, keepdim=True) if spec.centre else groups
    return centred.square().sum()
