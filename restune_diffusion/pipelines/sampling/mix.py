"""Tuners of a generation: files, weights, sites, schedules, masks and guidance branches."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from ...utils.errors import BaseMismatchError, RestuneError
from ...utils.weighted_path import split_weight

if TYPE_CHECKING:
    from ...hooks.weights import TunerWeight


class MixSettings(BaseModel):
    """Tuner files and their weights.

    An option of one tuner starts with the tuner's name, `NAME:`. The name is the file name without its extension. It
    may be omitted if there is only one tuner.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    tuner: tuple[str, ...] = ()
    """Tuner files, each optionally with its weight after a colon: `watercolor.safetensors:0.8`; the default weight is
    1."""
    lora: tuple[str, ...] = ()
    """LoRA files of diffusers or kohya's sd-scripts for the U-Net, each optionally with its weight after a colon:
    `pixel.safetensors:0.7`. The options of tuners apply to them too."""
    tuner_sites: tuple[str, ...] = ()
    """Factors by site on the tuner's weight: `"skip.0-3=0.2, up.*=0"`, or `"watercolor: skip.0-3=0.2"` with several
    tuners. If several patterns match a site, the last one applies."""
    tuner_schedule: tuple[str, ...] = ()
    """Factors over the denoising steps on the tuner's weight, from 0 (pure noise) to 1: `"0.3-1: 1"`, or
    `"0-0.5: 0>1, 0.5-1: 1"` with a ramp; zero elsewhere. With several tuners: `"watercolor: 0.3-1: 1"`."""
    tuner_mask: tuple[str, ...] = ()
    """Mask image; the tuner acts in its white area: `left.png`, or `watercolor:left.png` with several tuners."""
    tuner_guidance: tuple[str, ...] = ()
    """Guidance branch that the tuner acts on: `both`, `cond` (conditional) or `uncond` (unconditional), after `NAME:`
    with several tuners."""

    def files(self) -> list[tuple[str, float]]:
        """Return the path and the weight of each tuner, then of each LoRA."""
        return [split_weight(argument) for argument in (*self.tuner, *self.lora)]

    def weights(self) -> dict[str, tuple[str, TunerWeight]]:
        """Return the file and the weight of each tuner, keyed by name.

        Raises:
            RestuneError: if an option is malformed, or names a tuner that is not given.
        """
        from ...hooks.weights import TunerWeight, schedule
        from ...imaging.masks import load_mask

        files = self.files()
        names = unique_names([path for path, _ in files])
        sites = _by_tuner("--tuner-sites", self.tuner_sites, names)
        steps = _by_tuner("--tuner-schedule", self.tuner_schedule, names)
        masks = _by_tuner("--tuner-mask", self.tuner_mask, names)
        branches: dict[str, Any] = _by_tuner("--tuner-guidance", self.tuner_guidance, names)
        return {
            name: (
                path,
                TunerWeight(
                    value,
                    sites=read_sites(sites[name]) if name in sites else {},
                    steps=schedule(steps[name]) if name in steps else None,
                    mask=load_mask(masks[name]) if name in masks else None,
                    on=branches.get(name, "both"),
                ),
            )
            for name, (path, value) in zip(names, files, strict=True)
        }


def distinct_labels(paths: list[str]) -> list[str]:
    """Return names for people: the file names without extension, with the folder where two are equal.

    The tuners of two checkpoints of a run are `step-000500/tuner` and `step-001000/tuner`.
    """
    places = [Path(path).with_suffix("").parts for path in paths]
    return ["/".join(place[-_distinct_depth(place, places) :]) for place in places]


def _distinct_depth(place: tuple[str, ...], places: list[tuple[str, ...]]) -> int:
    """Return how many last parts of a path tell it from the others; 1 if a file is given twice."""
    others = [other for other in places if other != place]
    depths = range(1, len(place) + 1)
    return next((depth for depth in depths if all(other[-depth:] != place[-depth:] for other in others)), 1)


def load_tuners(pipeline: Any, weights: dict[str, tuple[str, TunerWeight]], loras: int = 0) -> None:
    """Load the tuners of a generation into a pipeline and set their weights.

    Args:
        pipeline: pipeline with the base.
        weights: file and weight of each tuner, by name.
        loras: number of the last of them that are LoRA files of other programs.
    """
    for number, (name, (path, _)) in enumerate(weights.items()):
        is_lora = number >= len(weights) - loras
        try:
            pipeline.load_tuner_weights(_imported(pipeline, path) if is_lora else path, tuner_name=name)
        except BaseMismatchError as error:
            # Which of several tuners it is.
            raise BaseMismatchError(f"{name}: {error}") from error
    pipeline.set_tuners({name: weight for name, (_, weight) in weights.items()})


def _imported(pipeline: Any, path: str) -> Any:
    from ...backbones import describe_base
    from ...conversion.formats import import_tuner

    return import_tuner(Path(path).expanduser(), describe_base(pipeline.unet))


def read_sites(text: str) -> dict[str, float]:
    """Parse factors by site, such as `skip.0-3=0.2, up.*=0`.

    Raises:
        RestuneError: if an entry is malformed; the message quotes it.
    """
    factors = {}
    for piece in text.split(","):
        pattern, _, factor = piece.partition("=")
        try:
            factors[pattern.strip()] = float(factor)
        except ValueError:
            raise RestuneError(
                f"Invalid site weight `{piece.strip()}`. Expected `SITES=FACTOR`, for example `skip.0-3=0.2, up.*=0`."
            ) from None
    return factors


def unique_names(paths: list[str]) -> list[str]:
    """Return the file names without extension; repeated names get a numeric suffix."""
    names: list[str] = []
    for path in paths:
        stem = name = Path(path).stem
        count = 1
        while name in names:
            count += 1
            name = f"{stem}-{count}"
        names.append(name)
    return names


def _by_tuner(option: str, arguments: Iterable[str], names: list[str]) -> dict[str, str]:
    """Return the value of an option for each tuner, keyed by tuner name."""
    found: dict[str, str] = {}
    for argument in arguments:
        name, colon, rest = argument.partition(":")
        if colon and name.strip() in names:
            name = name.strip()
        elif len(names) == 1:
            name, rest = names[0], argument
        else:
            raise RestuneError(
                f"{option} {argument!r} names no tuner; prepend the name of a tuner and a colon. The tuners are "
                f"{', '.join(names)}."
                if names
                else f"{option} {argument!r} needs a tuner; give one with --tuner."
            )
        if name in found:
            raise RestuneError(f"{option} is given twice for the tuner {name}; give it once.")
        found[name] = rest.strip()
    return found
