"""Record of an image file, for `restune inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...imaging.generation_record import GenerationRecord, parse_a1111
from ...utils.display import printable

_LINE = 2000
_SHORT = 16


def record_as_json(path: Path, record: GenerationRecord) -> dict[str, Any]:
    """Return the record of an image as JSON values: that of this package, and A1111's."""
    prompt, negative_prompt, pairs = parse_a1111(record.text)
    a1111 = {"prompt": prompt, "negative_prompt": negative_prompt, "parameters": pairs} if record.text else None
    return {"file": str(path), "generation": record.facts or None, "a1111": a1111}


def record_as_text(path: Path, record: GenerationRecord) -> str:
    """Return the main facts of an image's record, one per line; control characters are escaped."""
    facts = [("file", str(path)), *(_own_facts(record.facts) if record.facts else _a1111_facts(record.text))]
    width = max(len(name) for name, _ in facts) + 2
    return "\n".join(f"{name:<{width}}{_shown(name, str(value))}" for name, value in facts)


def _shown(name: str, value: str) -> str:
    # A command is for copying, so its line breaks are kept; others stay visible as such.
    return "\n".join(map(printable, value.split("\n"))) if name == "command" else printable(value, _LINE)


def _own_facts(facts: dict[str, Any]) -> list[tuple[str, object]]:
    base, scheduler = _mapping(facts.get("base")), _mapping(facts.get("scheduler"))
    named = ("prompt", "negative_prompt", "seed", "steps", "guidance", "guidance_rescale", "clip_skip")
    shown: list[tuple[str, object]] = [
        (name.replace("_", " "), facts.get(name))
        for name in named
        if facts.get(name) not in (None, 0.0) or name == "seed"
    ]
    shown += [
        ("size", f"{facts.get('width')}x{facts.get('height')}"),
        ("scheduler", scheduler.get("class")),
        ("base", f"{base.get('name')} (sha256 {str(base.get('sha256'))[:_SHORT]})"),
    ]
    if vae := _mapping(facts.get("vae")):
        shown.append(("vae", f"{vae.get('name')} (sha256 {str(vae.get('sha256'))[:_SHORT]})"))
    tuners = facts.get("tuners")
    for tuner in map(_mapping, tuners if isinstance(tuners, list) else []):
        hashed = str(tuner.get("sha256"))[:_SHORT]
        shown.append((str(tuner.get("kind")), f"{tuner.get('file')}:{tuner.get('weight')} (sha256 {hashed})"))
    shown += [
        ("computed", f"on {facts.get('device')} in {facts.get('dtype')}"),
        ("written by", f"restune-diffusion {facts.get('restune_diffusion')}"),
    ]
    if "grid" not in facts:
        shown.append(("command", facts.get("command")))
    return shown


def _a1111_facts(text: str) -> list[tuple[str, object]]:
    prompt, negative, pairs = parse_a1111(text)
    return [("prompt", prompt), *([("negative prompt", negative)] if negative else []), *pairs.items()]


def _mapping(value: object) -> dict[str, Any]:
    """Return a value if it is a JSON object, otherwise an empty one; the file may hold anything."""
    return value if isinstance(value, dict) else {}
