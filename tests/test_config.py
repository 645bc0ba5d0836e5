"""The configuration: one class for Python, YAML, dotlists and mappings, and clear errors for bad input."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lightning_actmem import ActMemConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 5}, r"bits must be one of 1, 2, 3, 4, 8, 32, got 5\. Use 32 for lossless storage\."),
        ({"codec": "zip"}, r"codec must be one of 'auto', .*, 'identity', got 'zip'"),
        (
            {"codec": "bfp", "bits": 1},
            r"bits must be one of 2, 3, 4, 8, 32 with codec 'bfp', got 1\. Or use codec='auto'",
        ),
        ({"codec": "fp8_e4m3"}, r"bits must be one of 8, 32 with codec 'fp8_e4m3', got 4\. Or use codec='auto'"),
        (
            {"codec": "measured", "rounding": "nearest"},
            r"rounding must be 'dither' or 'stochastic' with codec 'measured'",
        ),
        ({"group_size": -32}, r"group_size must be one of 32, .*, got -32"),
        ({"group_size": 100}, r"group_size must be one of 32, .*, got 100"),
        ({"rounding": "up"}, r"rounding must be one of 'dither', 'stochastic', 'nearest', got 'up'"),
        ({"backend": "cuda"}, r"backend must be one of 'auto', 'triton', 'torch', got 'cuda'"),
        ({"activations": "gelu"}, r"activations must be one of 'derive', 'derivative', 'inverted', got 'gelu'"),
        ({"seed": -1}, r"seed must be from 0 to 2\*\*31 - 1, got -1"),
        ({"adapt_every": -1}, r"adapt_every must be 0 or more, got -1\. Use 0 for once an epoch"),
        ({"method": "auto"}, r"method must be one of 'actmem', 'actnn', 'gact', got 'auto'"),
        ({"noise": math.inf}, "noise must be above 0 and finite, got inf"),
        ({"noise": 0}, r"noise must be above 0 and finite, got 0\. Use bits=32"),
        ({"budget": "4 pies"}, r"an amount of memory must look like '4GiB', .*, got '4 pies'"),
        ({"budget": "0"}, r"an amount of memory must be above 0 bytes, got '0'"),
        ({"offload": "4 pies"}, r"offload must be true, false or the bytes .*, got '4 pies': .* must look like '4GiB'"),
        ({"offload": 0}, r"offload must be true, false or the bytes .*, got 0: .* above 0 bytes.* Use true to move"),
        ({"adapt": False, "noise": 0.1}, r"noise and budget need adaptation, got adapt=False"),
        ({"bits": 32, "adapt": True}, r"adaptation needs a codec that rounds, got bits=32, codec='auto'"),
        ({"codec": "identity", "budget": "1GB"}, r"adaptation needs a codec that rounds, .*codec='identity'"),
        ({"layer_bits": {"head": 5}}, r"layer_bits\['head'\] must be one of 1, 2, 3, 4, 8, 32, got 5"),
        (
            {"layer_activations": {"head": "exact"}},
            r"layer_activations\['head'\] must be one of 'derive', .* got 'exact'",
        ),
        ({"layer_bits": {"head": 8}, "bits": 32}, r"layer_bits need a codec that rounds, got bits=32"),
        ({"min_elements": -1}, r"min_elements must be 0 or more, got -1"),
    ],
)
def test_bad_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActMemConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": "four"}, "bits must be an integer, got 'four'"),
        ({"bits": True}, "bits must be an integer, got True"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"exact": "encoder"}, "exact must be a list of patterns"),
        ({"layer_activations": "derive"}, r"layer_activations must map patterns to one of 'derive', .* got 'derive'"),
        ({"layer_bits": [8]}, r"layer_bits must map patterns to bits, .* got \[8\]"),
        ({"layer_bits": {"head": "many"}}, r"layer_bits\['head'\] must be an integer, got 'many'"),
        ({"derive": "maybe"}, "derive must be true, false or null, got 'maybe'"),
        ({"adapt": "yes"}, "adapt must be true, false or null, got 'yes'"),
        ({"noise": "low"}, "noise must be a number such as 0.05, got 'low'"),
        ({"noise": True}, "noise must be a number such as 0.05, got True"),
        ({"budget": 4096}, "budget must be a text such as '4GiB', got 4096"),
        ({"offload": 1.5}, "offload must be true, false or an amount such as '2GiB', got 1.5"),
        ({"offload": None}, "offload must be true, false or an amount such as '2GiB', got None"),
        ({"adapt_every": 0.5}, "adapt_every must be an integer, got 0.5"),
        ({"summary": "no"}, "summary must be true or false, got 'no'"),
    ],
)
def test_bad_types(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ActMemConfig(**fields)


def test_it_is_frozen_and_hashable() -> None:
    config = ActMemConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 2  # type: ignore[misc]
    assert hash(config) == hash(ActMemConfig())


def test_yaml_dotlist_mapping_and_fields(tmp_path: Path) -> None:
    path = tmp_path / "actmem.yaml"
    path.write_text("bits: 2\ngroup_size: 128\n")
    assert ActMemConfig.load(path) == ActMemConfig(bits=2, group_size=128)
    assert ActMemConfig.load(str(path), dotlist=["bits=8"], seed=4) == ActMemConfig(bits=8, group_size=128, seed=4)
    assert ActMemConfig.load({"bits": "3", "summary": "false"}) == ActMemConfig(bits=3, summary=False)
    assert ActMemConfig.load() == ActMemConfig()


def test_patterns_are_a_tuple_whatever_they_come_as(tmp_path: Path) -> None:
    path = tmp_path / "actmem.yaml"
    path.write_text("exact: [encoder.0, 'op:gelu']\n")
    assert ActMemConfig.load(path).exact == ("encoder.0", "op:gelu")
    assert ActMemConfig(exact=["a"]).exact == ("a",)  # type: ignore[arg-type]
    assert hash(ActMemConfig.load(path))


def test_adaptation_is_on_when_something_asks_for_it() -> None:
    assert not ActMemConfig().adapts
    assert all(ActMemConfig(**given).adapts for given in ({"noise": 0.1}, {"budget": "1GB"}, {"method": "gact"}))
    assert ActMemConfig(adapt=True).adapts
    assert not ActMemConfig(adapt=False, method="gact").adapts


@pytest.mark.parametrize(
    ("text", "stored_bytes"),
    [("4GiB", 2**32), ("1.5 kB", 1500), ("800MB", 800_000_000), ("1000", 1000), ("2 tib", 2**41), ("7b", 7)],
)
def test_budgets(text: str, stored_bytes: int) -> None:
    assert ActMemConfig(budget=text).budget_bytes == stored_bytes
    assert ActMemConfig.load({"budget": text}).budget_bytes == stored_bytes


@pytest.mark.parametrize(
    ("text", "device_bytes"), [("true", 0), ("false", None), ("2GiB", 2**31), ("1000000", 1_000_000)]
)
def test_offload_from_text(text: str, device_bytes: int | None, tmp_path: Path) -> None:
    path = tmp_path / "actmem.yaml"
    path.write_text(f"offload: {text}\n")
    assert ActMemConfig.load(path).offload_bytes == device_bytes
    assert ActMemConfig.load(dotlist=[f"offload={text}"]).offload_bytes == device_bytes


def test_interpolations_resolve() -> None:
    tree = OmegaConf.create({"bits": 2, "actmem": {"bits": "${bits}", "seed": 3}})
    assert ActMemConfig.load(tree.actmem) == ActMemConfig(bits=2, seed=3)


def test_it_is_an_omegaconf_schema() -> None:
    schema = OmegaConf.structured(ActMemConfig)
    assert ActMemConfig.load(schema) == ActMemConfig()
    assert OmegaConf.to_object(schema) == ActMemConfig()


@pytest.mark.parametrize("key", ["bit", "groupsize", "Bits"])
def test_a_wrong_key_names_the_right_one(key: str) -> None:
    right = "group_size" if key == "groupsize" else "bits"
    with pytest.raises(ValueError, match=f"unknown ActMem setting '{key}'. Did you mean '{right}'?"):
        ActMemConfig.load({key: 4})


def test_a_key_like_no_other_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="Known: bits, codec"):
        ActMemConfig.load({"zzzz": 4})


@pytest.mark.parametrize("value", ["many", [1, 2]])
def test_a_value_that_does_not_convert_names_its_key(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="bits"):
        ActMemConfig.load({"bits": value})


def test_bad_sources() -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        ActMemConfig.load("missing.yaml")
    with pytest.raises(TypeError, match="got int"):
        ActMemConfig.load(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must look like 'bits=2'"):
        ActMemConfig.load(dotlist=["bits"])
