"""What the tab does, without the page: data folders, settings of a run, and the queue."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.caption_edits.table import CaptionTable, plan_table, read_table
from ...data.config import DataConfig
from ...data.data_sheet import DataSheet
from ...data.files import list_images
from ...storage.base_files.location import BUNDLED_BASE
from ...training.config.train_config import TrainConfig
from ...utils.display import counted
from ...utils.errors import RestuneError, UsageError
from ..context import StudioContext
from .settings.fields import acts_on_text, all_fields, takes_conditions
from .settings.form import settings_of
from .settings.purposes import Device, preset_of
from .uploading.uploads import Upload, store_upload

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...run_queue import QueuedRun
    from ...training.advice.memory_estimate import MemoryEstimate

_LOG_LINES = 40
_LONGEST_NAME = 120
# The thumbnails of larger images can fill the memory of the machine.
_MOST_PIXELS = 2048
_DIGITS = 9
_LOG_BYTES = 64_000


@dataclass(frozen=True)
class InspectedData:
    """A data folder that was read: its sheet, a contact sheet, and its captions."""

    sheet: DataSheet
    image: Image
    table: CaptionTable

    @property
    def without(self) -> int:
        """Number of training images without a caption of their own."""
        return sum(not self.table.captions.get(entry.name) for entry in self.sheet.entries)


@dataclass(frozen=True)
class PlannedRun:
    """Settings of a run that is not started: as in YAML, as a config, or the sentence why they are not valid."""

    settings: Mapping[str, Any]
    config: TrainConfig | None
    problem: str


class TrainingDesk:
    """Actions of the tab.

    Args:
        context: state of the studio.
    """

    def __init__(self, context: StudioContext) -> None:
        self.context = context
        self.workspace = context.workspace

    # Bases, devices and folders

    @property
    def bases(self) -> list[str]:
        """Bases to choose from: that of the studio, and the bundled one."""
        return list(dict.fromkeys([self.context.settings.base, str(BUNDLED_BASE)]))

    @property
    def device(self) -> Device:
        """The device that trains."""
        import torch

        gpu = self.context.settings.device in ("auto", "cuda") and torch.cuda.is_available()
        return Device(gpu, gpu and torch.cuda.is_bf16_supported())

    def free_memory(self) -> int | None:
        """Return the free memory of the device in bytes, or None if the system does not report it."""
        import torch

        if self.device.gpu:
            return int(torch.cuda.mem_get_info()[0])
        try:
            lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        except OSError:
            return None
        found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
        return int(found[0]) * 1024 if found else None

    def data_folders(self) -> list[tuple[str, str]]:
        """Return the folders of images with their labels: the uploaded ones, the newest first, and the given ones."""
        uploaded = [path for path in self.workspace.data.iterdir() if path.is_dir() and not path.name.startswith(".")]
        uploaded.sort(key=lambda path: -path.stat().st_mtime)
        given = [(f"{path.name} ({path})", str(path)) for path in self.workspace.data_folders]
        return [*((path.name, str(path)) for path in uploaded), *given]

    def folder(self, path: str | None) -> Path:
        """Return a folder of images that the page names.

        Raises:
            UsageError: if none is chosen, or it is not one of the studio's folders.
        """
        if not path:
            raise UsageError("No images are chosen yet; drop some in step 1, or choose a folder.")
        return self.workspace.inside(path, self.workspace.data, *self.workspace.data_folders)

    # Data

    def upload(self, files: Sequence[str], name: str = "") -> Upload:
        """Store uploaded files as a new data folder; see `store_upload`.

        Raises:
            UsageError: if a file is not one that was uploaded.
        """
        uploads = Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio")
        paths = [self.workspace.inside(file, uploads) for file in files]
        return store_upload(paths, self.workspace.data, name)

    def inspect(self, path: str | None, base: str, values: Mapping[str, Any]) -> InspectedData:
        """Read a data folder as training will.

        Args:
            path: the folder.
            base: base of the training.
            values: values of the form.

        Raises:
            RestuneError: if the folder has no image that can be used.
        """
        from ...data.inspection import inspect_data, read_frame

        folder = self.folder(path)
        table = read_table(folder)
        resolution = str(values.get("resolution") or "").strip()
        # The form names a value that is not a number.
        side = int(resolution[:_DIGITS]) or None if resolution.isdecimal() else None
        if side is not None and side > _MOST_PIXELS:
            raise UsageError(_too_large(side))
        frame = read_frame(base if Path(base).is_dir() else None, side)
        trigger = self._trigger(values)
        config = DataConfig(
            folder=folder,
            trigger_word=trigger or None,
            prompt=self._fallback(values) or "an image",
            bucketing=bool(values.get("bucketing")),
        )
        sheet = DataSheet(folder, [])
        image = inspect_data(config, frame, sheet)
        return InspectedData(sheet, image, table)

    def save_captions(self, path: str | None, captions: Mapping[str, str]) -> str:
        """Write the captions that changed and return how many did.

        Raises:
            DataError: if a caption cannot be written; no file is changed then.
        """
        plan = plan_table(read_table(self.folder(path)), captions)
        plan.write()
        return f"{counted(len(plan.changes), 'caption')} saved." if plan.changes else "No caption has changed."

    # Settings

    def plan(
        self,
        purpose: str,
        base: str,
        data: str | None,
        values: Mapping[str, Any],
        others: Mapping[str, Any],
        *,
        without: int,
    ) -> PlannedRun:
        """Return the settings of the run that the form describes.

        Args:
            purpose: key of the purpose.
            base: path or id of the base.
            data: folder of the images, or None if none is chosen.
            values: values of the fields.
            others: settings without a field.
            without: number of images without a caption.
        """
        name = str(values.get("name") or "").strip() or "tuner"
        too_long = len(name.encode()) > _LONGEST_NAME
        name = name.encode()[:_LONGEST_NAME].decode(errors="ignore")
        values = {**values, "name": name}
        places = {"base": base, "data": data or "DATA", "output": str(self.free_output(name))}
        settings = settings_of(values, others, places, preset_of(purpose))
        kinds = _kinds(values)
        if self.context.settings.device == "cpu":
            settings["cpu"] = True
        trigger, fallback = self._trigger(values), self._fallback(values)
        if acts_on_text(kinds) and trigger and "trigger_word" not in others:
            # So that every caption names the subject.
            settings["trigger_word"] = trigger
        if without and fallback and "prompt" not in others:
            settings["prompt"] = fallback
        prompts = settings.get("validation", {}).get("prompts", [])
        if takes_conditions(kinds) and prompts and data:
            images = list_images(self.folder(data))
            conditions = values.get("control.conditions") or ["condition"]
            shown = [str(images[number % len(images)]) for number in range(len(prompts)) for _ in conditions]
            settings["validation"] = {"control_images": shown, **settings["validation"]}
        try:
            config = TrainConfig(**settings)
        except RestuneError as error:
            return PlannedRun(settings, None, f"{str(error).rstrip('.')}.")
        problem = ""
        side = config.data.resolution
        if too_long:
            problem = "The name of the tuner is too long for a file; choose a shorter one."
        elif side is not None and side > _MOST_PIXELS:
            problem = _too_large(side)
        elif not data:
            problem = "Choose images first, in step 1."
        elif without and not settings.get("prompt"):
            problem = (
                f"{counted(without, 'image')} have no caption; write captions in step 2, or give a trigger word here."
            )
        return PlannedRun(settings, config, problem)

    def memory(self, config: TrainConfig) -> MemoryEstimate | None:
        """Return the memory of a step of a run; None if it is not known."""
        from ...training.advice.memory_estimate import estimate_memory

        try:
            return estimate_memory(config)
        except RestuneError:
            return None

    def free_output(self, name: str) -> Path:
        """Return a path for the output folder of a run that no other run has."""
        safe = "".join(sign if sign.isalnum() or sign in "._- " else "-" for sign in name).strip(" .") or "tuner"
        number, path = 1, self.workspace.runs / safe
        while path.exists():
            number += 1
            path = self.workspace.runs / f"{safe}-{number}"
        return path

    # Runs

    def start(self, planned: PlannedRun) -> QueuedRun:
        """Add a run to the queue, and start a process that works through the queue.

        Raises:
            RestuneError: if the settings are not valid, or a check of `restune train` fails.
        """
        if planned.config is None or planned.problem:
            raise UsageError(planned.problem)
        output = Path(planned.settings["output"])
        # Made now, so that the next run of this name gets another folder.
        output.mkdir(parents=True)
        try:
            run = self.context.queue.add(planned.settings, name=output.name)
        except BaseException:
            output.rmdir()
            raise
        self.supervise()
        return run

    def runs(self) -> list[QueuedRun]:
        """Return the runs of the queue in their order."""
        return self.context.queue.runs()

    def resume(self, run_id: str) -> None:
        """Let a stopped or failed run go on."""
        self.context.queue.resume(run_id)
        self.supervise()

    def sample_now(self, run: QueuedRun) -> None:
        """Ask a running run for samples.

        Raises:
            UsageError: if the run is not running.
        """
        if run.state != "running":
            raise UsageError(f"{run.name} is not running, so it generates no samples; resume it first.")
        from ...training.callbacks.sample_request import request_samples

        request_samples(run.output)

    def add_to_library(self, tuner: Path) -> str:
        """Copy a finished tuner into the library and return its name there.

        Raises:
            RestuneError: if the file is damaged, or cannot be copied.
        """
        from ..library.shelf import Shelf

        return Shelf(self.workspace).add_from_run(f"{tuner.parent.name}/{tuner.stem}")

    def supervise(self) -> None:
        """Start a process that works through the queue, unless one lives or there is nothing to do."""
        from ...run_queue import ensure_supervisor

        if any(run.state in ("waiting", "running") for run in self.runs()):
            device = self.context.settings.device
            ensure_supervisor(self.workspace.queue, ("cpu" if device == "cpu" else "auto",))

    def _trigger(self, values: Mapping[str, Any]) -> str:
        if not acts_on_text(_kinds(values)):
            return str(values.get("trigger_word") or "").strip()
        tokens = str(values.get("text.tokens") or "").split()
        return tokens[0] if tokens else ""

    def _fallback(self, values: Mapping[str, Any]) -> str:
        """Return the caption of images without one."""
        trigger = self._trigger(values)
        word = str(values.get("text.initializers") or "").strip() if acts_on_text(_kinds(values)) else ""
        return f"{trigger} {word}".strip() if trigger else ""


def _too_large(side: int) -> str:
    return f"The resolution of {side} pixels is too large; use {_MOST_PIXELS} at most."


def last_lines(log: Path) -> str:
    """Return the last lines of a log; a progress bar, which overwrites its line, counts as its last state."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _LOG_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join(lines[-_LOG_LINES:]).strip()


def _kinds(values: Mapping[str, Any]) -> list[str]:
    field = next(field for field in all_fields() if field.name == "tuner")
    return list(field.parsed(values.get("tuner")) or ["skip"])
