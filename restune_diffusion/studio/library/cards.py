"""HTML of the cards, of a tuner's facts, and of a comparison; all text of files is escaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from ...serving.library import TunerEntry
from ...utils.display import printable, readable_size
from ...utils.errors import RestuneError
from .compare import Comparison
from .thumbnails import data_url

_LONGEST = 300
_FAMILIES = {
    "skip": "Skip",
    "res": "Res",
    "bypass": "Bypass",
    "control": "Control",
    "text": "Text",
    "lora": "LoRA of another program",
}
_RECIPE = {
    "learning_rate": "learning rate",
    "optimizer": "optimizer",
    "batch_size": "batch size",
    "seed": "seed",
    "mixed_precision": "precision",
}

SELECT_CARD = """
element.addEventListener('click', event => {
  const card = event.target.closest('[data-tuner]');
  if (card) trigger('select', {value: card.dataset.tuner});
});
"""
"""Script of the cards: a click, or Enter on a focused card, selects its tuner."""


def cards_html(
    entries: Sequence[TunerEntry], problem: Callable[[TunerEntry], str | None], selected: str | None
) -> str:
    """Return the cards of tuners, as buttons.

    Args:
        entries: the tuners.
        problem: function that returns the reason why a tuner cannot be used.
        selected: name of the selected tuner.
    """
    cards = [_card(entry, problem(entry), entry.name == selected) for entry in entries]
    return f'<div class="tuner-cards">{"".join(cards)}</div>'


def empty_html(query: str) -> str:
    """Return the text in place of the cards if there are none."""
    if query.strip():
        return f'<p class="tuner-none">No tuner matches “{escape(printable(query.strip(), 80))}”.</p>'
    return '<p class="tuner-none">The library is empty. Import a file below, or add the tuner of a finished run.</p>'


def _card(entry: TunerEntry, problem: str | None, is_selected: bool) -> str:
    chips = "".join(f'<span class="tuner-chip">{escape(_family(each))}</span>' for each in entry.families)
    words = f"<small>Trigger words: {escape(', '.join(entry.trigger_words))}</small>" if entry.trigger_words else ""
    fit = '<span class="tuner-chip tuner-bad">Cannot be used</span>' if problem else ""
    base = f"<small>Base: {escape(entry.base)}</small>" if entry.base else ""
    return (
        f'<button type="button" class="tuner-card" data-tuner="{escape(entry.name)}" '
        f'aria-pressed="{str(is_selected).lower()}">{_thumbnail(entry)}'
        f'<span class="tuner-text"><strong>{escape(entry.name)}</strong><span>{chips}{fit}</span>{words}{base}'
        f"<small>{readable_size(entry.bytes)}, {_date(entry)}</small></span></button>"
    )


def _thumbnail(entry: TunerEntry) -> str:
    if entry.thumbnail is not None:
        return f'<img src="{escape(entry.thumbnail)}" alt="">'
    return f'<span class="tuner-blank" aria-hidden="true">{escape(entry.name.rpartition("/")[2][:1].upper())}</span>'


def _date(entry: TunerEntry) -> str:
    return f"{datetime.fromtimestamp(entry.modified, UTC):%Y-%m-%d}"


def _family(name: str) -> str:
    return _FAMILIES.get(name, name)


def details_html(entry: TunerEntry, problem: str | None) -> str:
    """Return the facts of a tuner, and whether it fits the base.

    Args:
        entry: the tuner.
        problem: reason why it cannot be used.
    """
    fit = (
        f'<p class="tuner-fit tuner-bad" role="note">{escape(problem)}</p>'
        if problem
        else '<p class="tuner-fit">Fits the base of this page.</p>'
    )
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(printable(str(value), _LONGEST))}</dd>" for name, value in _facts(entry)
    )
    return f'<section aria-label="Facts">{fit}<dl class="tuner-facts">{rows}</dl></section>'


def _facts(entry: TunerEntry) -> list[tuple[str, Any]]:
    from ...storage.header import read_header

    facts: list[tuple[str, Any]] = [
        ("Name", entry.name),
        ("Kind", ", ".join(map(_family, entry.families)) or "unknown"),
    ]
    facts += [("Base", entry.base or "not recorded"), ("Trigger words", ", ".join(entry.trigger_words) or "none")]
    if entry.conditions:
        facts.append(("Condition images", ", ".join(entry.conditions)))
    facts += [("Size", readable_size(entry.bytes)), ("Changed", _date(entry))]
    if entry.families == ("lora",):
        return facts
    try:
        info = read_header(entry.path)
    except RestuneError:
        return facts
    facts.append(("Parameters", f"{info.num_parameters:,} ({info.dtype})"))
    training = info.training
    config = training.get("config")
    config = config if isinstance(config, Mapping) else {}
    if "steps" in training:
        facts.append(("Trained", f"{training.get('steps')} steps on {training.get('images', '?')} images of "
                                 f"{training.get('resolution', '?')} px"))  # fmt: skip
    recipe = ", ".join(f"{_RECIPE[key]} {config[key]}" for key in _RECIPE if config.get(key) is not None)
    if recipe:
        facts.append(("Settings", recipe))
    if date := info.metadata.get("modelspec.date"):
        facts.append(("Made", date))
    return facts


def comparison_html(comparison: Comparison) -> str:
    """Return a comparison as a table: a column for the base and each tuner, a row for each seed."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in comparison.columns)
    rows = []
    for row, seed in enumerate(comparison.seeds):
        cells = (
            f'<td><img src="{data_url(column[row])}" alt="{escape(name)}, seed {seed}"></td>'
            for name, column in zip(comparison.columns, comparison.images, strict=True)
        )
        rows.append(f'<tr><th scope="row">Seed {seed}</th>{"".join(cells)}</tr>')
    # A table wider than the page scrolls, with the keyboard too.
    return (
        '<div class="tuner-compared" tabindex="0" role="region" aria-label="Comparison">'
        f"<table><thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
