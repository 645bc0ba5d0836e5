"""``python -m lightning_actmem plan``: what training will take, before it begins."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from .config import BITS
from .errors import ActMemError
from .integration.plan import plan

_EPILOG = """examples:
  python -m lightning_actmem plan --model mine.Net --model.width 512 --data mine.Data --budget 80GiB
  python -m lightning_actmem plan --config run.yaml --bits 4 2 --json plan.json

Of a LightningCLI configuration the sections `model` and `data` are read."""

_USER_ERRORS = (ActMemError, ValueError, OSError, YAMLError, OmegaConfBaseException, MisconfigurationException)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    top = argparse.ArgumentParser(prog="python -m lightning_actmem", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser(
        "plan",
        help="predict stored bytes, peak memory and the largest batch",
        description="Predict stored bytes, peak memory and the largest batch from a few steps with small batches.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    one.add_argument("--config", help="LightningCLI configuration (YAML)")
    one.add_argument("--model", help="class path of the LightningModule; --model.NAME VALUE sets an argument")
    one.add_argument("--data", help="class path of the LightningDataModule; --data.NAME VALUE sets an argument")
    one.add_argument("--bits", nargs="+", type=int, choices=BITS, default=[8, 4, 2], help="default: 8 4 2")
    one.add_argument(
        "--noise", type=float, default=0.05, help="of the row whose bits adapt; 0: no such row; default: 0.05"
    )
    one.add_argument("--batch-size", type=int, help="the batch to predict for; default: the one that is set")
    one.add_argument("--budget", help="memory to fill, for example 80GiB")
    one.add_argument(
        "--checkpoint",
        nargs="*",
        metavar="PATTERN",
        help="what to checkpoint, for example blocks.*; nothing: no such row; default: the repeated blocks",
    )
    one.add_argument("--trace", nargs=2, type=int, default=[32, 64], metavar="N", help="small batches; default: 32 64")
    one.add_argument("--batch-arg-name", default="batch_size", help="the batch size's attribute; default: batch_size")
    one.add_argument("--json", help="write the plan to this file")
    one.add_argument("--figure", help="draw the plan into this file (needs matplotlib)")
    return top


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, print the plan, and write what was asked for."""
    top = parser()
    options, others = top.parse_known_args(argv)
    try:
        model, data = _build(options, others)
        made = plan(
            model,
            data,
            bits=options.bits,
            noise=options.noise or None,
            batch_size=options.batch_size,
            budget=options.budget,
            checkpointed=options.checkpoint,
            trace=tuple(options.trace),
            batch_arg_name=options.batch_arg_name,
        )
        print(made.render())
        if options.json:
            made.save_json(options.json)
        if options.figure:
            made.save_figure(options.figure)
    except _USER_ERRORS as error:
        top.exit(2, f"error: {error}\n")


def _build(options: argparse.Namespace, others: Sequence[str]) -> tuple[LightningModule, LightningDataModule | None]:
    try:
        from jsonargparse import ArgumentError, ArgumentParser
    except ImportError:
        raise ActMemError(
            "building a model from a class path needs jsonargparse. Run `pip install 'lightning-actmem[cli]'`, "
            "or call lightning_actmem.plan(model, data) in Python."
        ) from None
    builder = ArgumentParser(exit_on_error=False, prog="plan")
    builder.add_subclass_arguments(LightningModule, "model", required=True)
    builder.add_subclass_arguments(LightningDataModule, "data", required=False)
    sections = _sections(options)
    if "model" not in sections:
        raise ActMemError("a model is needed. Give --model with its class path, or --config with a section `model`.")
    try:
        # In one go: a section alone may lack what the command line gives.
        given = [f"--{name}={json.dumps(section)}" for name, section in sections.items()]
        built = builder.instantiate_classes(builder.parse_args([*given, *others]))
    except ArgumentError as error:
        raise ActMemError(str(error)) from error
    return built.model, built.get("data")


def _sections(options: argparse.Namespace) -> dict[str, Any]:
    """Return the sections of the configuration, with the class paths of the command line put in."""
    loaded: dict[str, Any] = {}
    if options.config:
        loaded = _loaded(options.config)
    sections = {}
    for name in ("model", "data"):
        section, class_path = loaded.get(name), getattr(options, name)
        if class_path is not None:
            arguments = section.get("init_args") if isinstance(section, dict) and "class_path" in section else section
            section = {"class_path": class_path, "init_args": arguments or {}}
        if section:
            sections[name] = section
    return sections


def _loaded(path: str) -> dict[str, Any]:
    loaded: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    if not isinstance(loaded, dict):
        raise ActMemError(f"{path} must have sections such as `model` and `data`, got a {type(loaded).__name__}.")
    return loaded


if __name__ == "__main__":
    main()
