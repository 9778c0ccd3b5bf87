"""Step 3 of the tab: purpose, settings, memory, and the same run as a command and as YAML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .desk import TrainingDesk
from .settings.fields import Field, all_fields
from .settings.form import default_config, form_values
from .settings.purposes import PURPOSES, is_bundled, suggestion

SECTIONS = {
    "tuner": "Tuner: where and how much it changes",
    "learning": "Learning",
    "images": "Use of the images",
    "samples": "Samples, checks and saved states",
    "memory": "Precision and memory",
}
FIRST_PURPOSE = "style"


@dataclass(frozen=True)
class SettingsPanel:
    """Components of the settings.

    Attributes:
        purpose: the purpose.
        base: the base.
        inputs: input of each field by the name of its setting.
        others: settings without a field, which a pasted text may have.
    """

    purpose: Any
    base: Any
    inputs: dict[str, Any]
    others: Any
    memory: Any
    problem: Any
    command: Any
    yaml: Any
    pasted: Any
    read: Any
    read_note: Any
    start: Any
    start_note: Any


def build_settings_panel(desk: TrainingDesk) -> SettingsPanel:
    """Add the components to the page that is being built.

    Args:
        desk: actions of the tab.
    """
    import gradio as gr

    gr.Markdown("## What to learn")
    purpose = gr.Radio(
        [(f"{each.label}. {each.info}", each.key) for each in PURPOSES],
        value=FIRST_PURPOSE,
        label="Purpose",
        info="Sets everything below to suggested values.",
        elem_id="train-purpose",
    )
    bases = desk.bases
    base = gr.Dropdown(
        base_choices(bases),
        value=bases[0],
        label="Base",
        info="The model that the tuner changes. It stays as it is; a tuner fits this base alone.",
        elem_id="train-base",
    )
    first = form_values(default_config(FIRST_PURPOSE)) | suggestion(FIRST_PURPOSE, bases[0], 0, desk.device)
    first["name"] = "my style"
    fields = all_fields()
    inputs: dict[str, Any] = {}
    kinds = first["tuner"]
    basic = [field for field in fields if field.section == "run"]
    # One row, so that fields that do not matter leave no gap.
    with gr.Row():
        for field in (each for each in basic if each.kind != "lines"):
            inputs[field.name] = _input(field, first[field.name], kinds)
    for field in (each for each in basic if each.kind == "lines"):
        inputs[field.name] = _input(field, first[field.name], kinds)
    with gr.Accordion("More settings", open=False, elem_id="train-more"):
        for section, title in SECTIONS.items():
            gr.Markdown(f"### {title}")
            with gr.Row():
                for field in (each for each in fields if each.section == section):
                    inputs[field.name] = _input(field, first[field.name], kinds)
    others = gr.State({})
    memory = gr.HTML(elem_id="train-memory", visible=False)
    problem = gr.HTML(elem_id="train-problem", visible=False)
    with gr.Row():
        start = gr.Button("Start training", variant="primary", elem_id="train-start")
    start_note = gr.HTML(elem_id="train-start-note", visible=False)
    with gr.Accordion("The same run as a command, and as a file", open=False, elem_id="train-text"):
        command = gr.Textbox(
            label="Command",
            info="Does the same in a terminal.",
            lines=2,
            max_lines=8,
            interactive=False,
            buttons=["copy"],
            elem_id="train-command",
        )
        yaml = gr.Textbox(
            label="YAML",
            info="Save it as run.yaml, and start it by restune train --config run.yaml.",
            lines=6,
            max_lines=20,
            interactive=False,
            buttons=["copy"],
            elem_id="train-yaml",
        )
        pasted = gr.Textbox(
            label="Paste a command or YAML here",
            info="Flags of diffusers' and kohya's scripts are translated.",
            lines=4,
            max_lines=20,
            elem_id="train-pasted",
        )
        read = gr.Button("Fill the form from it", elem_id="train-read")
        read_note = gr.HTML(elem_id="train-read-note", visible=False)
    return SettingsPanel(
        purpose=purpose, base=base, inputs=inputs, others=others, memory=memory, problem=problem, command=command,
        yaml=yaml, pasted=pasted, read=read, read_note=read_note, start=start, start_note=start_note,
    )  # fmt: skip


def base_choices(bases: Sequence[str]) -> list[tuple[str, str]]:
    """Return bases with their labels, each once."""
    bundled = "The bundled small base: icons of 64 pixels, to try things out"
    return [(bundled if is_bundled(base) else base, base) for base in dict.fromkeys(bases)]


def _input(field: Field, value: Any, kinds: Sequence[str]) -> Any:
    """Return the input of a field, which is not visible if it does not matter for the tuner."""
    import gradio as gr

    common: dict[str, Any] = {
        "value": value,
        "label": field.label,
        "info": field.info,
        "visible": field.matters(kinds),
        "elem_id": field.elem_id,
        "min_width": 220,
    }
    if field.kind == "lines":
        return gr.Textbox(lines=2, max_lines=6, **common)
    if field.kind in ("text", "optional"):
        return gr.Textbox(max_lines=1, **common)
    if field.kind == "integer":
        return gr.Number(step=1, **common)
    if field.kind == "number":
        return gr.Number(step=0.0001, **common)
    if field.kind == "switch":
        return gr.Checkbox(**common)
    several = field.kind == "several"
    choices = [*field.choices]
    return gr.Dropdown(choices, multiselect=several, allow_custom_value=several, **common)
