"""Start the API on a base: load it, start the engine, and build the application."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .app import ServingApp
    from .image_files import BaseFacts


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server, or of a replica on Ray Serve; all values are those of the options of `restune serve`."""

    base: str
    tuners: str | None = None
    tuner_repos: tuple[str, ...] = ()
    vae: str | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    max_rows: int = 8
    max_queue: int = 64
    max_side: int = 2048
    max_images: int = 16
    max_steps: int = 150
    max_upload_mib: int = 32
    key_sha256: str | None = None
    """Digest of the API key, in hexadecimal digits."""

    @property
    def key_digest(self) -> bytes | None:
        """Digest of the API key; None without a key."""
        return None if self.key_sha256 is None else bytes.fromhex(self.key_sha256)


def http_limits(settings: ServerSettings) -> Any:
    """Return the limits of the HTTP API."""
    from .limits import Limits

    upload = settings.max_upload_mib * 2**20
    return Limits(
        body_bytes=upload,
        all_bodies_bytes=8 * upload,
        side=settings.max_side,
        images=settings.max_images,
        steps=settings.max_steps,
    )


def start_app(settings: ServerSettings) -> ServingApp:
    """Load a base, start its engine, and return the application; close `service.engine` at the end.

    Raises:
        RestuneError: if the base, the device or the tuner folder does not exist, or a tuner cannot be downloaded.
    """
    from ...pipelines.load_base import load_placed
    from ...storage.sources import tuner_file
    from ..engine import Engine
    from ..library import TunerLibrary
    from ..limits import Limits
    from .app import ServingApp
    from .service import Service

    # First, because the base takes longer to load.
    library = None
    if settings.tuners is not None or settings.tuner_repos:
        library = TunerLibrary(settings.tuners, files={each: tuner_file(each) for each in settings.tuner_repos})
    pipeline = load_placed(settings.base, settings.device, settings.dtype, settings.vae)
    pipeline.set_progress_bar_config(disable=True)
    limits = Limits(
        max_rows=settings.max_rows,
        max_queue=settings.max_queue,
        max_side=settings.max_side,
        max_steps=settings.max_steps,
    )
    engine = Engine(pipeline, library, limits)
    engine.start()
    service = Service(engine, library, base_facts(settings.base, pipeline), http_limits(settings))
    return ServingApp(service, settings.key_digest)


def base_facts(base: str, pipeline: Any) -> BaseFacts:
    """Return the facts about a base that responses and records name.

    Args:
        base: path or id of the base.
        pipeline: its pipeline.
    """
    from ...pipelines.call_options import image_size
    from ...pipelines.schedulers import scheduler_label
    from ...storage.base_files.location import public_name
    from .image_files import BaseFacts

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
