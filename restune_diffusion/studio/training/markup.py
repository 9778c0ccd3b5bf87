"""HTML of the tab: the data sheet, and the progress of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from ...data.data_sheet import DataSheet
from ...run_queue.queue import QueuedRun
from ...training.advice.memory_estimate import MemoryEstimate
from ...training.report.images import chosen_steps
from ...utils.display import counted, readable_size
from .loss_plot import loss_plot
from .progress import RunProgress

_LISTED = 12
_MOST_COLUMNS = 12
# torch, diffusers and the autoencoder; measured on the bundled base, 0.6 GiB (docs/studio.md).
PROGRAM_BYTES = 700 * 2**20

_STATES = {
    "waiting": "waiting for its turn",
    "running": "running",
    "stopped": "stopped",
    "finished": "finished",
    "failed": "failed",
    "cancelled": "cancelled",
}


def problem_html(sentence: str) -> str:
    """Return a message about a mistake; nothing for an empty sentence."""
    return f'<div class="problem" role="alert">{escape(sentence)}</div>' if sentence else ""


def hint_html(text: str) -> str:
    """Return a remark, one line each; nothing for an empty text."""
    return "".join(f'<p class="hint">{escape(line)}</p>' for line in text.splitlines())


def data_sheet_html(sheet: DataSheet, without_caption: int) -> str:
    """Return the facts about a data folder.

    Args:
        sheet: a filled data sheet.
        without_caption: number of images without a caption of their own.
    """
    sizes = ", ".join(f"{width} x {height}: {count}" for (width, height), count in sheet.buckets)
    facts = [("Images", f"{len(sheet.entries)} to train on"), ("Training sizes", sizes)]
    captions = f"{len(sheet.captions)} different"
    if without_caption:
        captions += f"; {counted(without_caption, 'image')} without one, which get the trigger word alone"
    facts.append(("Captions", captions))
    if sheet.beyond_limit:
        facts.append(("Too long", " ".join(sheet.truncated())))
    small = sorted((each for each in sheet.entries if each.enlarged > 1), key=lambda each: -each.enlarged)
    if small:
        names = _listed([f"{each.name} ({each.enlarged:.1f} times)" for each in small])
        facts.append(("Enlarged", f"{counted(len(small), 'image')}, which blurs: {names}"))
    facts += [("Same file", " = ".join(names)) for names in sheet.duplicates[:_LISTED]]
    facts += [("Hint", hint) for hint in sheet.hints]
    faults = [str(each) for each in sheet.faults]
    facts.append(("Left out", counted(len(faults), "file") if faults else "nothing"))
    if sheet.others:
        facts.append(("Not used", _listed([each.name for each in sheet.others])))
    listed = "".join(f"<li>{escape(each)}</li>" for each in faults[:_LISTED])
    more = f"<li>and {len(faults) - _LISTED} more</li>" if len(faults) > _LISTED else ""
    return _facts(facts) + (f'<ul class="refused">{listed}{more}</ul>' if faults else "")


def memory_html(estimate: MemoryEstimate | None, free: int | None, device: str) -> str:
    """Return the memory that a run needs, and a warning if the device has less.

    Args:
        estimate: the memory of a step; None if the base is not on this machine yet.
        free: free memory of the device in bytes; None if it is not known.
        device: name of the device.
    """
    if estimate is None:
        return hint_html("The memory is known once the base is on this machine.")
    needed = estimate.total + PROGRAM_BYTES
    text = (
        f"Needs about {readable_size(needed)} on {device}: base {readable_size(estimate.weights)}, tuner and "
        f"optimizer {readable_size(estimate.tuner)}, activations {readable_size(estimate.kept)}, and the program."
    )
    if free is None:
        return hint_html(text)
    if needed > free:
        return problem_html(
            f"{text} Only {readable_size(free)} are free; choose the purpose with the least memory, fewer images at "
            "once, or a smaller size."
        )
    return hint_html(f"{text} Free: {readable_size(free)}.")


def run_label(run: QueuedRun, progress: RunProgress) -> str:
    """Return one line about a run for the list of runs."""
    state = "stopping" if run.stopping else _STATES[run.state]
    if run.state in ("running", "stopped", "failed") and progress.steps:
        state += f", step {progress.step} of {progress.steps}"
    return f"{run.name} · {state}"


def run_html(run: QueuedRun, progress: RunProgress, log: str) -> str:
    """Return the details of a run: state, numbers, plot and log.

    Args:
        run: the run.
        progress: what its folder tells.
        log: last lines of its log.
    """
    state = "stopping after this step" if run.stopping else _STATES[run.state]
    head = (
        f'<div class="run-head"><strong>{escape(run.name)}</strong><span class="chip {run.state}">{state}</span></div>'
    )
    return "".join(
        [
            f'<div class="run-head">{head}</div>',
            problem_html(run.message or "") if run.state == "failed" else hint_html(run.message or ""),
            _bar(run, progress),
            _numbers(run, progress),
            loss_plot(
                progress.series.get("loss", []), progress.series.get("validation_loss", []), progress.steps or 0
            ),
            f'<details><summary>Log</summary><pre class="log">{escape(log)}</pre></details>' if log else "",
        ]
    )


def duration(seconds: float) -> str:
    """Return a time in words, with at most two units."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{left} s"


