"""Steps 1 and 2 of the tab: images and captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ...data.caption_edits.rules import CaptionEdit
from ...utils.errors import RestuneError, UsageError
from .desk import InspectedData, TrainingDesk
from .markup import data_sheet_html, hint_html, problem_html
from .notes import note
from .uploading.uploads import describe_upload

HEADERS = ["Image", "Caption"]
NO_FACTS = {"images": 0, "without": 0}
Rows = list[list[str]]
"""Rows of the table: image and caption."""


@dataclass(frozen=True)
class DataPanel:
    """Components of the images and captions that other panels read.

    Attributes:
        folder: the chosen folder.
        facts: `images` and `without`, the number of images and of those without a caption.
    """

    folder: Any
    facts: Any
    files: Any
    name: Any
    check: Any
    sheet: Any
    cropped: Any
    thumbnails: Any
    upload_note: Any
    captions: Any
    table: Any
    caption_note: Any
    find: Any
    replace: Any
    regex: Any
    replace_all: Any
    prefix: Any
    add_prefix: Any
    use_names: Any
    save: Any


def table_rows(data: InspectedData) -> Rows:
    """Return the rows of the table of captions."""
    return [[name, caption] for name, caption in data.table.captions.items()]


def edited_rows(rows: Sequence[Sequence[Any]], edit: Callable[[str], str]) -> Rows:
    """Return the rows with an edit applied to each caption."""
    return [[str(name), edit(str(caption or "").strip())] for name, caption in rows]


def with_prefix(rows: Sequence[Sequence[Any]], prefix: str) -> Rows:
    """Return the rows with words put before each caption that does not start with them."""
    words = prefix.strip().rstrip(",")
    if not words:
        raise UsageError("There are no words to put in front; write some into the field.")
    edit = CaptionEdit(prefix=f"{words}, ")
    return edited_rows(rows, lambda caption: edit(caption) if caption not in ("", words) else words)


def with_names(rows: Sequence[Sequence[Any]]) -> Rows:
    """Return the rows with the words of the file's name as the caption of each image without one."""
    result = []
    for name, caption in rows:
        words = " ".join(PurePosixPath(str(name)).stem.replace("_", " ").replace("-", " ").split())
        result.append([str(name), str(caption or "").strip() or words])
    return result


def build_data_panel(desk: TrainingDesk) -> DataPanel:
    """Add the components to the page that is being built.

    Args:
        desk: actions of the tab.
    """
    import gradio as gr

    folders = desk.data_folders()
    gr.Markdown("## Images")
    with gr.Row():
        with gr.Column(min_width=280, scale=1):
            files = gr.File(
                label="Drop images, or a zip of them",
                file_count="multiple",
                elem_id="train-files",
                height=150,
            )
            name = gr.Textbox(
                label="Name of the folder for them",
                info="Empty: the name of the zip.",
                max_length=64,
                elem_id="train-folder-name",
            )
        with gr.Column(min_width=280, scale=1):
            folder = gr.Dropdown(
                folders,
                value=None,
                label="Or choose a folder of images",
                info="Folders from earlier uploads, and those that the studio was started with.",
                elem_id="train-folder",
            )
            check = gr.Button("Check the images again", elem_id="train-check")
            upload_note = gr.HTML(elem_id="train-upload-note", visible=False)
    facts = gr.State(NO_FACTS)
    sheet = gr.HTML(elem_id="train-sheet", visible=False)
    with gr.Accordion("The images as they are cropped for training", open=False, visible=False) as cropped:
        thumbnails = gr.Image(
            label="Training images", interactive=False, type="pil", buttons=["fullscreen"], elem_id="train-thumbnails"
        )
    with gr.Column(visible=False, elem_id="train-step-captions") as captions:
        parts = _build_captions()
    return DataPanel(
        folder=folder, facts=facts, files=files, name=name, check=check, sheet=sheet, thumbnails=thumbnails,
        cropped=cropped, upload_note=upload_note, captions=captions, **parts,
    )  # fmt: skip


def _build_captions() -> dict[str, Any]:
    import gradio as gr

    gr.Markdown("## Captions")
    gr.HTML(
        hint_html(
            "A caption names what an image shows, and leaves out what all images have in common. Changes in the table "
            "are kept when you save them."
        )
    )
    table = gr.Dataframe(
        value=[],
        headers=HEADERS,
        datatype="str",
        type="array",
        column_count=2,
        static_columns=[0],
        interactive=True,
        wrap=True,
        max_height=360,
        column_widths=["35%", "65%"],
        label="Captions",
        buttons=[],
        elem_id="train-captions",
    )
    with gr.Accordion("Change all captions at once", open=False):
        with gr.Row(equal_height=True):
            find = gr.Textbox(label="Find", elem_id="train-find", min_width=160)
            replace = gr.Textbox(label="Replace with", elem_id="train-replace", min_width=160)
        regex = gr.Checkbox(
            label="Regular expression",
            info="For those who know them: Find is one of Python, and \\1 stands for its first group.",
            elem_id="train-regex",
        )
        replace_all = gr.Button("Replace in all captions", elem_id="train-replace-all")
        with gr.Row(equal_height=True):
            prefix = gr.Textbox(
                label="Words in front", info="For example the trigger word.", elem_id="train-prefix", min_width=160
            )
            add_prefix = gr.Button("Put in front of all captions", elem_id="train-add-prefix", min_width=160)
    with gr.Row():
        use_names = gr.Button("Use file names where a caption is missing", elem_id="train-use-names", min_width=200)
        save = gr.Button("Save captions", variant="primary", elem_id="train-save-captions", min_width=160)
    caption_note = gr.HTML(elem_id="train-caption-note", visible=False)
    return {
        "table": table, "caption_note": caption_note, "find": find, "replace": replace, "regex": regex,
        "replace_all": replace_all, "prefix": prefix, "add_prefix": add_prefix, "use_names": use_names, "save": save,
    }  # fmt: skip


class DataHandlers:
    """Functions of the events of the panel, without the wiring.

    Args:
        desk: actions of the tab.
    """

    def __init__(self, desk: TrainingDesk) -> None:
        self.desk = desk

    def store(self, files: Sequence[str] | None, name: str) -> tuple[Any, ...]:
        """Store an upload and choose its folder; return folder, note, and empty fields for the next upload."""
        import gradio as gr

        if not files:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        upload = self.desk.upload(files, name)
        choices = gr.update(choices=self.desk.data_folders(), value=str(upload.folder))
        return choices, note(hint_html(describe_upload(upload))), None, ""

    def inspect(self, folder: str | None, base: str, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the updates of the panel for a folder; a message instead of the facts if it has no images."""
        import gradio as gr

        try:
            data = self.desk.inspect(folder, base, values)
        except RestuneError as error:
            hidden = gr.update(visible=False)
            return note(problem_html(str(error))), hidden, None, [], NO_FACTS, hidden
        without = data.without
        facts = {"images": len(data.sheet.entries), "without": without}
        sheet = note(data_sheet_html(data.sheet, without))
        seen = gr.update(visible=True)
        return sheet, seen, data.image, table_rows(data), facts, seen

    def replace(self, rows: Rows, find: str, replacement: str, regex: bool) -> Rows:
        """Return the rows with a text replaced."""
        return edited_rows(rows, CaptionEdit(find=find, replace=replacement, regex=regex))

    def save(self, folder: str | None, rows: Rows) -> Any:
        """Save the captions and return a note."""
        captions = {str(name): str(text or "") for name, text in rows if name}
        return note(hint_html(self.desk.save_captions(folder, captions)))
