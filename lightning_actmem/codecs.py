"""Which codecs a configuration chooses."""

from __future__ import annotations

import dataclasses

from lightning_actmem_kernels import CodecSpec

from .adapt.choose import CodecChooser
from .config import LOSSLESS_BITS, ActMemConfig
from .saved.identify import Codecs

_RELU_MIN_BITS = 2
# At which widths a setting rotates. Measured on a GPT: half the gradient error of min-max groups at 2 bits, a quarter
# at 1 bit, little less from 3 on.
_ROTATED_BITS = {"auto": (1, 2), "measured": (1, 2), "rotated": (1, 2, 3, 4)}


def codecs_of(config: ActMemConfig, derive: bool) -> Codecs:
    """Return the codecs for floats.

    Args:
        config: The settings.
        derive: Whether tensors are derived from others, which attention needs to be packed.
    """
    if config.bits == LOSSLESS_BITS:
        return Codecs(None, None, smallest=derive)
    if config.codec == "identity":
        identity = CodecSpec("identity")
        return Codecs(identity, identity)

    def general(bits: int) -> CodecSpec | None:
        if bits == LOSSLESS_BITS:
            return None
        codec = _codec(config.codec, bits)
        # Keeping the mean apart costs 2 bytes per group: at equal bytes a ResNet's gradient error at 1 bit is 13 %
        # lower, a GPT's the same.
        return CodecSpec(codec, bits, config.group_size, config.rounding, centre=codec == "rotated")

    # With any other code a ReLU would pass gradient where it must not. One bit would leave it its sign and no value.
    relu = CodecSpec("relu", max(config.bits, _RELU_MIN_BITS), config.group_size, config.rounding)
    return Codecs(
        general=general(config.bits),
        relu=relu,
        attention=general(max(config.bits, config.attention_bits)) if derive else None,
        loss=general(max(config.bits, config.loss_bits)),
        smallest=True,
        signed=_signed(general(config.bits), config) if derive else None,
        within_rows=not config.adapts and config.codec != "measured",
    )


def layer_codecs(config: ActMemConfig, derive: bool) -> dict[str, Codecs]:
    """Return the codecs of the layers that have bits of their own, by pattern."""
    return {
        pattern: codecs_of(dataclasses.replace(config, bits=bits, layer_bits={}), derive)
        for pattern, bits in config.layer_bits.items()
    }


def _codec(setting: str, bits: int) -> str:
    """Return the codec of activations at this width."""
    if setting not in _ROTATED_BITS:
        return setting
    return "rotated" if bits in _ROTATED_BITS[setting] else "uniform"


def chooser_of(config: ActMemConfig) -> CodecChooser | None:
    """Return what chooses a codec for each site by its error, if the settings ask for it."""
    if config.codec != "measured" or config.lossless:
        return None
    settings = (config.bits, config.attention_bits, config.loss_bits, config.group_size, config.rounding)
    return CodecChooser(settings, None if config.backend == "auto" else config.backend)


def _signed(spec: CodecSpec | None, config: ActMemConfig) -> CodecSpec | None:
    """Return the codec for the input of a batch norm behind a ReLU: with its sign 2 bits in all.

    Where bits adapt, any width may come, and keeps its bits behind the sign (`Store.keeps_width`).
    """
    behind = CodecSpec("rotated", 1, config.group_size, config.rounding, centre=True)
    if config.adapts:
        return behind if config.codec in _ROTATED_BITS else None
    if spec is None or spec.codec != "rotated" or spec.bits > _RELU_MIN_BITS or config.codec == "measured":
        return None
    return behind
