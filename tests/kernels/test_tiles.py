"""What is launched for a tensor of a given size: whole tiles, a ragged one, and one case for all that share it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lightning_actmem_kernels.triton import tiles
from lightning_actmem_kernels.triton.launch import as_it_is, as_pairs, as_words, code_words
from lightning_actmem_kernels.triton.tiles import TiledKernel

GROUP = 256
FULL = tiles._THREADS * 16 * 16 // 2  # elements of a program: 16 vectors of 16 bytes for each thread, bfloat16


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(tiles, "_launches", tiles._launches.__wrapped__)


def _kernel():
    """Identity alone counts."""


def _launches(numel, dtype=torch.bfloat16, tiled=None):
    tiled = tiled or TiledKernel(_kernel, lambda group_size, bits: (bits, group_size), reads_pairs=True)
    return tiles._launches(tiled, dtype, 0, numel, GROUP, 4)


def _where(launches):
    return [(programs, first_tile) for _, programs, first_tile in launches]


@pytest.mark.parametrize(
    ("numel", "wanted"),
    [
        (0, []),
        (1, [(1, 0)]),
        (GROUP, [(1, 0)]),
        (FULL - 1, [(1, 0)]),
        (FULL, [(1, 0)]),
        (FULL + GROUP, [(2, 0)]),
        (FULL + 1, [(1, 0), (1, 1)]),
        (10 * FULL - 1, [(9, 0), (1, 9)]),
        (2**40, [(2**40 // FULL, 0)]),
    ],
)
def test_whole_tiles_and_a_ragged_one(numel, wanted):
    launches = _launches(numel)
    assert _where(launches) == wanted
    ragged = [case._constants[-1] for case, _, _ in launches]
    assert ragged == [False] * (len(wanted) - (numel % GROUP > 0)) + [True] * (numel % GROUP > 0)


def test_a_case_is_one_for_every_size_of_tensor_with_its_tiles():
    tiled = TiledKernel(_kernel, lambda group_size, bits: (bits, group_size))
    cases = [_launches(n * FULL, tiled=tiled)[0][0] for n in (1, 2, 3)]
    assert cases[0] is cases[1] is cases[2]
    others = [_launches(FULL // 2, tiled=tiled)[0][0], _launches(FULL, torch.float32, tiled)[0][0]]
    assert len({id(case) for case in (*cases, *others)}) == 3


def test_what_a_kernel_is_compiled_for():
    (whole, _, _), (ragged, _, _) = _launches(FULL + 1)
    assert whole._constants == (4, GROUP, FULL // GROUP, False)
    assert ragged._constants == (4, GROUP, FULL // GROUP, True)
    assert (whole._views, ragged._views) == ((as_pairs, code_words), (as_words, code_words))
    tiled = TiledKernel(_kernel, lambda group_size, bits: (bits,), words=False)
    assert _launches(FULL, tiled=tiled)[0][0]._views == (as_words, as_it_is)


def test_a_small_tensor_has_a_small_tile_of_whole_blocks_of_signs():
    for numel in (1, 100, 256, 300, 1000):
        (*_, rows, _) = _launches(numel)[0][0]._constants
        assert rows * GROUP >= min(numel, 128)
        assert rows * GROUP < 2 * max(numel, GROUP)
