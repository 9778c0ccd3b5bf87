"""Tuner options of one pipeline call: which tuners act on which image, and the layout of the batch."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from ..hooks.manager import TunerManager
from ..hooks.mixing import HostTimesteps, Layout
from ..hooks.weights import TunerWeight, Weight, as_weight
from ..utils.errors import RestuneError

_STEP = 8  # diffusers' pipelines refuse other sizes, whatever the autoencoder

MixPerImage: TypeAlias = Sequence[str | Mapping[str, float] | None]


def image_size(pipeline: Any, width: int | None, height: int | None) -> tuple[int, int]:
    """Return width and height of the images in pixels; a side that is not given has the base's native size.

    A call of diffusers' pipelines with only one side ignores it and uses the native size for both.

    Raises:
        RestuneError: if a side is not a multiple of what pipeline and autoencoder require.
    """
    native = pipeline.unet.config.sample_size
    native_height, native_width = (native, native) if isinstance(native, int) else native
    scale = pipeline.vae_scale_factor
    sides = {"width": width or native_width * scale, "height": height or native_height * scale}
    factor = math.lcm(_STEP, scale)
    for name, side in sides.items():
        if side % factor:
            below = side // factor * factor
            nearest = f"{below} or {below + factor}" if below else str(factor)
            raise RestuneError(
                f"A {name} of {side} does not fit this base; use a multiple of {factor}, for example {nearest}."
            )
    return sides["width"], sides["height"]


def call_layout(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], base: Any) -> Layout | None:
    """Return the number of images of a call, and whether it uses classifier-free guidance, from its arguments.

    Args:
        call: the pipeline's own `__call__`.
        args: its positional arguments.
        kwargs: its keyword arguments.
        base: the denoiser.

    Returns:
        The layout; None if the arguments do not fit the signature, in which case the call itself raises the error.
    """
    try:
        bound = inspect.signature(call).bind(*args, **kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    asked = bound.arguments
    prompt, embeds = asked.get("prompt"), asked.get("prompt_embeds")
    prompts = len(prompt) if isinstance(prompt, list) else 1 if embeds is None else len(embeds)
    guided = asked.get("guidance_scale", 1) > 1 and base.config.get("time_cond_proj_dim") is None
    per_prompt = asked.get("num_images_per_prompt") or asked.get("num_videos_per_prompt") or 1
    return Layout(prompts * per_prompt, guided, prompts)


def encode_conditions_ahead(
    pipeline: Any, manager: TunerManager, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Encode the condition images of a call before a compiled U-Net runs, if the size of its latents is known.

    The features are then in the same tensors for all images, which a recorded CUDA graph needs. Otherwise the first
    forward pass encodes the images, in a graph of its own.

    Args:
        pipeline: the pipeline.
        manager: manager of the tuners on its U-Net.
        call: the pipeline's own `__call__`.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    signature = inspect.signature(call)
    asked = signature.bind_partial(*args, **kwargs).arguments
    width, height = asked.get("width"), asked.get("height")
    # A pipeline that takes an image generates in the size of the image.
    if "image" not in signature.parameters or (width and height):
        width, height = image_size(pipeline, width, height)
        manager.encode_conditions((height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor))


@contextlib.contextmanager
def mixed(
    manager: TunerManager,
    tuners: MixPerImage | None,
    layout: Layout | None,
    device: torch.device,
    scheduler: Any,
) -> Iterator[None]:
    """Context manager that applies the tuner weights of one call and restores the previous weights afterwards.

    Args:
        manager: manager of the base's tuners.
        tuners: tuners of each prompt; None keeps the current weights.
        layout: layout of the batch, if known.
        device: device of the base.
        scheduler: the pipeline's scheduler.

    Raises:
        TunerNameError: if a name is unknown.
        RestuneError: if the number of entries differs from the number of prompts, or a weight is for another number
            of images.
    """
    before = manager.weights
    manager.layout = layout
    manager.num_train_timesteps = scheduler.config.num_train_timesteps
    manager.timesteps = HostTimesteps(scheduler)
    try:
        if tuners is not None:
            mix = mix_of_call(tuners, layout, before)
            if mix and not manager.enabled:
                raise RestuneError("The tuners are disabled, so `tuners` has no effect; call enable_tuners() first.")
            manager.set_weights(mix)
        # A compiled graph can neither check the weights nor move a tuner.
        if layout is not None:
            manager.check_images(layout.images)
        manager.check_modules()
        manager.place(device)
        yield
    finally:
        manager.layout = manager.timesteps = None
        if tuners is not None:
            # Tuners that a callback has deleted during the call are not restored.
            manager.set_weights({name: before[name] for name in manager.names if name in before})


def mix_of_call(tuners: MixPerImage, layout: Layout | None, before: Mapping[str, Weight]) -> dict[str, Weight]:
    """Return the weight of each tuner with a value per image; its other settings from `set_tuners` are kept."""
    if isinstance(tuners, str | Mapping):
        raise RestuneError("`tuners` is a list with one entry for each prompt: a name, {name: weight}, or None.")
    if layout is not None and layout.prompts != len(tuners):
        raise RestuneError(
            f"There are {len(tuners)} entries in `tuners` for {layout.prompts} prompts; give one per prompt."
        )
    by_name = weights_by_name(tuners, layout.images // layout.prompts if layout is not None else 1)
    settings = {name: as_weight(weight) for name, weight in before.items()}
    return {name: replace(settings.get(name, TunerWeight()), value=tuple(values)) for name, values in by_name.items()}


def weights_by_name(tuners: MixPerImage, images_per_prompt: int) -> dict[str, list[float]]:
    """Convert one mix per prompt to one list of weights per tuner, with an entry per image."""
    mixes = [_mix(entry) for entry in tuners]
    names = dict.fromkeys(name for mix in mixes for name in mix)
    # In diffusers the images of one prompt are adjacent.
    return {name: [mix.get(name, 0.0) for mix in mixes for _ in range(images_per_prompt)] for name in names}


def _mix(entry: str | Mapping[str, float] | None) -> Mapping[str, float]:
    """Return the mix of one prompt.

    Raises:
        RestuneError: if the entry has another form.
    """
    if entry is None:
        return {}
    if isinstance(entry, str):
        return {entry: 1.0}
    if not isinstance(entry, Mapping) or not all(isinstance(weight, int | float) for weight in entry.values()):
        raise RestuneError(
            "An entry of `tuners` is a name, {name: number}, or None. Schedules, masks and factors by site are set "
            "with set_tuners, and are kept."
        )
    return entry


def listed(names: str | Sequence[str]) -> list[str]:
    """Return one name or several as a list."""
    return [names] if isinstance(names, str) else list(names)


def named_weights(
    names: str | Sequence[str] | Mapping[str, Weight], weights: float | Sequence[float] | None
) -> dict[str, Weight]:
    """Return weights by name from the arguments of `set_tuners`.

    Raises:
        RestuneError: if the number of weights differs from the number of names, or weights are given twice.
    """
    if isinstance(names, Mapping):
        if weights is not None:
            raise RestuneError("Weights are given both in the mapping and as `weights`; give only one of them.")
        return dict(names)
    names = listed(names)
    weights = 1.0 if weights is None else weights
    values = [weights] * len(names) if isinstance(weights, int | float) else list(weights)
    if len(values) != len(names):
        raise RestuneError(f"There are {len(names)} tuner names but {len(values)} weights; give one weight per name.")
    return dict(zip(names, values, strict=True))
