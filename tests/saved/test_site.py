"""Sites: names that do not depend on what else the step did, and noise keys that never repeat."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_actmem.saved.site import Site, SiteTable, mix64


def test_site_reads_like_a_path() -> None:
    assert str(Site("encoder.0.fc", "linear", "input", 0)) == "encoder.0.fc/linear.input"
    assert str(Site("encoder.0.fc", "linear", "input", 2)) == "encoder.0.fc/linear.input#2"


def test_a_site_is_made_once() -> None:
    table = SiteTable()
    assert table["a", "gelu", "input", 0] is table["a", "gelu", "input", 0]
    assert table["a", "gelu", "input", 0] is not table["a", "gelu", "input", 1]


def test_keys_differ_between_sites_calls_and_steps_and_repeat_with_the_step() -> None:
    table = SiteTable()
    names = [
        ("a", "gelu", "input", 0),
        ("a", "gelu", "input", 1),
        ("a.b", "gelu", "input", 0),
        ("b", "linear", "input", 0),
    ]
    runs = []
    for step in (1, 2, 1):
        table.start_step()
        runs.append([table.noise_key(table[name], mix64(0, 0, step)) for name in names for _ in range(3)])
    assert len({*runs[0], *runs[1]}) == 2 * len(names) * 3
    assert runs[2] == runs[0]
    assert all(-(2**63) <= key < 2**63 for run in runs for key in run)


def test_a_skipped_site_leaves_the_noise_of_the_others_alone() -> None:
    """A global counter would shift every later tensor's noise when a branch is skipped."""
    table = SiteTable()
    first, second = table["a", "gelu", "input", 0], table["b", "gelu", "input", 0]
    table.start_step()
    table.noise_key(first, 7)
    with_first = table.noise_key(second, 7)
    table.start_step()
    assert table.noise_key(second, 7) == with_first


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**64 - 1))
def test_mix64_is_a_64_bit_function_of_low_words(word: int, other: int) -> None:
    assert mix64(word, other) == mix64(word % 2**64, other)
    assert 0 <= mix64(word, other) < 2**64


def test_mix64_spreads_neighbours() -> None:
    """Half of the 64 bits flip on average when one input counts up."""
    flips = [(mix64(5, i) ^ mix64(5, i + 1)).bit_count() for i in range(2000)]
    assert 31 < sum(flips) / len(flips) < 33
