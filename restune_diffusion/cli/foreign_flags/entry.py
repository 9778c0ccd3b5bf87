"""Entry of a table of foreign flags, and conversions of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Takes: TypeAlias = Literal["nothing", "value", "values"]
Verdict: TypeAlias = Literal["translated", "refused", "ignored"]
Convert: TypeAlias = Callable[[Sequence[str]], list[str]]


class NotTranslated(ValueError):
    """A value of a foreign flag has no equivalent; the message is the remedy."""


@dataclass(frozen=True)
class ForeignFlag:
    """Flag of another program's training script.

    Attributes:
        name: name with `_`, without dashes.
        takes: number of its values.
        verdict: what happens to it.
        ours: our flags, for the table in the docs.
        note: the difference, the remedy of a refusal, or the reason for ignoring it.
        convert: our arguments for its values.
        sample: values that show the verdict, for the test.
    """

    name: str
    takes: Takes
    verdict: Verdict
    ours: str
    note: str
    convert: Convert | None = None
    sample: tuple[str, ...] = ()


def same(name: str, ours: str, sample: str, note: str = "", convert: Convert | None = None) -> ForeignFlag:
    """Return an entry for a flag whose value is that of our flag."""
    return ForeignFlag(name, "value", "translated", ours, note, convert or (lambda values: [ours, *values]), (sample,))


def switch(name: str, ours: str, note: str = "") -> ForeignFlag:
    """Return an entry for a flag without a value, which stands for fixed arguments."""
    return ForeignFlag(name, "nothing", "translated", ours, note, lambda values: ours.split())


def refused(name: str, remedy: str, takes: Takes = "value") -> ForeignFlag:
    """Return an entry for a flag that is refused."""
    return ForeignFlag(name, takes, "refused", "", remedy, None, () if takes == "nothing" else ("1",))


def ignored(names: str, reason: str, takes: Takes = "value") -> list[ForeignFlag]:
    """Return entries for flags, separated by spaces, that are ignored with a notice."""
    sample = () if takes == "nothing" else ("1",)
    return [ForeignFlag(name, takes, "ignored", "", reason, None, sample) for name in names.split()]


def only(name: str, allowed: str, remedy: str, takes: Takes = "value") -> ForeignFlag:
    """Return an entry for a flag that is refused unless its value is what happens here anyway."""

    def check(values: Sequence[str]) -> list[str]:
        if [value.lower() for value in values] in ([], *([each] for each in allowed.lower().split())):
            return []
        raise NotTranslated(remedy)

    return ForeignFlag(name, takes, "refused", "", f"{remedy}; accepted: {allowed}", check, ("2.5",))


def chosen(ours: str, choices: Mapping[str, str]) -> Convert:
    """Return a conversion by a table, which ignores case."""

    def convert(values: Sequence[str]) -> list[str]:
        value = choices.get(values[0].lower())
        if value is None:
            raise NotTranslated(f"choose a value of {ours}: {', '.join(dict.fromkeys(choices.values()))}")
        return [ours, value]

    return convert


def resolution(values: Sequence[str]) -> list[str]:
    """Convert `512` or `512,512`."""
    sides = {side.strip() for side in values[0].strip("[]() ").split(",")}
    if len(sides) != 1:
        raise NotTranslated("the side of a square is --resolution; use --bucketing for other shapes")
    return ["--resolution", sides.pop()]


def gradient_norm(values: Sequence[str]) -> list[str]:
    """Convert a norm of 0, which clips nothing, to a very large one."""
    try:
        clips = float(values[0]) != 0
    except ValueError:
        clips = True
    return ["--max-grad-norm", values[0] if clips else "1e9"]


LOGGERS = {"tensorboard": "tensorboard", "wandb": "wandb", "none": "none"}
