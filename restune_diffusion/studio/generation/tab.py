"""Build the tab Generate."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...imaging.generation_record import read_record
from ...serving.library import TunerLibrary
from ...utils.errors import DataError
from ..context import StudioContext
from ..messages import shown_as_message
from .fields import FormValues
from .form import Form, new_seed
from .job import GenerationJob, Progress, Stopped
from .markup import STYLE, notes_html, state_html
from .restore import restored


def build_tab(context: StudioContext, tab: Any) -> None:
    """Add the components and events of the tab to the page that is being built.

    Args:
        context: state of the studio.
        tab: Gradio's tab; its selection refreshes the list of tuners.
    """
    import gradio as gr

    library = TunerLibrary(context.workspace.tuners)
    gr.HTML(STYLE, visible=True, padding=False, elem_id="gen-style")
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            form = Form(context.base, library)
        with gr.Column(scale=6, min_width=320, elem_id="gen-result"):
            with gr.Row():
                start = gr.Button("Generate", variant="primary", elem_id="gen-run")
                stop = gr.Button("Stop", variant="stop", elem_id="gen-stop", interactive=False)
            state = gr.HTML(state_html("Nothing is generated yet."), elem_id="gen-state")
            preview = gr.Image(
                visible=False,
                label="Preview",
                interactive=False,
                height=320,
                buttons=[],
                format="png",
                elem_id="gen-preview",
            )
            gallery = gr.Gallery(
                label="Images",
                columns=3,
                object_fit="contain",
                height="auto",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id="gen-images-made",
            )
            dropped = gr.File(
                label="Drop an image here to read its settings: one made here, or by A1111",
                file_types=[".png", ".jpg", ".jpeg", ".webp"],
                height=120,
                elem_id="gen-drop",
            )
            notes = gr.HTML(elem_id="gen-notes")

    # The running generation of this page.
    job = gr.State(None)
    outputs = [state, preview, gallery, start, stop, form["seed"], job]

    @shown_as_message
    def generate(*values: Any) -> Iterator[list[Any]]:
        made, is_random = form.read(values)
        if is_random:
            made = replace(made, seed=new_seed())
        yield from _updates(context, made)

    start.click(generate, form.inputs, outputs, concurrency_limit=8, show_progress="hidden")
    stop.click(_stop, job, None, concurrency_limit=None, show_progress="hidden")
    form["mode"].change(form.of_mode, form["mode"], [form.of_batches, form.of_grids], show_progress="hidden")
    form.rows.chosen.input(
        shown_as_message(form.rows.on_choice),
        [form.rows.chosen, *form.rows.inputs],
        form.rows.outputs,
        show_progress="hidden",
        trigger_mode="always_last",
    )
    # A run may have written a tuner since the page was loaded. A refresh while the list is open would close it.
    tab.select(form.rows.refreshed, None, form.rows.chosen, show_progress="hidden")

    def with_words(prompt: str, names: list[str]) -> str:
        words = [word for word in form.rows.words(names) if word not in (prompt or "")]
        return ", ".join(filter(None, [prompt, *words]))

    form.words.click(with_words, [form["prompt"], form.rows.chosen], form["prompt"])

    @shown_as_message
    def read(path: str | None, *values: Any) -> list[Any]:
        import gradio as gr

        if path is None:
            return [gr.skip()] * len(form.outputs) + [""]
        # A file that was uploaded in this session: gradio refuses every other path.
        now, _ = form.read(values)
        try:
            record = read_record(path)
        except DataError as error:
            raise DataError(str(error).replace(path, Path(path).name)) from error
        found = restored(record, now, library.list())
        return [*form.shown(found.values), notes_html(f"Settings of {Path(path).name}.", found.notes)]

    dropped.upload(read, [dropped, *form.inputs], [*form.outputs, notes], show_progress="hidden")
    dropped.clear(lambda: "", None, notes, show_progress="hidden")


def _stop(job: GenerationJob | None) -> None:
    if job is not None:
        job.stop()


def _updates(context: StudioContext, form: FormValues) -> Iterator[list[Any]]:
    """Yield the values of state, preview, gallery, both buttons, seed and job while a thread generates.

    Raises:
        RestuneError: the error of the generation.
    """
    import gradio as gr

    events: queue.SimpleQueue[Progress | BaseException | None] = queue.SimpleQueue()
    job = GenerationJob(context, form, events.put)

    def work() -> None:
        try:
            job.run()
        except BaseException as error:  # raised again by the handler
            events.put(error)
        else:
            events.put(None)

    def update(text: str, **changes: Any) -> list[Any]:
        names = ("preview", "gallery", "start", "stop", "seed", "job")
        return [state_html(text), *(changes.get(name, gr.skip()) for name in names)]

    buttons = {"start": gr.Button(interactive=True), "stop": gr.Button(interactive=False), "job": None}
    made: list[tuple[str, str]] = []
    thread = threading.Thread(target=work, name="generation", daemon=True)
    thread.start()
    try:
        busy = {"start": gr.Button(interactive=False), "stop": gr.Button(interactive=True), "job": job}
        yield update("Beginning.", seed=form.seed, gallery=[], **busy)
        while (event := events.get()) is not None:
            if isinstance(event, Stopped):
                text = f"Stopped. {len(made)} of the images are saved." if made else "Stopped; no image is saved."
                yield update(text, **buttons)
                return
            if isinstance(event, BaseException):
                yield update("Not generated.", preview=gr.Image(visible=False), **buttons)
                raise event
            changes: dict[str, Any] = {}
            if event.preview is not None:
                changes["preview"] = gr.Image(event.preview, visible=True)
            if event.saved is not None:
                made.append((str(event.saved[0]), event.saved[1]))
                changes["gallery"] = list(made)
            yield update(event.text, **changes)
        names = ", ".join(Path(path).name for path, _ in made)
        sentences = [f"Saved in {context.workspace.images}: {names}.", *job.skipped]
        yield update(" ".join(sentences), preview=gr.Image(None, visible=False), **buttons)
    finally:
        # Also if the page was closed.
        job.stop()
