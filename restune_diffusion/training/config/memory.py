"""Settings of precision, memory and the device."""

from __future__ import annotations

from typing import Literal

from ...utils.setting_groups import SettingGroup, setting


class MemoryConfig(SettingGroup):
    """Precision of the base, and what is given up to need less memory."""

    mixed_precision: Literal["no", "fp16", "bf16"] = setting("no", affects="batches")
    """Precision of the base; the tuner's own weights and the image encoder stay in fp32. fp16 is usual
    on a GPU."""
    base_quantization: Literal["int8"] | None = setting(None, affects="batches")
    """Hold the linear layers of the base in 8 bits, the tuner in fp32 as ever; needs
    pip install 'restune-diffusion[quantization]'."""
    gradient_checkpointing: bool = setting(False, affects="output")
    """Compute the base's activations twice instead of keeping them: less memory, slower."""
    drop_encoders: bool = setting(False, affects="output")
    """Free the memory of the autoencoder and text encoder once the data is encoded; no samples can be drawn then."""
    cpu: bool = setting(False, affects="output", recorded=False)
    """Train on the CPU even where there is a GPU."""
