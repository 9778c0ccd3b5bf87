"""The tuners of a command line: which files, how strongly, and where, when and on what they act."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from ...utils.errors import RestuneError

if TYPE_CHECKING:
    from ...hooks.weights import TunerWeight


class MixOptions(BaseModel):
    """Tuner files and their weights.

    What belongs to one tuner starts with its name, `NAME:`; the name is that of its file without the ending, and may
    be left out where there is only one tuner.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    tuner: tuple[str, ...] = ()
    """Tuner files, each with its weight after a colon where it is not 1: `watercolor.safetensors:0.8`."""
    tuner_sites: tuple[str, ...] = ()
    """Weights by site, times the tuner's: `"skip.0-3=0.2, up.*=0"`, or `"watercolor: skip.0-3=0.2"` with several
    tuners; of several patterns that match a site, the last counts."""
    tuner_schedule: tuple[str, ...] = ()
    """Weights over the denoising steps, from 0, pure noise, to 1, times the tuner's: `"0.3-1: 1"` or
    `"0-0.5: 0>1, 0.5-1: 1"` with a ramp; zero elsewhere. With several tuners: `"watercolor: 0.3-1: 1"`."""
    tuner_mask: tuple[str, ...] = ()
    """Image whose white parts are where the tuner acts: `left.png`, or `watercolor:left.png` with several tuners."""
    tuner_guidance: tuple[str, ...] = ()
    """Which half of classifier-free guidance the tuner sees, `both`, `cond` or `uncond`, after `NAME:` with
    several tuners."""

    def weights(self) -> dict[str, tuple[str, TunerWeight]]:
        """Return the file and the weight of each tuner by its name.

        Raises:
            RestuneError: if an option has another form, or is for a tuner that is not given.
        """
        from ...hooks.weights import TunerWeight, schedule
        from ...imaging.masks import load_mask

        files = [split_weight(argument) for argument in self.tuner]
        names = unique_names([path for path, _ in files])
        sites = _by_tuner("--tuner-sites", self.tuner_sites, names)
        steps = _by_tuner("--tuner-schedule", self.tuner_schedule, names)
        masks = _by_tuner("--tuner-mask", self.tuner_mask, names)
        halves: dict[str, Any] = _by_tuner("--tuner-guidance", self.tuner_guidance, names)
        return {
            name: (
                path,
                TunerWeight(
                    value,
                    sites=read_sites(sites[name]) if name in sites else {},
                    steps=schedule(steps[name]) if name in steps else None,
                    mask=load_mask(masks[name]) if name in masks else None,
                    on=halves.get(name, "both"),
                ),
            )
            for name, (path, value) in zip(names, files, strict=True)
        }


def load_tuners(pipeline: Any, weights: dict[str, tuple[str, TunerWeight]]) -> None:
    """Load the tuners of a command line into a pipeline and give them their weights."""
    for name, (path, _) in weights.items():
        pipeline.load_tuner_weights(path, tuner_name=name)
    pipeline.set_tuners({name: weight for name, (_, weight) in weights.items()})


def read_sites(text: str) -> dict[str, float]:
    """Read factors by site: `skip.0-3=0.2, up.*=0`.

    Raises:
        RestuneError: if the text has another form; names the piece.
    """
    factors = {}
    for piece in text.split(","):
        pattern, _, factor = piece.partition("=")
        try:
            factors[pattern.strip()] = float(factor)
        except ValueError:
            raise RestuneError(
                f"`{piece.strip()}` is no weight of a site; write for instance `skip.0-3=0.2, up.*=0`."
            ) from None
    return factors


def split_weight(argument: str) -> tuple[str, float]:
    """Split `FILE:WEIGHT`; the weight may be left out, and the file may contain colons itself."""
    path, colon, weight = argument.rpartition(":")
    if not colon or not path:
        return argument, 1.0
    try:
        return path, float(weight)
    except ValueError:
        # `C:\\tuners\\a.safetensors`, or a misspelled weight, which is then told as a file that does not exist
        return argument, 1.0


def unique_names(paths: list[str]) -> list[str]:
    """Name tuners after their files, with a number behind those that share a name."""
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
    """Find out which tuner each argument of an option is for."""
    found: dict[str, str] = {}
    for argument in arguments:
        name, colon, rest = argument.partition(":")
        if colon and name.strip() in names:
            name = name.strip()
        elif len(names) == 1:
            name, rest = names[0], argument
        else:
            raise RestuneError(
                f"{option} {argument!r} does not say which tuner it is for; put a name and a colon before it: "
                f"{', '.join(names)}."
                if names
                else f"{option} {argument!r} needs a tuner; give one with --tuner."
            )
        if name in found:
            raise RestuneError(f"{option} is given twice for the tuner {name}; give it once.")
        found[name] = rest.strip()
    return found
