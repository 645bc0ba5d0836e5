"""Noise: the published generator, the same bits as Triton's, in the documented order, and statistically clean."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_actmem_kernels.noise import (
    COLUMN_MULTIPLIER,
    GROUPS_AT_ONCE,
    MASK_32,
    PLANE_MULTIPLIERS,
    SIGN_STREAM,
    factors,
    group_words,
    noise_bytes,
    philox,
    sign_bytes,
    words_by_chunk,
)

CPU = torch.device("cpu")
SIGMAS = 5.0  # a false alarm once in two million draws; the keys are fixed, so once for all


def _words(index, key):
    return [word & MASK_32 for word in philox(torch.as_tensor(index), key)]


def test_known_answer():
    """The vector for 7 rounds that ships with Random123, the authors' own library."""
    words = _words([0], 0)
    assert [int(word) for word in words] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


def _philox_by_hand(index, key, stream=0):
    c, k = [index & MASK_32, index >> 32, stream, 0], [key & MASK_32, key >> 32 & MASK_32]
    for _ in range(7):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & MASK_32, a >> 32 ^ c[3] ^ k[1], a & MASK_32]
        k = [(k[0] + 0x9E3779B9) & MASK_32, (k[1] + 0xBB67AE85) & MASK_32]
    return c


@given(st.integers(0, 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_equals_exact_integer_arithmetic(index, key):
    assert [int(word) for word in _words([index], key)] == _philox_by_hand(index, key)


@pytest.mark.parametrize("group_size", [32, 256])
def test_element_order(group_size):
    """Element s * G/8 + 4i + b of group g takes byte b of word (s, i), made from the block of counter g."""
    drawn = noise_bytes(99, 5, 3, group_size, CPU)
    for g, j in itertools.product(range(3), range(group_size)):
        (s, column), (i, b) = divmod(j, group_size // 8), divmod(j % (group_size // 8), 4)
        a, c = _philox_by_hand(5 + g, 99)[2 * (s // 4) :][:2]
        u = (i + 1) * COLUMN_MULTIPLIER & MASK_32
        x = (a + c * ((u ^ u >> 15) * PLANE_MULTIPLIERS[s % 4])) & MASK_32
        assert drawn[g, j] == (x ^ x >> 16) >> 8 * b & 0xFF
        assert column == 4 * i + b


@pytest.mark.parametrize("group_size", [32, 256])
def test_sign_order(group_size):
    """Byte i of the sign stream is byte i % 16 of the block with counter i // 16 and third word 1."""
    signs = sign_bytes(99, 5, 3, group_size, CPU)
    assert signs.shape == (3, group_size // 8)
    for i, byte in enumerate(signs.view(-1), 5 * group_size // 8):
        block = _philox_by_hand(i // 16, 99, SIGN_STREAM)
        assert byte == block[i % 16 // 4] >> 8 * (i % 4) & 0xFF


def test_any_part_can_be_regenerated_alone():
    for generate, group_size in itertools.product((noise_bytes, sign_bytes), (32, 64, 1024)):
        whole = generate(-3, 0, 100, group_size, CPU)
        assert torch.equal(generate(-3, 37, 20, group_size, CPU), whole[37:57])


@pytest.mark.parametrize("step", [1000, GROUPS_AT_ONCE, GROUPS_AT_ONCE + 3])
def test_words_of_chunks(step):
    groups = 2 * GROUPS_AT_ONCE + 500
    chunks = [(first, min(first + step, groups)) for first in range(0, groups, step)]
    found = list(words_by_chunk(-3, chunks, CPU))
    assert [(first, last) for first, last, _ in found] == chunks
    assert torch.equal(torch.cat([words for _, _, words in found]), group_words(-3, 0, groups, CPU))
    assert list(words_by_chunk(-3, [], CPU)) == []


def test_any_two_bytes_of_a_group_are_independent():
    """What the proof in noise.py needs: within a stream no two factors agree in their low 16 bits."""
    for group_size in (32, 64, 128, 256, 512, 1024):
        low = [factor & 0xFFFF for factor in factors(group_size)]
        assert len(low) == group_size // 8
        assert len(set(low)) == len(low)


def test_signs_are_fair_and_other_than_the_noise():
    bits = sign_bytes(5, 0, 4096, 256, CPU).view(-1, 1) >> torch.arange(8) & 1
    assert abs(float(bits.double().mean()) - 0.5) < SIGMAS * 0.5 / bits.numel() ** 0.5
    assert abs(float(torch.corrcoef(bits.double().T)[0, 1:].abs().max())) < SIGMAS / bits.shape[0] ** 0.5
    u = noise_bytes(5, 0, 4096, 256, CPU).view(-1)[: bits.numel()].double()
    assert abs(float(torch.corrcoef(torch.stack((u, bits.view(-1).double())))[0, 1])) < SIGMAS / u.numel() ** 0.5


def _assert_even(counts, case=""):
    """Chi-square of counts that should be equal, against its own standard deviation."""
    expected = counts.double().mean()
    degrees = counts.numel() - 1
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi2 - degrees) < SIGMAS * (2 * degrees) ** 0.5, case


@pytest.mark.parametrize("key", [1, 2, -1, 1 << 40])
def test_uniform(key):
    """All values, and each value at each of the 4 bytes of a word and in each sub-block."""
    drawn = noise_bytes(key, 0, 8192, 256, CPU).long()
    _assert_even(torch.bincount(drawn.view(-1), minlength=256))
    for part in (*drawn.view(-1, 4).unbind(1), *drawn.view(-1, 8, 32).unbind(1)):
        _assert_even(torch.bincount(part.reshape(-1), minlength=256))


def test_pairs_of_bytes_are_uniform():
    """The joint distribution of two elements' noise, at every distance within a group that a lattice might show."""
    drawn = noise_bytes(3, 0, 1 << 15, 256, CPU).long()
    for distance in (1, 2, 3, 4, 5, 8, 31, 32, 33, 64, 96, 128, 160, 255):
        pairs = 256 * drawn[:, :-distance] + drawn[:, distance:]
        _assert_even(torch.bincount(pairs.reshape(-1), minlength=1 << 16), distance)


@pytest.mark.parametrize("places", [(0, 4, 8), (0, 32, 64), (1, 5, 9), (3, 35, 67), (0, 128, 4), (2, 7, 200)])
def test_triples_of_bytes_are_uniform(places):
    """Three bytes are not independent by the proof, so their top four bits are counted together."""
    drawn = noise_bytes(4, 0, 1 << 17, 256, CPU)[:, list(places)].long() >> 4
    _assert_even(torch.bincount(drawn[:, 0] * 256 + drawn[:, 1] * 16 + drawn[:, 2], minlength=4096))


@pytest.mark.parametrize("places", [(0, 4, 32, 36), (0, 1, 2, 3), (0, 4, 8, 12), (3, 7, 35, 39), (0, 32, 64, 96)])
def test_no_sums_of_four(places):
    """Words on a rectangle of columns and sub-blocks would add up to zero if the factors were sums, not products."""
    u = noise_bytes(6, 0, 1 << 16, 256, CPU)[:, list(places)].long()
    for signs in itertools.product((1, -1), repeat=3):
        total = u[:, 0] + sum(sign * u[:, n + 1] for n, sign in enumerate(signs))
        _assert_even(torch.bincount(total % 256, minlength=256), signs)


def test_no_structure_of_second_differences():
    u = noise_bytes(6, 0, 1 << 15, 256, CPU).view(-1, 8, 32).long()
    for lag in (1, 2, 4, 8):
        for dim, size in ((1, 8), (2, 32)):
            if 2 * lag < size:
                a, b, c = (u.narrow(dim, n * lag, size - 2 * lag) for n in range(3))
                _assert_even(torch.bincount(((a - 2 * b + c) % 256).reshape(-1), minlength=256), (lag, dim))


def test_sums_over_a_group_have_the_variance_of_independent_ones():
    """The mean of a group's noise, over groups: what dependence of many elements at once would widen or narrow."""
    groups = 1 << 16
    u = noise_bytes(9, 0, groups, 256, CPU).double() - 127.5
    variance = (256**2 - 1) / 12
    for weights in (torch.ones(256), torch.randn(256), torch.ones(256) * torch.tensor([1, -1]).repeat(128)):
        sums = u @ weights.double() / float(weights.norm() * variance**0.5)
        assert abs(float(sums.mean())) < SIGMAS / groups**0.5
        assert abs(float(sums.square().mean()) - 1) < SIGMAS * (2 / groups) ** 0.5
        assert abs(float(sums.pow(4).mean()) - 3) < SIGMAS * (96 / groups) ** 0.5 + 0.01


def _pairs():
    u = noise_bytes(7, 0, 2048, 256, CPU)
    flat = u.view(-1)
    yield "next element", flat[:-1], flat[1:]
    yield "next word", flat[:-4], flat[4:]
    yield "next sub-block", u[:, :-32], u[:, 32:]
    yield "other half", u[:, :-128], u[:, 128:]
    yield "next group", u[:-1], u[1:]
    yield "next key", u, noise_bytes(8, 0, 2048, 256, CPU)
    yield "other high half of the key", u, noise_bytes(7 + (1 << 32), 0, 2048, 256, CPU)
    yield "negative key", u, noise_bytes(-7, 0, 2048, 256, CPU)
    yield "far counter", u, noise_bytes(7, 1 << 40, 2048, 256, CPU)
    yield "next key, next group", u[1:], noise_bytes(8, 0, 2047, 256, CPU)


@pytest.mark.parametrize(("a", "b"), [pytest.param(a, b, id=name) for name, a, b in _pairs()])
def test_uncorrelated(a, b):
    a, b = a.reshape(-1).long(), b.reshape(-1).long()
    correlation = ((a - 127.5) * (b - 127.5)).double().mean() * 12 / (256**2 - 1)
    assert abs(correlation) < SIGMAS / a.numel() ** 0.5
    bits = torch.arange(8)
    agree = ((a[:, None] >> bits) ^ (b[:, None] >> bits) ^ 1).bitwise_and_(1).double().mean(0)
    assert bool(((agree - 0.5).abs() < SIGMAS * 0.5 / a.numel() ** 0.5).all())
    equal = (a == b).double().mean()
    assert abs(equal - 1 / 256) < SIGMAS * (1 / 256 / a.numel()) ** 0.5


def test_the_global_generator_is_untouched():
    before = torch.get_rng_state()
    noise_bytes(1, 0, 4, 256, CPU)
    assert torch.equal(torch.get_rng_state(), before)
