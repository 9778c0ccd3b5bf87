"""Request for one image: what a caller asks the engine for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from PIL import Image

from ..utils.errors import RestuneError
from .errors import RequestRefused

MAX_STEPS = 1000
MAX_PROMPT = 10_000
MAX_TUNERS = 16
MAX_WEIGHT = 100.0
MAX_GUIDANCE = 100.0
SEED_LIMIT = 2**63
_MAX_SIDE = 1 << 16

ConditionImages: TypeAlias = Mapping[str, Image.Image | Mapping[str, Image.Image]]
"""Images by the name of a condition, or by the name of a tuner: one image, or images by condition."""


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """Request for one image. Several images of one prompt are several requests with different seeds.

    The constructor checks everything that needs neither the base nor a tuner; `Engine.submit` checks the rest.

    Args:
        prompt: the prompt.
        negative_prompt: the negative prompt; it has no effect without guidance.
        seed: seed of the noise; None chooses one, which the result reports.
        width: width in pixels; None takes that of `image`, or the base's native width.
        height: height in pixels; None takes that of `image`, or the base's native height.
        steps: number of denoising steps, before `strength` reduces it.
        guidance: scale of classifier-free guidance; 1 or less turns it off, which halves the computation.
        scheduler: name of a scheduler, for example `euler`, `dpmpp_2m_karras`; None takes the base's own. See
            `restune_diffusion.pipelines.schedulers`.
        tuners: names of tuners in the engine's library, each with its weight. A tuner with weight 0 does not run.
        conditions: condition images of the control tuners: one image for the only condition, or a mapping as for
            `tuner_image` of a pipeline call.
        image: image to start from (image-to-image), or to repaint with `mask`.
        strength: fraction of the denoising steps that `image` goes through, more than 0 and at most 1.
        mask: mask of the area of `image` to repaint: white is repainted, black is kept.
        preview_every: number of steps between previews of the image; 0 sends none. A preview takes a decoding.

    Raises:
        RequestRefused: if a value is not valid; the message is one sentence.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int = 30
    guidance: float = 7.5
    scheduler: str | None = None
    tuners: tuple[tuple[str, float], ...] = ()
    conditions: Image.Image | ConditionImages | None = field(default=None, repr=False)
    image: Image.Image | None = field(default=None, repr=False)
    strength: float = 0.8
    mask: Image.Image | None = field(default=None, repr=False)
    preview_every: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            _check_text(name, getattr(self, name))
        for name in ("width", "height"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 1, _MAX_SIDE)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, SEED_LIMIT - 1)
        _check_integer("steps", self.steps, 1, MAX_STEPS)
        _check_integer("preview_every", self.preview_every, 0, MAX_STEPS)
        _check_number("guidance", self.guidance, 0, MAX_GUIDANCE)
        _check_number("strength", self.strength, 0, 1)
        object.__setattr__(self, "tuners", _checked_tuners(self.tuners))
        for name in ("image", "mask"):
            _check_image(name, getattr(self, name))
        _check_conditions(self.conditions)
        if self.mask is not None and self.image is None:
            raise RequestRefused("A `mask` needs the `image` that it belongs to; give both.")
        if self.image is not None and int(self.steps * self.strength) < 1:
            raise RequestRefused(
                f"A strength of {self.strength:g} leaves none of the {self.steps} steps; use at least "
                f"{1 / self.steps:.3g}, or more steps."
            )
        if self.scheduler is not None:
            _check_scheduler(self.scheduler)

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on, which takes two rows of a batch instead of one."""
        return self.guidance > 1

    @property
    def active_tuners(self) -> tuple[tuple[str, float], ...]:
        """Tuners whose weight is not zero."""
        return tuple((name, weight) for name, weight in self.tuners if weight)


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise RequestRefused(f"`{name}` must be a text, but is a {type(text).__name__}.")
    if len(text) > MAX_PROMPT:
        raise RequestRefused(f"`{name}` has {len(text)} characters; use {MAX_PROMPT} at most.")
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        raise RequestRefused(f"`{name}` has surrogate characters, which are not valid text; remove them.")


def _check_integer(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestRefused(f"`{name}` must be an integer, but is a {type(value).__name__}.")
    if not least <= value <= most:
        raise RequestRefused(f"`{name}` must be from {least} to {most}.")


def _check_number(name: str, value: object, least: float, most: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RequestRefused(f"`{name}` must be a number, but is a {type(value).__name__}.")
    if not least <= value <= most:
        raise RequestRefused(f"`{name}` must be from {least:g} to {most:g}.")


def _check_image(name: str, image: object) -> None:
    if image is not None and not isinstance(image, Image.Image):
        raise RequestRefused(f"`{name}` must be a PIL image, but is a {type(image).__name__}.")


def _check_conditions(conditions: object) -> None:
    if not isinstance(conditions, Mapping):
        _check_image("conditions", conditions)
        return
    for name, given in conditions.items():
        inner = given if isinstance(given, Mapping) else {name: given}
        for key, image in inner.items():
            if not isinstance(name, str) or not isinstance(key, str):
                raise RequestRefused("The keys of `conditions` must be names of conditions or of tuners.")
            if not isinstance(image, Image.Image):
                raise RequestRefused(
                    f"The condition {key[:80]!r} must be a PIL image, but is a {type(image).__name__}."
                )


def _check_scheduler(name: object) -> None:
    from ..pipelines.schedulers import check_scheduler_name

    _check_text("scheduler", name)
    assert isinstance(name, str)
    if len(name) > 80:
        raise RequestRefused("`scheduler` is longer than any name of a scheduler.")
    try:
        check_scheduler_name(name)
    except RestuneError as error:
        raise RequestRefused(str(error)) from None


def _checked_tuners(tuners: object) -> tuple[tuple[str, float], ...]:
    if isinstance(tuners, Mapping):
        tuners = tuple(tuners.items())
    if not isinstance(tuners, tuple | list) or not all(isinstance(e, tuple | list) and len(e) == 2 for e in tuners):
        raise RequestRefused("`tuners` must be pairs of a name and a weight.")
    if len(tuners) > MAX_TUNERS:
        raise RequestRefused(f"`tuners` has {len(tuners)} entries; use {MAX_TUNERS} at most.")
    weights: dict[str, float] = {}
    for name, weight in tuners:
        _check_text("name of a tuner", name)
        _check_number("weight of a tuner", weight, -MAX_WEIGHT, MAX_WEIGHT)
        if not math.isfinite(weight):
            raise RequestRefused("`weight of a tuner` must be finite.")
        if name in weights:
            raise RequestRefused(f"The tuner {name[:80]!r} is named twice; name it once, with the sum of the weights.")
        weights[name] = float(weight)
    return tuple(weights.items())