def file_url(path: Path) -> str:
    """Return the address of a file in a folder that the page may show."""
    return f"/gradio_api/file={quote(str(path))}"


def _bar(run: QueuedRun, progress: RunProgress) -> str:
    if progress.steps is None:
        return hint_html("The base is being loaded, and the images encoded.") if run.state == "running" else ""
    share = 100 * progress.step / progress.steps
    label = f"Step {progress.step} of {progress.steps}"
    return (
        f'<div class="bar" role="progressbar" aria-label="{label}" aria-valuemin="0" aria-valuemax="{progress.steps}" '
        f'aria-valuenow="{progress.step}"><div style="width: {share:.1f}%"></div></div>'
    )


def _numbers(run: QueuedRun, progress: RunProgress) -> str:
    if progress.steps is None:
        return ""
    shown = [("Step", f"{progress.step} of {progress.steps}")]
    if progress.loss is not None:
        shown.append(("Loss, recent mean", f"{progress.loss:.4f}"))
    if progress.validation_loss is not None:
        shown.append(("Validation loss", f"{progress.validation_loss:.4f}"))
    if progress.images_per_second is not None:
        shown.append(("Speed", f"{progress.images_per_second:.1f} images/s"))
    if progress.memory_mib is not None:
        shown.append(("Peak memory", readable_size(progress.memory_mib * 2**20)))
    if run.state == "running" and progress.seconds_left is not None:
        shown.append(("Time left", f"about {duration(progress.seconds_left)}"))
    boxes = "".join(f"<div><small>{name}</small><span>{escape(value)}</span></div>" for name, value in shown)
    return f'<div class="numbers">{boxes}</div>'


def samples_html(progress: RunProgress) -> str:
    """Return the samples of a run as a table of prompts and steps; nothing before there are some."""
    if not progress.samples:
        return ""
    steps = chosen_steps(sorted(progress.samples), _MOST_COLUMNS)
    head = "".join(f'<th scope="col">step {step}</th>' for step in steps)
    rows = []
    for number, prompt in enumerate(progress.prompts):
        cells = []
        for step in steps:
            path = progress.samples[step].get(number)
            image = ""
            if path is not None:
                url, text = escape(file_url(path)), escape(f"{prompt}, step {step}")
                image = f'<a href="{url}" target="_blank"><img src="{url}" alt="{text}" loading="lazy"></a>'
            cells.append(f"<td>{image}</td>")
        rows.append(f'<tr><th scope="row">{escape(prompt)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="samples" tabindex="0" role="region" aria-label="Samples during training"><table><thead><tr>'
        f"<td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        + hint_html(f"All samples of a row start from the same noise (seed {progress.seed}).")
    )


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    return '<dl class="facts">' + "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts) + "</dl>"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
