"""Values of the form from the record of an image of this package or of A1111."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ...imaging.generation_record import GenerationRecord, parse_a1111
from ...pipelines.sampling.mix import unique_names
from ...pipelines.sampling.record import file_sha256, public_base
from ...pipelines.schedulers import check_scheduler_name
from ...serving.http.a1111.samplers import scheduler_of
from ...serving.http.model_names import LORA_TAG
from ...utils.display import printable
from ...utils.errors import RestuneError
from ...utils.weighted_path import split_weight
from .fields import GRID, MIX, MOST_TUNERS, FormValues, TunerRow, changed

if TYPE_CHECKING:
    from ...serving.library import TunerEntry

_SHOWN = 300
_LONGEST_TEXT = 20_000
_RANGE = re.compile(r"([0-9.]+)-([0-9.]+): ?1")
_SIZE = re.compile(r"(\d+)x(\d+)")
_NUMBERS: Mapping[str, tuple[type, float, float]] = {
    "seed": (int, 0, 2**63 - 1),
    "steps": (int, 1, 1000),
    "guidance": (float, 0, 30),
    "guidance_rescale": (float, 0, 1),
    "clip_skip": (int, 1, 12),
    "width": (int, 8, 8192),
    "height": (int, 8, 8192),
    "share_steps": (int, 0, 1000),
}
# Flags without an effect on the image, or that are restored from other parts of the record.
_SILENT = {"base", "prompt", "seed", "tuner", "lora", "device", "dtype", "negative-prompt", "steps", "guidance",
           "guidance-rescale", "clip-skip", "width", "height", "scheduler", "tuner-sites",
           "tuner-schedule"}  # fmt: skip
_A1111_USED = {"Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Clip skip", "CFG Rescale", "Model",
               "Model hash", "RNG", "Version", "Lora hashes"}  # fmt: skip


@dataclass(frozen=True)
class Restored:
    """Values of the form from an image, and sentences about what was not used."""

    values: FormValues
    notes: Sequence[str]


def restored(record: GenerationRecord, now: FormValues, entries: Iterable[TunerEntry]) -> Restored:
    """Return the values of the form that generate an image again.

    Args:
        record: record of the image; it may hold anything, so each value is checked.
        now: values of the form; those that the record lacks are kept.
        entries: tuners of the library.
    """
    if record.facts:
        return _from_facts(record.facts, now, list(entries))
    return _from_a1111(record.text, now, list(entries))


def _from_facts(facts: Mapping[str, Any], now: FormValues, entries: list[TunerEntry]) -> Restored:
    notes: list[str] = []
    flags = _flags(facts.get("command"))
    changes = _checked({name: facts.get(name) for name in _NUMBERS}, notes)
    changes |= {
        "prompt": _text(facts.get("prompt")),
        "negative_prompt": _text(facts.get("negative_prompt")),
        "guidance_rescale": changes.get("guidance_rescale", 0.0),
        "clip_skip": changes.get("clip_skip"),
        "scheduler": _scheduler(next(iter(flags.get("scheduler", [])), None), notes),
        "images": 1,
        "mode": MIX,
        "init_image": None,
        "control_image": None,
        "control_from": None,
        "tuners": _rows_of_facts(facts, flags, entries, notes),
    }
    grid = facts.get("grid")
    if isinstance(grid, Mapping):
        changes |= _grid(grid, notes)
    _note_base(facts, now, notes)
    if facts.get("batch"):
        notes.append("The image was made in a batch with others; alone it may differ in the last bit of its pixels.")
    for name, given in flags.items():
        if name in ("init-image", "control-image", "control-from", "tuner-mask", "strength", "control-scale", "vae"):
            notes.append(f"Not used: {name.replace('-', ' ')} {printable(' '.join(given), _SHOWN)}.")
        elif name not in _SILENT:
            notes.append(f"Not used: the option {printable(name, _SHOWN)}.")
    return Restored(changed(now, **changes), notes)


def _from_a1111(text: str, now: FormValues, entries: list[TunerEntry]) -> Restored:
    notes: list[str] = []
    prompt, negative, pairs = parse_a1111(text[:_LONGEST_TEXT])
    size = _SIZE.fullmatch(pairs.get("Size", ""))
    given = {"seed": pairs.get("Seed"), "steps": pairs.get("Steps"), "guidance": pairs.get("CFG scale")}
    given |= {"clip_skip": pairs.get("Clip skip"), "guidance_rescale": pairs.get("CFG Rescale")}
    given |= {"width": size[1], "height": size[2]} if size else {}
    changes = _checked(given, notes)
    scheduler = None
    try:
        scheduler = scheduler_of(pairs.get("Sampler"), pairs.get("Schedule type"))
    except RestuneError:
        asked = pairs.get("Sampler") or f"with the schedule type {pairs.get('Schedule type', '')}"
        notes.append(f"Not used: Sampler {printable(asked, _SHOWN)}, which is not known here.")
    tags = [split_weight(tag) for tag in LORA_TAG.findall(prompt)]
    rows: list[TunerRow] = []
    for name, weight in tags:
        found = _by_name(name, entries)
        if found is None:
            notes.append(f"Not used: the tuner {printable(name, _SHOWN)}, which the library does not have.")
        elif all(found.name != row.name for row in rows):
            rows.append(TunerRow(found.name, weight))
    changes |= {
        "prompt": re.sub(r"[ \t]{2,}", " ", LORA_TAG.sub("", prompt)).strip() if tags else prompt,
        "negative_prompt": negative,
        "scheduler": scheduler,
        "images": 1,
        "mode": MIX,
        "init_image": None,
        "tuners": _limited(rows, notes),
    }
    if model := pairs.get("Model"):
        notes.append(f"The image was made with the base {printable(model, _SHOWN)}; choose it if you have it.")
    if not str(pairs.get("Version", "")).startswith("restune"):
        notes.append("Another program made the image; the same settings give a similar image here, not the same one.")
    unused = [f"{name} {value}" for name, value in pairs.items() if name not in _A1111_USED]
    if unused:
        notes.append(f"Not used: {printable(', '.join(unused), _SHOWN)}.")
    return Restored(changed(now, **changes), notes)


def _rows_of_facts(
    facts: Mapping[str, Any], flags: Mapping[str, list[str]], entries: list[TunerEntry], notes: list[str]
) -> list[TunerRow]:
    listed = facts.get("tuners")
    recorded = [each for each in listed if isinstance(each, Mapping)] if isinstance(listed, list) else []
    names = unique_names([str(each.get("file", "")) for each in recorded])
    sites, schedules = (_by_tuner(flags.get(flag, []), names) for flag in ("tuner-sites", "tuner-schedule"))
    rows: list[TunerRow] = []
    for name, each in zip(names, recorded, strict=True):
        file, digest = str(each.get("file", "")), str(each.get("sha256", ""))
        entry = _by_name(PurePosixPath(file).stem, entries, digest)
        if entry is None:
            notes.append(f"Not used: the tuner {printable(file, _SHOWN)}, which the library does not have.")
            continue
        if file_sha256(entry.path) != digest:
            notes.append(f"The tuner {entry.name} is another version than the one that made the image.")
        weight = each.get("weight")
        row = TunerRow(entry.name, float(weight) if isinstance(weight, int | float) else 1.0)
        rows.append(_with_range(row, sites.get(name, ""), schedules.get(name, ""), notes))
    return _limited(rows, notes)


def _with_range(row: TunerRow, sites: str, schedule: str, notes: list[str]) -> TunerRow:
    """Return a row with the sites and the range of steps of a record."""
    start, end = row.start, row.end
    if schedule:
        match = _RANGE.fullmatch(schedule.strip())
        if match is None:
            notes.append(f"Not used: the schedule {printable(schedule, _SHOWN)} of {row.name}.")
        else:
            start, end = (round(100 * float(part), 4) for part in match.groups())
    pieces = [piece.strip() for piece in sites.split(",") if piece.strip()]
    if pieces[:1] == ["*=0"] and all(piece.endswith("=1") for piece in pieces[1:]):
        sites = ", ".join(piece.removesuffix("=1") for piece in pieces[1:])
    return TunerRow(row.name, row.weight, start, end, sites)


def _grid(grid: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    rows, settings = grid.get("rows"), grid.get("settings")
    if not isinstance(rows, list) or not isinstance(settings, Mapping):
        return {}
    prompts = [_text(row.get("prompt")) for row in rows if isinstance(row, Mapping)]
    changes = _checked({name: settings.get(name) for name in ("share_steps", "seed")}, notes)
    images, weights = settings.get("images"), settings.get("weights_of_columns")
    is_list = isinstance(weights, list) and all(isinstance(each, int | float) for each in weights)
    has_own = any(split_weight(str(path))[0] != path for path in [*_list(settings, "tuner"), *_list(settings, "lora")])
    return {
        **changes,
        "mode": GRID,
        "prompt": "\n".join(dict.fromkeys(prompts)),
        "images": images if isinstance(images, int) and 0 < images <= 64 else 1,
        "weights": ", ".join(f"{each:g}" for each in weights or ()) if is_list and not has_own else "",
        "with_mix": settings.get("mix") is True,
    }


def _list(settings: Mapping[str, Any], name: str) -> list[Any]:
    value = settings.get(name)
    return value if isinstance(value, list) else []


def _note_base(facts: Mapping[str, Any], now: FormValues, notes: list[str]) -> None:
    base = facts.get("base")
    name = str(base.get("name", "")) if isinstance(base, Mapping) else ""
    if name and name != public_base(now.base):
        notes.append(f"The image was made with the base {printable(name, _SHOWN)}; choose it if you have it.")


def _flags(command: object) -> dict[str, list[str]]:
    """Return the flags of a recorded command with their values."""
    try:
        words = shlex.split(command[:_LONGEST_TEXT]) if isinstance(command, str) else []
    except ValueError:
        words = []
    flags: dict[str, list[str]] = {}
    name = ""
    for word in words[2:]:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags[name] = [value] if equals else []
        elif name:
            flags[name].append(word)
    return flags


def _checked(given: Mapping[str, object], notes: list[str]) -> dict[str, Any]:
    """Return the numbers that the form can show."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        of_type, least, most = _NUMBERS[name]
        try:
            number = of_type(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None or not least <= number <= most:
            notes.append(f"Not used: {name.replace('_', ' ')} {printable(str(value), _SHOWN)}.")
        else:
            found[name] = number
    return found


def _scheduler(name: str | None, notes: list[str]) -> str | None:
    if name is None:
        return None
    try:
        check_scheduler_name(name)
    except RestuneError:
        notes.append(f"Not used: the scheduler {printable(name, _SHOWN)}, which is not known here.")
        return None
    return name


def _by_tuner(options: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Return the value of an option for each tuner; the name may be omitted if there is only one."""
    found = {}
    for option in options:
        name, colon, rest = option.partition(":")
        if colon and name.strip() in names:
            found[name.strip()] = rest.strip()
        elif len(names) == 1:
            found[names[0]] = option.strip()
    return found


def _by_name(name: str, entries: Iterable[TunerEntry], digest: str = "") -> TunerEntry | None:
    """Return the entry of a name with or without its folder; of several, the one with the recorded content."""
    found = [entry for entry in entries if entry.name == name or Path(entry.name).name == name]
    same = [entry for entry in found if digest and file_sha256(entry.path) == digest]
    return next(iter([*same, *found]), None)


def _limited(rows: list[TunerRow], notes: list[str]) -> list[TunerRow]:
    if len(rows) > MOST_TUNERS:
        notes.append(f"Not used: {len(rows) - MOST_TUNERS} of {len(rows)} tuners; the page shows {MOST_TUNERS}.")
    return rows[:MOST_TUNERS]


def _text(value: object) -> str:
    return value[:_LONGEST_TEXT] if isinstance(value, str) else ""
