"""Load a base, start the engine, and answer requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...serving.http.image_files import BaseFacts
    from .options import ServeOptions


def serve(options: ServeOptions, key: str | None) -> None:
    """Serve until the process is asked to end.

    Args:
        options: options of the command.
        key: the API key.

    Raises:
        RestuneError: if the port is in use, or the base cannot be loaded.
    """
    from ...serving.http.server import bound_socket, run_server

    bound = bound_socket(options.host, options.port)
    with bound:
        from ..options.placement import load_placed
        from ..quiet import quiet_libraries

        quiet_libraries()
        pipeline = load_placed(options.base_source, options.device, options.dtype, options.vae)
        pipeline.set_progress_bar_config(disable=True)

        from ...serving.engine import Engine
        from ...serving.http.app import ServingApp
        from ...serving.http.limits import Limits
        from ...serving.http.service import Service
        from ...serving.library import TunerLibrary
        from ...serving.limits import Limits as EngineLimits

        library = None if options.tuners is None else TunerLibrary(options.tuners)
        limits = Limits(
            body_bytes=options.max_upload_mib * 2**20,
            all_bodies_bytes=8 * options.max_upload_mib * 2**20,
            side=options.max_side,
            images=options.max_images,
            steps=options.max_steps,
        )
        engine_limits = EngineLimits(
            max_rows=options.max_rows,
            max_queue=options.max_queue,
            max_side=options.max_side,
            max_steps=options.max_steps,
        )
        engine = Engine(pipeline, library, engine_limits)
        engine.start()
        try:
            app = ServingApp(Service(engine, library, base_facts(options.base_source, pipeline), limits), key)
            host, port = bound.getsockname()[:2]
            address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            run_server(
                app,
                bound,
                drain=app.drain,
                grace_seconds=options.grace_seconds,
                on_start=lambda: print(f"Serving {app.service.base.name} at {address}", flush=True),
            )
        finally:
            engine.close()
    print("The server has ended.", flush=True)


def base_facts(base: str, pipeline: Any) -> BaseFacts:
    """Return the facts about a base that responses and records name."""
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
