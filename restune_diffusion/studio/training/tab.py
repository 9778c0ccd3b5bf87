"""Build the tab Train: its panels, and the events that connect them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ...utils.errors import RestuneError, UsageError
from ...utils.yaml_file import to_yaml
from ..context import StudioContext
from ..messages import shown_as_message
from .data_panel import DataHandlers, DataPanel, build_data_panel, with_names, with_prefix
from .desk import PlannedRun, TrainingDesk
from .markup import hint_html, memory_html, problem_html
from .notes import note
from .runs_panel import ACTIONS, RunHandlers, RunsPanel, build_runs_panel
from .settings.command_line import command_line
from .settings.fields import all_fields
from .settings.form import form_values, other_settings
from .settings.pasted import check_places, read_pasted
from .settings.purposes import purpose_of, sample_prompts, suggested_steps, suggestion
from .settings_panel import SettingsPanel, base_choices, build_settings_panel
from .style import STYLE
from .uploading.uploads import remove_leftovers

_NEW, _RUNS = "new", "runs"
_QUIET: dict[str, Any] = {"show_progress": "hidden"}


def build_tab(context: StudioContext, tab: Any) -> None:
    """Add the components and events of the tab to the page that is being built.

    Args:
        context: state of the studio.
        tab: Gradio's tab; a timer refreshes this one, so its selection is not used.
    """
    import gradio as gr

    desk = TrainingDesk(context)
    remove_leftovers(context.workspace.data)
    # Runs that waited when the machine went down go on. The page need not wait for that.
    threading.Thread(target=_supervise, args=(desk,), daemon=True).start()
    gr.HTML(STYLE, elem_id="train-style", visible="hidden")
    with gr.Tabs(elem_id="train-pages") as pages:
        with gr.Tab("New run", id=_NEW):
            data = build_data_panel(desk)
            settings = build_settings_panel(desk)
        with gr.Tab("Runs", id=_RUNS):
            runs = build_runs_panel()
    _connect_data(desk, data, settings)
    _connect_settings(desk, data, settings)
    _connect_text(desk, data, settings)
    _connect_runs(desk, _Form(desk, data, settings), settings, runs, pages)


def _supervise(desk: TrainingDesk) -> None:
    # A damaged queue is reported when a page asks for its runs.
    with suppress(RestuneError):
        desk.supervise()


class _Form:
    """Inputs of the form as one list, and the conversion of their values.

    Args:
        desk: actions of the tab.
        data: images and captions.
        settings: settings.
    """

    def __init__(self, desk: TrainingDesk, data: DataPanel, settings: SettingsPanel) -> None:
        self.desk = desk
        self.names = list(settings.inputs)
        self.inputs = [settings.purpose, settings.base, data.folder, settings.others, data.facts]
        self.inputs += settings.inputs.values()
        self.outputs = list(settings.inputs.values())

    def values(self, given: tuple[Any, ...]) -> dict[str, Any]:
        """Return the values of the fields by name, of the values of all inputs."""
        return dict(zip(self.names, given[5:], strict=True))

    def plan(self, given: tuple[Any, ...]) -> PlannedRun:
        """Return the run that the form describes."""
        purpose, base, folder, others, facts = given[:5]
        return self.desk.plan(purpose, base, folder, self.values(given), others, without=facts["without"])

    def updates(self, values: Mapping[str, Any]) -> list[Any]:
        """Return an update of each field: a value if one is given, and whether it matters for the tuner."""
        import gradio as gr

        fields = {field.name: field for field in all_fields()}
        kinds = values.get("tuner")
        result = []
        for name in self.names:
            changes: dict[str, Any] = {"value": values[name]} if name in values else {}
            if kinds is not None:
                changes["visible"] = fields[name].matters(kinds)
            result.append(gr.update(**changes) if changes else gr.skip())
        return result


def _connect_data(desk: TrainingDesk, data: DataPanel, settings: SettingsPanel) -> None:
    import gradio as gr

    handlers = DataHandlers(desk)
    form = _Form(desk, data, settings)

    def inspect(*given: Any) -> Any:
        return handlers.inspect(given[2], given[1], form.values(given))

    shown = [data.sheet, data.cropped, data.thumbnails, data.table, data.facts, data.captions]
    data.files.upload(
        shown_as_message(handlers.store),
        [data.files, data.name],
        [data.folder, data.upload_note, data.files, data.name],
    )
    data.folder.change(shown_as_message(inspect), form.inputs, shown).then(
        lambda: note(""), outputs=data.caption_note, **_QUIET
    )
    data.check.click(shown_as_message(inspect), form.inputs, shown)
    gr.on(fn=lambda: gr.update(choices=desk.data_folders()), outputs=data.folder, **_QUIET)
    data.replace_all.click(
        shown_as_message(handlers.replace), [data.table, data.find, data.replace, data.regex], data.table
    )
    data.add_prefix.click(shown_as_message(with_prefix), [data.table, data.prefix], data.table)
    data.use_names.click(shown_as_message(with_names), data.table, data.table)
    data.save.click(shown_as_message(handlers.save), [data.folder, data.table], data.caption_note).success(
        shown_as_message(inspect), form.inputs, shown
    )


def _connect_settings(desk: TrainingDesk, data: DataPanel, settings: SettingsPanel) -> None:
    import gradio as gr

    form = _Form(desk, data, settings)
    inputs = settings.inputs
    # The last suggestions: what a person has changed is not replaced.
    prompts_before, steps_before = gr.State(""), gr.State(inputs["steps"].value)

    def suggest(*given: Any) -> list[Any]:
        purpose, base, _, _, facts = given[:5]
        values = suggestion(purpose, base, facts["images"], desk.device)
        return [values["steps"], *form.updates(values)]

    def show_relevant(kinds: list[str] | None) -> list[Any]:
        return [gr.update(visible=field.matters(kinds or ["skip"])) for field in all_fields() if field.name != "tuner"]

    def suggest_steps(before: int | None, *given: Any) -> tuple[Any, Any, Any]:
        purpose, base, _, _, facts = given[:5]
        values = form.values(given)
        if not facts["images"] or values["steps"] not in (None, before):
            return gr.skip(), gr.skip(), gr.skip()
        per_step = int(values["batch_size"] or 1) * int(values["gradient_accumulation_steps"] or 1)
        steps = suggested_steps(purpose, base, facts["images"], per_step)
        return steps, steps, max(1, steps // 4)

    def suggest_prompts(before: str, *given: Any) -> tuple[Any, Any]:
        values = form.values(given)
        current = str(values["validation.prompts"] or "")
        if current.strip() not in ("", before.strip()):
            return gr.skip(), gr.skip()
        words = (str(values[name] or "").strip() for name in ("trigger_word", "text.tokens", "text.initializers"))
        prompts = sample_prompts(given[0], given[1], *words)
        return prompts, prompts

    # Purposes and bases set the fields when a person chooses them, not when a pasted text does.
    gr.on([settings.purpose.input, settings.base.input], suggest, form.inputs, [steps_before, *form.outputs], **_QUIET)
    inputs["tuner"].input(
        show_relevant,
        inputs["tuner"],
        [inputs[field.name] for field in all_fields() if field.name != "tuner"],
        **_QUIET,
    )
    data.facts.change(
        suggest_steps,
        [steps_before, *form.inputs],
        [steps_before, inputs["steps"], inputs["validation.every"]],
        **_QUIET,
    )
    named = [inputs[name].change for name in ("trigger_word", "text.tokens", "text.initializers")]
    gr.on(
        [*named, settings.purpose.change, settings.base.change],
        suggest_prompts,
        [prompts_before, *form.inputs],
        [inputs["validation.prompts"], prompts_before],
        trigger_mode="always_last",
        **_QUIET,
    )


def _connect_text(desk: TrainingDesk, data: DataPanel, settings: SettingsPanel) -> None:
    import gradio as gr

    form = _Form(desk, data, settings)

    def show(*given: Any) -> tuple[str, str, Any]:
        planned = form.plan(given)
        return command_line(planned.settings), to_yaml(dict(planned.settings)), note(problem_html(planned.problem))

    def show_memory(*given: Any) -> Any:
        config = form.plan(given).config
        if config is None:
            return note("")
        device = "the graphics card" if desk.device.gpu else "this machine"
        return note(memory_html(desk.memory(config), desk.free_memory(), device))

    def fill(text: str, *given: Any) -> list[Any]:
        read_command = desk.context.settings.read_command
        if read_command is None:
            raise UsageError("Commands cannot be read here; start the page by `restune studio`.")
        places = {"base": given[1], "data": given[2] or str(desk.workspace.data / "images"), "output": "output"}
        config = read_pasted(text, places, read_command)
        config = check_places(config, desk.workspace, desk.bases)
        others = other_settings(config)
        text_note = "The form is filled."
        if others:
            text_note += " Settings without a field stay as they are: " + ", ".join(others) + "."
        folder = str(config.data.folder)
        known = folder in [path for _, path in desk.data_folders()]
        return [
            purpose_of(config.preset, config.kinds),
            gr.update(choices=base_choices([*desk.bases, config.base]), value=config.base),
            gr.update(value=folder if known else given[2]),
            others,
            note(hint_html(text_note)),
            *form.updates(form_values(config)),
        ]

    triggers = [each.change for each in form.inputs if each is not settings.others]
    gr.on(
        [*triggers, settings.others.change],
        shown_as_message(show),
        form.inputs,
        [settings.command, settings.yaml, settings.problem],
        trigger_mode="always_last",
        **_QUIET,
    )
    gr.on(
        [*triggers, settings.others.change],
        shown_as_message(show_memory),
        form.inputs,
        settings.memory,
        trigger_mode="always_last",
        concurrency_limit=1,
        **_QUIET,
    )
    settings.read.click(
        shown_as_message(fill),
        [settings.pasted, *form.inputs],
        [settings.purpose, settings.base, data.folder, settings.others, settings.read_note, *form.outputs],
    )


def _connect_runs(desk: TrainingDesk, form: _Form, settings: SettingsPanel, runs: RunsPanel, pages: Any) -> None:
    import gradio as gr

    handlers = RunHandlers(desk)
    refresh = shown_as_message(handlers.refresh)
    shown = [runs.runs, runs.details, runs.samples, *(runs.buttons[action] for action in ACTIONS), runs.seen]
    looked_at = [runs.runs, runs.seen]

    def start(*given: Any) -> tuple[Any, ...]:
        run = desk.start(form.plan(given))
        message = note(hint_html(f"{run.name} is in the queue. It goes on if you close this page."))
        choices = [(each.name, each.id) for each in desk.runs()]
        return gr.update(choices=choices, value=run.id, visible=True), message, message, gr.update(selected=_RUNS)

    def open_page() -> tuple[Any, ...]:
        active = any(run.state in ("waiting", "running") for run in desk.runs())
        return *handlers.refresh(None, None), gr.update(selected=_RUNS) if active else gr.skip()

    started = [runs.runs, settings.start_note, runs.message, pages]
    settings.start.click(shown_as_message(start), form.inputs, started).success(refresh, looked_at, shown, **_QUIET)
    for action, button in runs.buttons.items():
        button.click(shown_as_message(handlers.act(action)), runs.runs, runs.message).success(
            refresh, looked_at, shown, **_QUIET
        )
    runs.runs.input(refresh, looked_at, shown, **_QUIET)
    runs.timer.tick(refresh, looked_at, shown, **_QUIET)
    # Without triggers: when the page is opened.
    gr.on(fn=shown_as_message(open_page), outputs=[*shown, pages], **_QUIET)
