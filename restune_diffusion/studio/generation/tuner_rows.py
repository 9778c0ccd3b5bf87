"""Chosen tuners: a list to choose from, and a card with weight, steps and sites for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...serving.library import TunerEntry, TunerLibrary
from .fields import MOST_TUNERS, TunerRow, moved_rows, number_or
from .markup import card_html


@dataclass(frozen=True)
class _Row:
    group: Any
    card: Any
    inputs: tuple[Any, ...]
    """Weight, start, end and sites."""


class TunerRows:
    """Components of the chosen tuners; build it inside the page.

    Args:
        library: the library.
    """

    def __init__(self, library: TunerLibrary) -> None:
        import gradio as gr

        self._library = library
        self.chosen = gr.Dropdown(
            choices=self._choices(),
            value=[],
            multiselect=True,
            max_choices=MOST_TUNERS,
            label="Tuners",
            info=f"Styles and subjects to add to the base, up to {MOST_TUNERS}; the tab Library manages them.",
            elem_id="gen-tuners",
        )
        self.names = gr.State([])
        """Names to which the values of the rows belong."""
        self._rows = [self._row(number) for number in range(MOST_TUNERS)]

    @property
    def inputs(self) -> list[Any]:
        """Components whose values `read` takes."""
        return [self.names, *(each for row in self._rows for each in row.inputs)]

    @property
    def outputs(self) -> list[Any]:
        """Components whose values `shown` returns."""
        rows = ((row.group, row.card, *row.inputs) for row in self._rows)
        return [self.chosen, self.names, *(each for row in rows for each in row)]

    @staticmethod
    def read(values: Sequence[Any]) -> list[TunerRow]:
        """Return the rows of the values of `inputs`."""
        names, *rest = values
        rows = []
        for number, name in enumerate(names):
            weight, start, end, sites = rest[4 * number : 4 * number + 4]
            numbers = number_or(weight, 1.0), number_or(start, 0.0), number_or(end, 100.0)
            rows.append(TunerRow(name, *numbers, sites if isinstance(sites, str) else ""))
        return rows

    def shown(self, rows: Sequence[TunerRow]) -> list[Any]:
        """Return values of `outputs` that show the rows."""
        import gradio as gr

        names = [row.name for row in rows]
        entries = {entry.name: entry for entry in self._library.list()}
        values: list[Any] = [gr.Dropdown(choices=self._choices(), value=names), names]
        for number in range(MOST_TUNERS):
            row = rows[number] if number < len(rows) else TunerRow("")
            html = card_html(entries.get(row.name), row.name) if row.name else ""
            values += [gr.Group(visible=bool(row.name)), html, row.weight, row.start, row.end, row.sites]
        return values

    def on_choice(self, chosen: list[str] | None, *values: Any) -> list[Any]:
        """Handler of a new choice: a tuner that stays keeps its settings."""
        import gradio as gr

        # The list itself stays as it is: the person may have chosen more by now.
        return [gr.skip(), *self.shown(moved_rows(self.read(values), (chosen or [])[:MOST_TUNERS]))[1:]]

    def refreshed(self) -> Any:
        """Return the list with the tuners that the library has now."""
        import gradio as gr

        return gr.Dropdown(choices=self._choices())

    def words(self, names: Sequence[str]) -> list[str]:
        """Return the trigger words of tuners."""
        entries: dict[str, TunerEntry] = {entry.name: entry for entry in self._library.list()}
        return [word for name in names if name in entries for word in entries[name].trigger_words]

    def _choices(self) -> list[tuple[str, str]]:
        return [
            (entry.name if entry.problem is None else f"{entry.name} (cannot be used)", entry.name)
            for entry in self._library.list()
        ]

    def _row(self, number: int) -> _Row:
        import gradio as gr

        name = f"gen-tuner-{number}"
        with gr.Group(visible=False, elem_id=name, elem_classes="gen-tuner") as group:
            card = gr.HTML(elem_id=f"{name}-card", padding=True)
            weight = gr.Slider(
                -1,
                2,
                1,
                step=0.05,
                label="Weight",
                info="0 is off, 1 as trained; more exaggerates, less than 0 inverts.",
                elem_id=f"{name}-weight",
            )
            with gr.Accordion("Steps and sites", open=False, elem_id=f"{name}-more"):
                with gr.Row():
                    start = gr.Slider(0, 100, 0, step=1, label="From step (%)", elem_id=f"{name}-start")
                    end = gr.Slider(0, 100, 100, step=1, label="To step (%)", elem_id=f"{name}-end")
                sites = gr.Textbox(
                    label="Sites",
                    info="Places in the base where it acts: empty for all, or for example skip.0-3, or skip.0-3=0.2.",
                    placeholder="all",
                    elem_id=f"{name}-sites",
                )
        return _Row(group, card, (weight, start, end, sites))
