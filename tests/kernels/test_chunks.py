"""Chunks of groups: what they cover, and that a part-filled last group costs no copy of the rest."""

from __future__ import annotations

import pytest
import torch

from lightning_actmem.peak import PeakMeter
from lightning_actmem_kernels import CodecSpec, decode, encode
from lightning_actmem_kernels.reference.chunks import CHUNK_ELEMENTS_CPU, COPIED_ELEMENTS, group_chunks

CPU = torch.device("cpu")
SPECS = [
    CodecSpec("uniform", bits=4),
    CodecSpec("rotated", bits=2, centre=True),
    CodecSpec("relu", bits=4),
    CodecSpec("bfp", bits=4),
    CodecSpec("fixed", bits=2, low=-4.0, high=4.0),
    CodecSpec("fp8_e4m3"),
]
WHOLE, MORE = 2 * COPIED_ELEMENTS, 5
KEY = 77


@pytest.mark.parametrize("numel", [0, 1, COPIED_ELEMENTS + 1, 3 * CHUNK_ELEMENTS_CPU, 2 * CHUNK_ELEMENTS_CPU + 5])
def test_chunks_cover_all_groups_once(numel):
    chunks = list(group_chunks(numel, 256, CPU))
    groups = [group for first, last in chunks for group in range(first, last)]
    assert groups == list(range(-(-numel // 256)))
    assert all(256 * (last - first) <= CHUNK_ELEMENTS_CPU for first, last in chunks)


def peak_of(numel: int, spec: CodecSpec) -> int:
    x = torch.rand(numel)
    with PeakMeter(CPU) as meter:
        payload = encode(x, spec, key=KEY)
        decode(payload, spec, numel=numel, dtype=x.dtype, key=KEY)
    return meter.peak_bytes


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_a_few_elements_more_take_no_copy_of_the_others(spec):
    """The peak of a packed model grew by a sixth where batch x features was no multiple of the group size."""
    peak_of(WHOLE, spec)  # tables that are made once
    assert peak_of(WHOLE + MORE, spec) - peak_of(WHOLE, spec) < 4 * COPIED_ELEMENTS


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_whole_groups_have_the_same_bits_whatever_follows(spec):
    x = torch.rand(WHOLE + MORE)
    whole, more = (
        decode(encode(part, spec, key=KEY), spec, numel=len(part), dtype=x.dtype, key=KEY) for part in (x[:WHOLE], x)
    )
    assert torch.equal(whole, more[:WHOLE])
    assert (more[WHOLE:] - x[WHOLE:]).abs().max() < 2
