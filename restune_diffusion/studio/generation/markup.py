"""HTML of the tab: the card of a tuner, the state of a generation, and notes."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...serving.library import TunerEntry

_FAMILIES = {
    "skip": "style or subject, through the skip connections",
    "bypass": "side network",
    "res": "style or subject, inside the transformer blocks",
    "control": "follows a control image",
    "text": "words and text encoders",
    "lora": "LoRA of another program",
}

STYLE = """<style>
.tuner-card { display: flex; gap: .75rem; align-items: center; overflow-wrap: anywhere; }
.tuner-card img, .tuner-card .blank { width: 3.5rem; height: 3.5rem; border-radius: .5rem; object-fit: cover;
  flex: none; background: var(--primary-700, #0f766e); color: #fff; display: grid; place-items: center;
  font-size: 1.5rem; }
.tuner-card p { margin: 0; line-height: 1.4; }
.tuner-card .facts-of-tuner { color: var(--body-text-color-subdued); font-size: .9rem; }
.tuner-card .problem-of-tuner { border-left: 4px solid #b91c1c; padding-left: .5rem; color: var(--body-text-color); }
.gen-state { min-height: 1.6rem; color: var(--body-text-color); margin: 0; overflow-wrap: anywhere; }
.gen-notes { margin: 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
/* A large image is shown whole; the page scrolls, not the gallery. */
#gen-images-made .grid-wrap { max-height: none !important; }
.gen-tuner > .styler { background: var(--block-background-fill) !important; }
@media (min-width: 900px) { #gen-result { position: sticky; top: 1rem; align-self: flex-start; } }
</style>"""


def card_html(entry: TunerEntry | None, name: str) -> str:
    """Return the card of a chosen tuner: thumbnail, families, trigger words, base, and what is wrong with its file.

    Args:
        entry: its entry; None if the library no longer has it.
        name: its name.
    """
    if entry is None:
        return _card(_initial(name), name, [_problem(f"The library no longer has the tuner {name}.")])
    image = _initial(name) if entry.thumbnail is None else f'<img src="{escape(entry.thumbnail)}" alt="">'
    lines = []
    if entry.families:
        lines.append(_fact(", ".join(_FAMILIES.get(each, each) for each in entry.families)))
    if entry.trigger_words:
        lines.append(_fact(f"Write in the prompt: {', '.join(entry.trigger_words)}"))
    if entry.conditions:
        lines.append(_fact(f"Needs a control image: {', '.join(entry.conditions)}"))
    if entry.base:
        lines.append(_fact(f"Trained on {entry.base}"))
    if entry.problem:
        lines.append(_problem(entry.problem))
    return _card(image, entry.title or name, lines)


def state_html(text: str) -> str:
    """Return the state of a generation; a screen reader reads each change."""
    return f'<p class="gen-state" role="status" aria-live="polite">{escape(text)}</p>'


def notes_html(heading: str, notes: Iterable[str]) -> str:
    """Return a heading with a list of sentences."""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<p class="gen-state" role="status">{escape(heading)}</p>' + (
        f'<ul class="gen-notes">{items}</ul>' if items else ""
    )


def _card(image: str, title: str, lines: list[str]) -> str:
    return f'<div class="tuner-card">{image}<div><p><strong>{escape(title)}</strong></p>{"".join(lines)}</div></div>'


def _initial(name: str) -> str:
    return f'<span class="blank" aria-hidden="true">{escape(name[:1].upper())}</span>'


def _fact(text: str) -> str:
    return f'<p class="facts-of-tuner">{escape(text)}</p>'


def _problem(text: str) -> str:
    return f'<p class="problem-of-tuner">{escape(text)}</p>'
