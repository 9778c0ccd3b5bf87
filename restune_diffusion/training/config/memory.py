"""Precision, memory and device settings."""

from __future__ import annotations

from typing import Literal

from ...utils.setting_groups import SettingGroup, setting


class MemoryConfig(SettingGroup):
    """Precision of the base, options that save memory, and the device."""

    mixed_precision: Literal["no", "fp16", "bf16"] = setting("no", affects="batches")
    """Precision of the base. The tuner's weights stay in fp32. The VAE encodes in fp32 too, unless its config
    declares that fp16 is safe. fp16 is usual on a GPU."""
    base_quantization: Literal["int8"] | None = setting(None, affects="batches")
    """Quantize the linear layers of the base to 8 bits; the tuner stays in fp32. Needs
    pip install 'restune-diffusion[quantization]'."""
    gradient_checkpointing: bool = setting(False, affects="output")
    """Recompute the base's activations in the backward pass instead of storing them: less memory, slower."""
    drop_encoders: bool = setting(False, affects="output")
    """Free the VAE and the text encoders from memory once the data is encoded. Validation samples are not possible
    then."""
    cpu: bool = setting(False, affects="output", recorded=False)
    """Train on the CPU even if a GPU is available."""
