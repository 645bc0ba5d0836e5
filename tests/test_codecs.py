"""Which codecs a configuration chooses."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_actmem import ActMemConfig
from lightning_actmem.codecs import chooser_of, codecs_of, layer_codecs


def labels(config: ActMemConfig, derive: bool = True) -> list[str | None]:
    codecs = codecs_of(config, derive)
    parts = (codecs.general, codecs.relu, codecs.attention, codecs.loss, codecs.signed)
    return [None if spec is None else spec.label for spec in parts]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"bits": 32}, [None, None, None, None, None]),
        ({"bits": 4}, ["uniform-4", "relu-4", "uniform-8", "uniform-8", None]),
        ({"bits": 2}, ["rotated-2", "relu-2", "uniform-8", "uniform-8", "rotated-1"]),
        ({"bits": 1}, ["rotated-1", "relu-2", "uniform-8", "uniform-8", "rotated-1"]),
        ({"bits": 2, "attention_bits": 2, "loss_bits": 32}, ["rotated-2", "relu-2", "rotated-2", None, "rotated-1"]),
        ({"bits": 2, "codec": "uniform"}, ["uniform-2", "relu-2", "uniform-8", "uniform-8", None]),
        ({"bits": 8, "codec": "bfp"}, ["bfp-8", "relu-8", "bfp-8", "bfp-8", None]),
        ({"bits": 8, "codec": "identity"}, ["exact", "exact", None, None, None]),
    ],
)
def test_codecs_by_bits(settings: dict[str, Any], wanted: list[str | None]) -> None:
    config = ActMemConfig(**{"loss_bits": 8, **settings})
    assert labels(config) == wanted


def test_without_derivation_attention_and_signs_stay_exact() -> None:
    assert labels(ActMemConfig(bits=2, loss_bits=8), derive=False) == ["rotated-2", "relu-2", None, "uniform-8", None]


def test_only_rotated_groups_keep_their_mean() -> None:
    for bits, centre in ((2, True), (4, False)):
        general = codecs_of(ActMemConfig(bits=bits), derive=True).general
        assert general is not None
        assert general.centre is centre


def test_layers_with_bits_of_their_own() -> None:
    codecs = layer_codecs(ActMemConfig(bits=2, layer_bits={"head": 8, "stem.*": 32}), derive=True)
    assert list(codecs) == ["head", "stem.*"]
    assert codecs["head"].general is not None
    assert codecs["head"].general.label == "uniform-8"
    assert codecs["stem.*"].general is None


def test_only_the_measured_setting_has_a_chooser() -> None:
    assert chooser_of(ActMemConfig(bits=4)) is None
    assert chooser_of(ActMemConfig(bits=32, codec="measured")) is None
    assert chooser_of(ActMemConfig(bits=4, codec="measured")) is not None
