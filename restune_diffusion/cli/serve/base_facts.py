"""Facts about a loaded base that responses and records of the server name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...serving.http.image_files import BaseFacts


def base_facts(base: str, pipeline: Any) -> BaseFacts:
    """Return the facts about a base that responses and records name.

    Args:
        base: path or id of the base.
        pipeline: its pipeline.
    """
    import math

    from ...pipelines.call_options import image_size
    from ...pipelines.schedulers import scheduler_label
    from ...serving.http.image_files import BaseFacts
    from ...storage.base_files.location import public_name

    sampler, spacing = scheduler_label(pipeline.scheduler)
    return BaseFacts(
        name=public_name(base).removesuffix(".safetensors"),
        sampler=sampler,
        spacing=spacing,
        size=image_size(pipeline, None, None),
        factor=math.lcm(8, pipeline.vae_scale_factor),
        dtype=str(pipeline.unet.dtype).removeprefix("torch."),
        device=pipeline.device.type,
    )
