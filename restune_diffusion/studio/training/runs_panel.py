"""The page Runs of the tab: the list of runs, and the progress of the chosen one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...run_queue.queue import QueuedRun
from ...utils.errors import UsageError
from .desk import TrainingDesk, last_lines
from .markup import hint_html, run_html, run_label, samples_html
from .notes import note
from .progress import RunProgress, read_progress

SECONDS = 2.0
"""Time between two looks at the folders of the runs."""
ACTIONS = ("stop", "resume", "sample", "earlier", "library", "remove")
_NONE = "No run yet. Start one on the page New run; it goes on if you close the browser."


@dataclass(frozen=True)
class RunsPanel:
    """Components of the runs.

    Attributes:
        runs: the list; its value is the id of the chosen run.
        details: progress of the chosen run.
        samples: its samples, apart, so that images are not loaded again with every number.
        buttons: buttons by action.
        seen: what the page shows, so that only changes are sent.
    """

    runs: Any
    details: Any
    samples: Any
    message: Any
    buttons: dict[str, Any]
    seen: Any
    timer: Any


def build_runs_panel() -> RunsPanel:
    """Add the components to the page that is being built."""
    import gradio as gr

    runs = gr.Radio(
        [], label="Runs in their order", info="One runs at a time on each device.", elem_id="train-runs", visible=False
    )
    labels = {
        "stop": "Stop, and keep what is learned",
        "resume": "Resume",
        "sample": "Sample now",
        "earlier": "Move up",
        "library": "Add to library",
        "remove": "Remove from the list",
    }
    with gr.Row():
        buttons = {
            action: gr.Button(label, elem_id=f"train-{action}", min_width=130, visible=False, size="md")
            for action, label in labels.items()
        }
    message = gr.HTML(elem_id="train-run-note", visible=False)
    details = gr.HTML(hint_html(_NONE), elem_id="train-run")
    samples = gr.HTML(elem_id="train-samples", visible=False)
    return RunsPanel(runs, details, samples, message, buttons, gr.State(None), gr.Timer(SECONDS))


def chosen_run(runs: Sequence[QueuedRun], run_id: str | None) -> QueuedRun | None:
    """Return the chosen run; if there is none, that which runs, or else the newest."""
    for run in runs:
        if run.id == run_id:
            return run
    running = [run for run in runs if run.state == "running"]
    return next(iter(running or sorted(runs, key=lambda run: run.added, reverse=True)), None)


def allowed_actions(run: QueuedRun | None, progress: RunProgress, place: int) -> dict[str, bool]:
    """Return which actions a run allows.

    Args:
        run: the run.
        progress: its progress.
        place: its place in the list.
    """
    state = None if run is None else run.state
    stopping = run is not None and run.stopping
    return {
        "stop": state in ("waiting", "running") and not stopping,
        "resume": state in ("stopped", "failed", "cancelled"),
        "sample": state == "running" and not stopping and bool(progress.prompts),
        "earlier": state == "waiting" and place > 0,
        "library": state == "finished" and progress.tuner is not None,
        "remove": state is not None and state != "running",
    }


class RunHandlers:
    """Functions of the events of the panel, without the wiring.

    Args:
        desk: actions of the tab.
    """

    def __init__(self, desk: TrainingDesk) -> None:
        self.desk = desk

    def refresh(self, run_id: str | None, seen: Any) -> tuple[Any, ...]:
        """Return updates of the panel and `seen`; nothing is sent that the page shows already."""
        import gradio as gr

        runs = self.desk.runs()
        progress = {run.id: read_progress(run) for run in runs}
        chosen = chosen_run(runs, run_id)
        choices = [(run_label(run, progress[run.id]), run.id) for run in runs]
        if chosen is None:
            html, samples, allowed = hint_html(_NONE), "", dict.fromkeys(ACTIONS, False)
        else:
            shown = progress[chosen.id]
            html = run_html(chosen, shown, last_lines(chosen.log) if chosen.state == "failed" else "")
            samples = samples_html(shown)
            allowed = allowed_actions(chosen, shown, runs.index(chosen))
        now = (choices, chosen and chosen.id, html, tuple(allowed.values()), samples)
        before = seen or (None,) * 5
        new_list = now[:2] != tuple(before[:2]) or run_id != now[1]
        return (
            gr.update(choices=choices, value=now[1], visible=bool(runs)) if new_list else gr.skip(),
            html if html != before[2] else gr.skip(),
            note(samples) if samples != before[4] else gr.skip(),
            *(
                gr.update(visible=allowed[action]) if now[3] != before[3] else gr.skip()
                for action in ACTIONS
            ),
            now if now != before else gr.skip(),
        )  # fmt: skip

    def act(self, action: str) -> Callable[[str | None], Any]:
        """Return the handler of a button, which returns a note."""

        def handler(run_id: str | None) -> Any:
            if not run_id:
                raise UsageError("No run is chosen; choose one in the list.")
            return note(hint_html(getattr(self, f"_{action}")(run_id)))

        return handler

    def _stop(self, run_id: str) -> str:
        run = self.desk.context.queue.get(run_id)
        self.desk.context.queue.cancel(run_id)
        if run.state == "waiting":
            return f"{run.name} is taken out of the queue."
        return f"{run.name} stops after its current step, and its state is saved. Resume continues from there."

    def _resume(self, run_id: str) -> str:
        self.desk.resume(run_id)
        return "The run waits for its turn, and continues where it stopped."

    def _sample(self, run_id: str) -> str:
        self.desk.sample_now(self.desk.context.queue.get(run_id))
        return "Samples are generated after the current step."

    def _earlier(self, run_id: str) -> str:
        runs = self.desk.runs()
        place = next((number for number, run in enumerate(runs) if run.id == run_id), 0)
        self.desk.context.queue.move(run_id, max(0, place - 1))
        return ""

    def _library(self, run_id: str) -> str:
        run = self.desk.context.queue.get(run_id)
        tuner = read_progress(run).tuner
        if tuner is None:
            raise UsageError(f"{run.name} has no finished tuner; wait until it is finished.")
        return f"{self.desk.add_to_library(tuner)} is in the library. The tab Generate uses it."

    def _remove(self, run_id: str) -> str:
        run = self.desk.context.queue.get(run_id)
        self.desk.context.queue.remove(run_id)
        return f"{run.name} is removed from the list. Its files stay in {run.output}."
