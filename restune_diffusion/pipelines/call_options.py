"""What one call of a pipeline asks of its tuners: which act on which image, and what the rows of its batches are."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from ..hooks.manager import TunerManager
from ..hooks.mixing import Layout
from ..hooks.weights import TunerWeight, Weight, as_weight
from ..utils.errors import RestuneError

MixPerImage: TypeAlias = Sequence[str | Mapping[str, float] | None]


def call_layout(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], base: Any) -> Layout | None:
    """Read off a call's arguments how many images it draws, and whether with guidance.

    Args:
        call: the pipeline's own `__call__`.
        args: its positional arguments.
        kwargs: its keyword arguments.
        base: the denoiser.

    Returns:
        The layout; None where the arguments do not fit the call, which will say so itself.
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
    drawn = asked.get("num_images_per_prompt") or asked.get("num_videos_per_prompt") or 1
    return Layout(prompts * drawn, guided, prompts)


@contextlib.contextmanager
def mixed(
    manager: TunerManager,
    tuners: MixPerImage | None,
    layout: Layout | None,
    device: torch.device,
    num_train_timesteps: int,
) -> Iterator[None]:
    """Within, the tuners act as one call asks; afterwards as they did before.

    Args:
        manager: the tuners of the base.
        tuners: which tuner acts on each prompt; None leaves the mix as it is.
        layout: what the rows of a batch are, if that is known.
        device: where the base computes.
        num_train_timesteps: number of time steps of the scheduler's training.

    Raises:
        TunerNameError: if a name is unknown.
        RestuneError: if there are not as many entries as prompts, or a weight is for other images.
    """
    before = manager.weights
    manager.layout = layout
    manager.num_train_timesteps = num_train_timesteps
    try:
        if tuners is not None:
            manager.set_weights(mix_of_call(tuners, layout, before))
        # In a compiled graph neither can be looked after.
        if layout is not None:
            manager.check_images(layout.images)
        manager.place(device)
        yield
    finally:
        manager.layout = None
        if tuners is not None:
            # What a callback has set, for a call without a mix of its own, stays; what it has deleted is gone.
            manager.set_weights({name: before[name] for name in manager.names if name in before})


def mix_of_call(tuners: MixPerImage, layout: Layout | None, before: Mapping[str, Weight]) -> dict[str, Weight]:
    """Give each tuner its weights by image, and leave the rest of what `set_tuners` said of it as it is."""
    if layout is not None and layout.prompts != len(tuners):
        raise RestuneError(
            f"There are {len(tuners)} entries in `tuners` for {layout.prompts} prompts; give one for each."
        )
    by_name = weights_by_name(tuners, layout.images // layout.prompts if layout is not None else 1)
    settings = {name: as_weight(weight) for name, weight in before.items()}
    return {name: replace(settings.get(name, TunerWeight()), value=tuple(values)) for name, values in by_name.items()}


def weights_by_name(tuners: MixPerImage, images_per_prompt: int) -> dict[str, list[float]]:
    """Turn one mix for each prompt into one list of weights, by image, for each tuner."""
    mixes: list[Mapping[str, float]] = [
        {} if mix is None else {mix: 1.0} if isinstance(mix, str) else mix for mix in tuners
    ]
    names = dict.fromkeys(name for mix in mixes for name in mix)
    # diffusers puts the images of one prompt side by side
    return {name: [mix.get(name, 0.0) for mix in mixes for _ in range(images_per_prompt)] for name in names}


def listed(names: str | Sequence[str]) -> list[str]:
    """Return one name or several as a list."""
    return [names] if isinstance(names, str) else list(names)


def named_weights(
    names: str | Sequence[str] | Mapping[str, Weight], weights: float | Sequence[float] | None
) -> dict[str, Weight]:
    """Pair names with weights, as `set_tuners` takes them.

    Raises:
        RestuneError: if there are not as many weights as names, or they are given twice.
    """
    if isinstance(names, Mapping):
        if weights is not None:
            raise RestuneError("Give the weights in the mapping or as `weights`, not both.")
        return dict(names)
    names = listed(names)
    weights = 1.0 if weights is None else weights
    values = [weights] * len(names) if isinstance(weights, int | float) else list(weights)
    if len(values) != len(names):
        raise RestuneError(f"There are {len(names)} tuner names but {len(values)} weights.")
    return dict(zip(names, values, strict=True))
