"""What may be chosen, and what is measured for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_actmem import ActMemConfig
from lightning_actmem.adapt.candidates import candidates, references
from lightning_actmem.codecs import codecs_of
from lightning_actmem.config import CODECS
from lightning_actmem.saved.probe import SiteUse
from lightning_actmem.saved.site import Site
from lightning_actmem_kernels import CodecSpec

SITE = Site("layer", "scaled_dot_product_attention", "query", 0)


def names(specs: list[CodecSpec]) -> list[str]:
    return [f"{spec.codec}-{spec.bits}" for spec in specs]


def use_of(config: ActMemConfig, kind: str = "packed") -> SiteUse:
    general = codecs_of(config, derive=True).general
    assert general is not None
    return SiteUse(general, kind, torch.float32)


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "identity"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_default_is_among_what_may_be_chosen(codec: str, bits: int) -> None:
    try:
        config = ActMemConfig(codec=codec, bits=bits, adapt=True)
    except ValueError:
        pytest.skip("the codec has no such width")
    chosen = candidates(SITE, use_of(config), config)
    assert use_of(config).default in chosen
    assert len(set(chosen)) == len(chosen)


@pytest.mark.parametrize(
    ("config", "kind", "wanted"),
    [
        ({}, "packed", ["rotated-2", "uniform-4", "rotated-1"]),
        ({}, "attention", ["uniform-8"]),
        ({"attention_bits": 4}, "attention", ["uniform-4", "rotated-4"]),
        ({"codec": "uniform"}, "packed", ["uniform-4", "uniform-1"]),
        ({"codec": "rotated"}, "packed", ["rotated-2", "uniform-5", "rotated-1"]),
        ({"codec": "bfp", "loss_bits": 8}, "loss", ["bfp-8"]),
        ({"codec": "fp8_e4m3", "bits": 8}, "packed", ["fp8_e4m3-8"]),
    ],
)
def test_one_width_of_each_codec_is_measured_and_one_bit_last(
    config: dict[str, Any], kind: str, wanted: list[str]
) -> None:
    settings = ActMemConfig(**config, adapt=True)
    assert names(references(candidates(SITE, use_of(settings, kind), settings))) == wanted


def test_a_relu_keeps_its_code() -> None:
    config = ActMemConfig(adapt=True)
    use = SiteUse(CodecSpec("relu", 4), "packed", torch.float32)
    assert names(candidates(SITE, use, config)) == ["relu-2", "relu-3", "relu-4", "relu-8"]
    assert names(references(candidates(SITE, use, config))) == ["relu-2"]


def test_between_4_and_8_bits_there_are_two_more() -> None:
    config = ActMemConfig(adapt=True)
    found = names(candidates(SITE, use_of(config), config))
    assert [name for name in found if name.startswith("uniform")] == [f"uniform-{bits}" for bits in (3, 4, 5, 6, 8)]


def test_groups_and_rounding_are_those_of_the_settings() -> None:
    config = ActMemConfig(group_size=64, rounding="stochastic", adapt=True)
    for spec in candidates(SITE, use_of(config), config):
        assert spec.group_size == 64 or (spec.codec, spec.group_size) == ("rotated", 1024)
        assert spec.rounding == "stochastic"


def test_rotated_groups_may_be_larger_and_are_measured_once() -> None:
    config = ActMemConfig(adapt=True)
    specs = candidates(SITE, use_of(config), config)
    rotated = [(spec.bits, spec.group_size, spec.centre) for spec in specs if spec.codec == "rotated"]
    groups = [(256, True), (1024, False), (1024, True)]
    assert sorted(rotated) == [(bits, *group) for bits in (1, 2, 3, 4) for group in groups]
    assert {(spec.group_size, spec.centre) for spec in references(specs) if spec.codec == "rotated"} == {(256, True)}
    largest = ActMemConfig(group_size=1024, adapt=True)
    assert {spec.group_size for spec in candidates(SITE, use_of(largest), largest)} == {1024}


def test_values_have_no_floor() -> None:
    """Attention is linear in its values; queries and keys decide on the probabilities."""
    config = ActMemConfig(attention_bits=8, adapt=True)
    use = use_of(config, "attention")
    assert {spec.bits for spec in candidates(SITE, use, config)} == {8}
    assert {spec.bits for spec in candidates(SITE._replace(role="key"), use, config)} == {8}
    assert {spec.bits for spec in candidates(SITE._replace(role="value"), use, config)} == {1, 2, 3, 4, 5, 6, 8}
    unfused = Site("layer", "matmul", "other", 0)
    assert {spec.bits for spec in candidates(unfused, use, config)} == {8}
