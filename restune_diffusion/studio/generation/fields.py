"""Values of the form, and the settings of a generation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ...pipelines.sampling.grid import GridSettings
from ...pipelines.sampling.mix import unique_names
from ...pipelines.sampling.settings import DEFAULT_STRENGTH, SamplingSettings
from ...utils.errors import UsageError

if TYPE_CHECKING:
    from ...serving.library import TunerEntry
    from ..context import StudioSettings

MIX, EACH, ALL, GRID = "mix", "each", "all", "grid"
MODES = {
    MIX: "One image, all chosen tuners together",
    EACH: "An image for each chosen tuner",
    ALL: "One prompt in all my styles",
    GRID: "Grid: prompts by tuners and weights",
}
MOST_TUNERS = 8
MOST_SEED = 2**32 - 1
MOST_PIXELS = 2048
"""Longest side of an image. A larger one can fill the memory of the machine, and no step ends at which it can stop."""
_FULL = (0.0, 100.0)
FOREIGN = "lora"
"""Family of a file of another program in the library."""


@dataclass(frozen=True)
class TunerRow:
    """Settings of one chosen tuner.

    Args:
        name: name of the tuner in the library.
        weight: its weight.
        start: part of the denoising steps before it acts, in percent.
        end: part of the denoising steps after which it no longer acts, in percent.
        sites: sites on which it acts, such as `skip.0-3, mid`, or factors such as `skip.0-3=0.2`; empty for all.
    """

    name: str
    weight: float = 1.0
    start: float = _FULL[0]
    end: float = _FULL[1]
    sites: str = ""

    @property
    def site_factors(self) -> str:
        """Factors by site in the syntax of `--tuner-sites`; empty for all sites."""
        text = self.sites.strip()
        if text.lower() in ("", "all", "*") or "=" in text:
            return "" if "=" not in text else text
        return ", ".join(["*=0", *(f"{pattern.strip()}=1" for pattern in text.split(",") if pattern.strip())])

    @property
    def schedule(self) -> str:
        """Schedule in the syntax of `--tuner-schedule`; empty if the tuner acts in all steps.

        Raises:
            UsageError: if the range is empty.
        """
        if (self.start, self.end) == _FULL:
            return ""
        if self.start >= self.end:
            raise UsageError(
                f"The tuner {self.name} begins at {self.start:g} % of the steps and ends at {self.end:g} %; choose an "
                "end that is later than the beginning."
            )
        return f"{self.start / 100:g}-{self.end / 100:g}: 1"


@dataclass(frozen=True)
class FormValues:
    """Values of the form; the names are those of the page's components."""

    base: str
    mode: str = MIX
    prompt: str = ""
    negative_prompt: str = ""
    tuners: Sequence[TunerRow] = ()
    seed: int = 0
    images: int = 1
    width: int | None = None
    height: int | None = None
    steps: int = 30
    guidance: float = 7.5
    guidance_rescale: float = 0.0
    scheduler: str | None = None
    clip_skip: int | None = None
    init_image: str | None = None
    strength: float = DEFAULT_STRENGTH
    control_image: str | None = None
    control_from: str | None = None
    with_base: bool = True
    weights: str = ""
    with_mix: bool = False
    share_steps: int = 0

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of a grid, one a line; otherwise the prompt."""
        if self.mode != GRID:
            return (self.prompt,)
        return tuple(line for line in map(str.strip, self.prompt.splitlines()) if line)


def sampling_settings(
    values: FormValues, entries: Mapping[str, TunerEntry], settings: StudioSettings
) -> SamplingSettings:
    """Return the settings of a generation, as those that `restune generate` or `restune grid` get.

    Args:
        values: values of the form.
        entries: entries of the chosen tuners in the library, by name.
        settings: settings of the studio.

    Raises:
        UsageError: if a value is not allowed; the message names the field.
    """
    if not values.prompts or not values.prompt.strip():
        raise UsageError("The prompt is empty; describe the image that you want.")
    for name, side in (("width", values.width), ("height", values.height)):
        if side is not None and side > MOST_PIXELS:
            raise UsageError(f"The {name} of {side} pixels is too large; use {MOST_PIXELS} at most.")
    # The order of the command line: tuners, then LoRA files of other programs.
    rows = sorted(values.tuners, key=lambda row: is_foreign(entries[row.name]))
    names = unique_names([str(entries[row.name].path) for row in rows])
    columns = _numbers(values.weights) if values.mode == GRID else ()
    files: dict[bool, list[str]] = {False: [], True: []}
    for row in rows:
        path = str(entries[row.name].path)
        files[is_foreign(entries[row.name])].append(path if columns else f"{path}:{row.weight:g}")
    given: dict[str, Any] = {
        "base": values.base.strip(),
        "vae": settings.vae,
        "device": settings.device,
        "dtype": settings.dtype,
        "prompt": values.prompts,
        "negative_prompt": values.negative_prompt.strip() or None,
        "tuner": tuple(files[False]),
        "lora": tuple(files[True]),
        "tuner_sites": _prefixed(names, [row.site_factors for row in rows]),
        "tuner_schedule": _prefixed(names, [row.schedule for row in rows]),
        "init_image": None if values.init_image is None else Path(values.init_image),
        "strength": None if values.init_image is None else values.strength,
        "control_image": _listed(values.control_image),
        "control_from": _listed(values.control_from),
    }
    same = ("seed", "images", "steps", "guidance", "guidance_rescale", "scheduler", "clip_skip", "width", "height")
    given |= {name: getattr(values, name) for name in same}
    try:
        if values.mode != GRID:
            return SamplingSettings(**given)
        if values.share_steps > values.steps:
            raise UsageError(
                f"{values.share_steps} shared steps are more than the {values.steps} steps; share fewer of them."
            )
        given |= {"mix": values.with_mix, "share_steps": values.share_steps}
        given |= {"weights_of_columns": columns} if columns else {}
        return GridSettings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        field_name = str(first["loc"][0]).replace("_", " ") if first["loc"] else "form"
        raise UsageError(f"The field {field_name} is not allowed to have this value: {first['msg']}.") from error


def is_foreign(entry: TunerEntry) -> bool:
    """Return whether a tuner is a LoRA file of another program."""
    return entry.families == (FOREIGN,)


def moved_rows(before: Iterable[TunerRow], names: Sequence[str]) -> list[TunerRow]:
    """Return the rows of newly chosen names; a tuner that was chosen before keeps its settings."""
    kept = {row.name: row for row in before}
    return [kept.get(name, TunerRow(name)) for name in names]


def number_or(value: object, default: float) -> float:
    """Return a number of the page; a default for an empty field."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default


def changed(values: FormValues, **changes: Any) -> FormValues:
    """Return the form with some values changed; unknown names are ignored."""
    known = {each.name for each in fields(values)}
    return replace(values, **{name: value for name, value in changes.items() if name in known})


def _prefixed(names: Sequence[str], texts: Sequence[str]) -> tuple[str, ...]:
    """Return the options that name their tuner, without the empty ones."""
    given = [(name, text) for name, text in zip(names, texts, strict=True) if text]
    # As a person types it: the name may be omitted if there is only one tuner.
    return tuple(text if len(names) == 1 else f"{name}: {text}" for name, text in given)


def _listed(value: str | None) -> tuple[str, ...]:
    return () if value is None else (value,)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"The weights {text!r} are not numbers; write for example `0.5, 1`.") from None
