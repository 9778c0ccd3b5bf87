"""Components of the tab: search and cards, the selected tuner, comparison, import and trash."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .cards import SELECT_CARD
from .compare import MOST_IMAGES, MOST_STEPS


@dataclass(frozen=True)
class ListPanel:
    """Search and cards."""

    search: Any
    reload: Any
    cards: Any
    chosen: Any


@dataclass(frozen=True)
class TunerPanel:
    """Facts and actions of the selected tuner."""

    group: Any
    facts: Any
    new_name: Any
    rename: Any
    layout: Any
    prepare: Any
    download: Any
    thumbnail: Any
    delete: Any


@dataclass(frozen=True)
class ComparePanel:
    """Comparison of two tuners."""

    first: Any
    second: Any
    prompt: Any
    seed: Any
    count: Any
    steps: Any
    guidance: Any
    start: Any
    result: Any


@dataclass(frozen=True)
class FilesPanel:
    """Import, tuners of runs, and trash."""

    upload: Any
    run_tuner: Any
    add_run: Any
    deleted: Any
    restore: Any
    remove: Any


def build_list_panel() -> ListPanel:
    """Add the search and the cards to the page."""
    import gradio as gr

    with gr.Row(equal_height=False):
        search = gr.Textbox(
            label="Search",
            placeholder="Name, trigger word, base or kind",
            elem_id="library-search",
            scale=4,
        )
        reload = gr.Button("Reload", elem_id="library-reload", scale=0, min_width=110)
    cards = gr.HTML("", elem_id="library-cards", js_on_load=SELECT_CARD, apply_default_css=False)
    return ListPanel(search, reload, cards, gr.State(None))


def build_tuner_panel() -> TunerPanel:
    """Add the selected tuner's facts and actions to the page; hidden while none is selected."""
    import gradio as gr

    with gr.Column(visible=False, elem_id="library-selected") as group:
        gr.Markdown("## Selected tuner")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                facts = gr.HTML("", elem_id="library-facts", js_on_load=None, apply_default_css=False)
            with gr.Column(scale=2, min_width=280):
                new_name = gr.Textbox(
                    label="Name", info="A slash puts the tuner into a folder: styles/ink.", elem_id="library-new-name"
                )
                rename = gr.Button("Rename", elem_id="library-rename")
                layout = gr.Radio(
                    [
                        ("Restune", "restune"),
                        ("LoRA for diffusers", "diffusers"),
                        ("LoRA for ComfyUI, A1111", "kohya"),
                    ],
                    value="restune",
                    label="Format of the download",
                    info="Only a tuner made of LoRA layers can be written as LoRA.",
                    elem_id="library-layout",
                )
                prepare = gr.Button("Prepare download", elem_id="library-prepare")
                download = gr.DownloadButton("Download", visible=False, elem_id="library-download", variant="primary")
                thumbnail = gr.Button("Make a thumbnail from the prompt below", elem_id="library-thumbnail")
                delete = gr.Button("Move to trash", variant="stop", elem_id="library-delete")
    return TunerPanel(group, facts, new_name, rename, layout, prepare, download, thumbnail, delete)


def build_compare_panel() -> ComparePanel:
    """Add the comparison to the page."""
    import gradio as gr

    gr.Markdown("## Compare")
    with gr.Row():
        first = gr.Dropdown([], label="First tuner", elem_id="library-first")
        second = gr.Dropdown([], label="Second tuner (optional)", elem_id="library-second")
    prompt = gr.Textbox(
        label="Prompt",
        info="Description of the images. Put in the trigger words of the tuners.",
        elem_id="library-prompt",
    )
    with gr.Row():
        seed = gr.Number(
            0, label="Seed", info="Same seed, same noise.", precision=0, minimum=0, elem_id="library-seed"
        )
        count = gr.Slider(1, MOST_IMAGES, 2, step=1, label="Images of each", elem_id="library-count")
        steps = gr.Slider(1, MOST_STEPS, 20, step=1, label="Steps", info="More steps, finer images.",
                          elem_id="library-steps")  # fmt: skip
        guidance = gr.Slider(0, 20, 7.5, step=0.5, label="Guidance", info="How strictly the prompt is followed.",
                             elem_id="library-guidance")  # fmt: skip
    start = gr.Button("Compare with the base", variant="primary", elem_id="library-compare")
    result = gr.HTML("", elem_id="library-compared", js_on_load=None, apply_default_css=False)
    return ComparePanel(first, second, prompt, seed, count, steps, guidance, start, result)


def build_files_panel() -> FilesPanel:
    """Add import, tuners of runs, and trash to the page."""
    import gradio as gr

    with gr.Accordion("Add tuners", open=True, elem_id="library-add"), gr.Row():
        with gr.Column(min_width=280):
            upload = gr.File(
                label="Import tuners or LoRA files (.safetensors)",
                file_count="multiple",
                height=200,
                elem_id="library-upload",
            )
        with gr.Column(min_width=280):
            run_tuner = gr.Dropdown(
                [], label="Tuner of a run", info="Runs of the tab Train write tuners to their own folders.",
                elem_id="library-run-tuner",
            )  # fmt: skip
            add_run = gr.Button("Add to library", elem_id="library-add-run")
    with gr.Accordion("Trash", open=False, elem_id="library-trash"):
        deleted = gr.Dropdown([], label="Deleted tuner", elem_id="library-deleted")
        with gr.Row():
            restore = gr.Button("Restore", elem_id="library-restore")
            remove = gr.Button("Delete for good", variant="stop", elem_id="library-remove")
    return FilesPanel(upload, run_tuner, add_run, deleted, restore, remove)
