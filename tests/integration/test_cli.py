"""The same settings from a LightningCLI command line and from YAML, with both parsers."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_actmem import ActMem, ActMemConfig, ActMemDDPStrategy, ActMemStrategy
from tests.integration.support import Net, is_untouched

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "max_steps": 2,
}
CALLBACK = "trainer: {{callbacks: [{{class_path: lightning_actmem.ActMem, init_args: {}}}]}}"
STRATEGY = "trainer: {{strategy: {{class_path: lightning_actmem.ActMemStrategy, init_args: {}}}}}"
ADD = "--trainer.callbacks+=lightning_actmem.ActMem"

YAML = {
    CALLBACK.format("{config: {bits: 2, seed: 5}}"): ActMemConfig(bits=2, seed=5),
    CALLBACK.format("{bits: 2, seed: 5}"): ActMemConfig(bits=2, seed=5),
    CALLBACK.format("{config: {bits: 8}, seed: 5, summary: false}"): ActMemConfig(bits=8, seed=5, summary=False),
    STRATEGY.format("{config: {bits: 2, codec: uniform}}"): ActMemConfig(bits=2, codec="uniform"),
    STRATEGY.format("{group_size: 64}"): ActMemConfig(group_size=64),
    "trainer: {strategy: actmem}": ActMemConfig(),
}
COMMAND_LINES = {
    (ADD, "--trainer.callbacks.config.bits=2"): ActMemConfig(bits=2),
    (ADD, "--trainer.callbacks.bits=2", "--trainer.callbacks.rounding=nearest"): ActMemConfig(
        bits=2, rounding="nearest"
    ),
    (ADD, "--trainer.callbacks.config={bits: 2, group_size: 64}"): ActMemConfig(bits=2, group_size=64),
    ("--trainer.strategy=actmem",): ActMemConfig(),
    ("--trainer.strategy=lightning_actmem.ActMemStrategy", "--trainer.strategy.config.bits=2"): ActMemConfig(bits=2),
    ("--trainer.strategy=lightning_actmem.ActMemDDPStrategy", "--trainer.strategy.bits=8"): ActMemConfig(bits=8),
}
PARSERS = pytest.mark.parametrize("parser_mode", ["yaml", "omegaconf"])


def run_cli(parser_mode: str, *args: str, run: bool = False) -> LightningCLI:
    return LightningCLI(
        Net,
        run=run,
        args=[*(["fit"] if run else []), *args],
        save_config_callback=None,
        seed_everything_default=0,
        trainer_defaults=QUIET,
        parser_kwargs={"fit": {"parser_mode": parser_mode}} if run else {"parser_mode": parser_mode},
    )


def config_of(cli: LightningCLI) -> ActMemConfig:
    strategy = cli.trainer.strategy
    if isinstance(strategy, (ActMemStrategy, ActMemDDPStrategy)):
        return strategy.engine.config
    (actmem,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, ActMem))
    return actmem.engine.config


@PARSERS
@pytest.mark.parametrize("text", YAML)
def test_settings_from_yaml(tmp_path, parser_mode, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert config_of(run_cli(parser_mode, f"--config={path}")) == YAML[text]


@PARSERS
@pytest.mark.parametrize("args", COMMAND_LINES)
def test_settings_from_the_command_line(parser_mode, args):
    assert config_of(run_cli(parser_mode, *args)) == COMMAND_LINES[args]


@PARSERS
def test_settings_from_a_yaml_file_of_their_own(tmp_path, parser_mode):
    path = tmp_path / "actmem.yaml"
    path.write_text("bits: 8\nseed: 5\n")
    cli = run_cli(parser_mode, ADD, f"--trainer.callbacks.config={path}")
    assert config_of(cli) == ActMemConfig(bits=8, seed=5)


def test_the_omegaconf_parser_interpolates(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed_everything: 5\n" + CALLBACK.format("{config: {seed: '${seed_everything}'}}"))
    assert config_of(run_cli("omegaconf", f"--config={path}")).seed == 5


@pytest.mark.parametrize("where", [CALLBACK, STRATEGY])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{config: {bits: 5}}", "bits must be one of 1, 2, 3, 4, 8, 32, got 5"),
        ("{config: {bit: 4}}", "unknown ActMem setting 'bit'. Did you mean 'bits'"),
    ],
)
def test_bad_settings_are_refused_with_the_remedy(tmp_path, where, settings, message):
    path = tmp_path / "run.yaml"
    path.write_text(where.format(settings))
    with pytest.raises(ValueError, match=message):
        run_cli("yaml", f"--config={path}")


def test_the_help_tells_what_each_setting_does(capsys):
    with pytest.raises(SystemExit):
        run_cli("yaml", "--trainer.callbacks.help=lightning_actmem.ActMem")
    text = capsys.readouterr().out
    assert "--trainer.callbacks.group_size" in text
    assert "Consecutive elements that share one minimum and step" in text


@PARSERS
def test_a_run_from_the_command_line_trains_compressed(parser_mode):
    cli = run_cli(parser_mode, ADD, "--trainer.callbacks.bits=2", "--trainer.strategy=actmem", run=True)
    assert cli.model.seen == [("train", True)] * 2
    assert cli.trainer.strategy.engine.config == ActMemConfig(bits=2)
    assert is_untouched(cli.trainer)
