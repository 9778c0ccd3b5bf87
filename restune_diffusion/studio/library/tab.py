"""Build the tab Library: its panels, and the events that connect them."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...utils.display import counted
from ...utils.errors import RestuneError, TunerFileError, UsageError
from ..context import StudioContext
from ..messages import as_html, shown_as_message
from .cards import cards_html, comparison_html, details_html, empty_html
from .compare import ComparisonSettings, compare
from .fit import problem_of
from .panels import (
    ComparePanel,
    FilesPanel,
    ListPanel,
    TunerPanel,
    build_compare_panel,
    build_files_panel,
    build_list_panel,
    build_tuner_panel,
)
from .shelf import Shelf
from .style import STYLE
from .thumbnails import thumbnail_of, with_metadata

_QUIET: dict[str, Any] = {"show_progress": "hidden"}
_DOWNLOADS = "downloads"


def build_tab(context: StudioContext, tab: Any) -> None:
    """Add the components and events of the tab to the page that is being built.

    Args:
        context: state of the studio.
        tab: Gradio's tab; its selection refreshes the cards and lists.
    """
    import gradio as gr

    desk = LibraryDesk(context)
    gr.HTML(f"<style>{STYLE}</style>", elem_id="library-style", js_on_load=None)
    listing = build_list_panel()
    selected = build_tuner_panel()
    comparison = build_compare_panel()
    files = build_files_panel()
    _connect(desk, tab, listing, selected, comparison, files)


class LibraryDesk:
    """Actions of the tab; each returns a sentence for the person, or content of the page.

    Args:
        context: state of the studio.
    """

    def __init__(self, context: StudioContext) -> None:
        self._context = context
        self.shelf = Shelf(context.workspace)
        shutil.rmtree(context.workspace.cache / _DOWNLOADS, ignore_errors=True)

    def cards(self, query: str | None, name: str | None) -> str:
        """Return the cards of the tuners that match a search."""
        entries = self.shelf.entries(query or "")
        return cards_html(entries, self._problem, name) if entries else empty_html(query or "")

    def details(self, name: str) -> str:
        """Return the facts of a tuner."""
        entry = self.shelf.library.entry(name)
        return details_html(entry, self._problem(entry))

    def import_files(self, files: Sequence[str]) -> tuple[list[str], list[str]]:
        """Import uploaded files; return the names of the tuners, and the reasons why others were refused."""
        names, reasons = [], []
        for file in files:
            try:
                path = self._context.workspace.inside(file, self._context.workspace.cache)
                names.append(self.shelf.import_file(path, self._context.base))
            except RestuneError as error:
                reasons.append(str(error))
        return names, reasons

    def download(self, name: str, layout: str) -> str:
        """Write a tuner in a layout for a download, and return the path of the file."""
        if layout not in ("restune", "diffusers", "kohya"):
            raise UsageError(f"There is no format {layout!r}; choose one of the list.")
        folder = self._context.workspace.cache / _DOWNLOADS / secrets.token_hex(8)
        folder.mkdir(parents=True)
        return str(self.shelf.export(name, layout, folder))  # type: ignore[arg-type]

    def compare(self, names: Sequence[str], settings: ComparisonSettings) -> str:
        """Return images of the base and of tuners from the same noise, as a table."""
        if not names:
            raise UsageError("No tuner is chosen; choose the first tuner.")
        return comparison_html(compare(self._context, self.shelf, names, settings))

    def make_thumbnail(self, name: str, settings: ComparisonSettings) -> None:
        """Generate an image with a tuner and store it as its thumbnail."""
        entry = self.shelf.library.usable(name)
        if entry.families == ("lora",):
            raise TunerFileError(f"{name!r} is a file of another program; import it, and give the copy a thumbnail.")
        made = compare(self._context, self.shelf, [name], settings, with_base=False)
        with_metadata(entry.path, entry.path, thumbnail=thumbnail_of(made.images[0][0]))

    def _problem(self, entry: Any) -> str | None:
        return problem_of(entry, self._context.base)


def _settings(prompt: str, seed: float, count: float, steps: float, guidance: float) -> ComparisonSettings:
    """Return the settings of a comparison; a field that was emptied has no value."""
    numbers = [value for value in (seed, count, steps, guidance) if not isinstance(value, int | float)]
    if numbers:
        raise UsageError("A number is missing; fill in seed, images, steps and guidance.")
    return ComparisonSettings(str(prompt or ""), int(seed), int(count), int(steps), float(guidance))


def _connect(
    desk: LibraryDesk, tab: Any, listing: ListPanel, selected: TunerPanel, comparison: ComparePanel, files: FilesPanel
) -> None:
    import gradio as gr

    lists = [comparison.first, comparison.second, files.run_tuner, files.deleted]
    page = [
        listing.cards,
        listing.chosen,
        selected.group,
        selected.facts,
        selected.new_name,
        selected.download,
        *lists,
    ]

    def show(query: str | None, name: str | None) -> list[Any]:
        """Return updates of everything that depends on the folder and the selected tuner."""
        names = desk.shelf.library.names()
        name = name if name in names else None
        choices: list[Any] = [gr.update(choices=names), gr.update(choices=[("(none)", ""), *names])]
        choices.append(gr.update(choices=list(desk.shelf.run_files())))
        choices.append(gr.update(choices=[(each.label, each.id) for each in desk.shelf.trash()], value=None))
        facts = desk.details(name) if name else ""
        new_name = gr.update(value=name or "")
        hidden = gr.update(visible=False, value=None)
        return [desk.cards(query, name), name, gr.update(visible=name is not None), facts, new_name, hidden, *choices]

    def select(query: str | None, event: Any) -> list[Any]:
        updates = show(query, event._data.get("value"))
        # The selected tuner is also the first one to compare.
        updates[page.index(comparison.first)] = gr.update(choices=desk.shelf.library.names(), value=updates[1])
        return updates

    # Gradio passes the event to an argument of this type; the name `gr` is not known outside this function.
    select.__annotations__["event"] = gr.EventData

    def rename(query: str | None, name: str, new_name: str) -> list[Any]:
        return show(query, desk.shelf.rename(name, new_name))

    def delete(query: str | None, name: str) -> list[Any]:
        desk.shelf.delete(name)
        gr.Info(f"{as_html(name)} is in the trash; open “Trash” to restore it.")
        return show(query, None)

    def restore(query: str | None, name: str | None, trash_id: str | None) -> list[Any]:
        restored = desk.shelf.restore(_chosen(trash_id))
        gr.Info(f"{as_html(restored)} is in the library again.")
        return show(query, name)

    def remove(query: str | None, name: str | None, trash_id: str | None) -> list[Any]:
        gr.Info(f"{as_html(desk.shelf.remove_for_good(_chosen(trash_id)))} is deleted.")
        return show(query, name)

    def upload(query: str | None, name: str | None, paths: list[str] | None) -> list[Any]:
        names, reasons = desk.import_files(paths or [])
        for reason in reasons:
            gr.Warning(as_html(reason), duration=None)
        if names:
            gr.Info(f"{counted(len(names), 'tuner')} imported: {as_html(', '.join(names))}.")
        return [*show(query, names[0] if names else name), None]

    def add_run(query: str | None, run_tuner: str | None) -> list[Any]:
        name = desk.shelf.add_from_run(_chosen(run_tuner))
        gr.Info(f"The library has {as_html(name)} now.")
        return show(query, name)

    def prepare(name: str, layout: str) -> Any:
        path = desk.download(name, layout)
        return gr.update(value=path, visible=True, label=f"Download {Path(path).name}")

    def start(first: str | None, second: str | None, *values: Any) -> str:
        return desk.compare([each for each in (first, second) if each], _settings(*values))

    def make_thumbnail(query: str | None, name: str, *values: Any) -> list[Any]:
        desk.make_thumbnail(name, _settings(*values))
        return show(query, name)

    query, chosen = listing.search, listing.chosen
    numbers = [comparison.prompt, comparison.seed, comparison.count, comparison.steps, comparison.guidance]
    # Without `fn` given in `gr.on`, the event is the loading of the page.
    gr.on(fn=shown_as_message(show), inputs=[query, chosen], outputs=page, **_QUIET)
    # Runs and other pages add tuners. Refresh the cards alone, so that a new selection stays.
    tab.select(shown_as_message(desk.cards), [query, chosen], listing.cards, **_QUIET)
    listing.reload.click(shown_as_message(show), [query, chosen], page, **_QUIET)
    query.change(desk.cards, [query, chosen], listing.cards, trigger_mode="always_last", **_QUIET)
    listing.cards.select(shown_as_message(select), query, page, **_QUIET)
    selected.rename.click(shown_as_message(rename), [query, chosen, selected.new_name], page, **_QUIET)
    selected.delete.click(shown_as_message(delete), [query, chosen], page, **_QUIET)
    selected.prepare.click(shown_as_message(prepare), [chosen, selected.layout], selected.download)
    selected.layout.change(lambda: gr.update(visible=False, value=None), outputs=selected.download, **_QUIET)
    selected.thumbnail.click(
        shown_as_message(make_thumbnail), [query, chosen, *numbers], page, show_progress_on=selected.facts
    )
    files.upload.upload(
        shown_as_message(upload), [query, chosen, files.upload], [*page, files.upload], show_progress_on=files.upload
    )
    files.add_run.click(shown_as_message(add_run), [query, files.run_tuner], page, show_progress_on=files.run_tuner)
    files.restore.click(shown_as_message(restore), [query, chosen, files.deleted], page, **_QUIET)
    files.remove.click(shown_as_message(remove), [query, chosen, files.deleted], page, **_QUIET)
    comparison.start.click(shown_as_message(start), [comparison.first, comparison.second, *numbers], comparison.result)


def _chosen(value: str | None) -> str:
    if not value:
        raise UsageError("Nothing is chosen; choose an entry of the list.")
    return value
