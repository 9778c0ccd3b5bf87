"""One generation of the page: the base, its tuners, the images in their files, and a way to stop."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipelines.sampling.grid import GridSettings
from ...pipelines.sampling.image_names import free_path, image_name, next_number
from ...pipelines.sampling.settings import SamplingSettings, generator
from ...serving.library import TunerEntry, TunerLibrary
from ...storage.base_files.check import check_base
from ...utils.atomic_write import atomic_write
from ...utils.errors import RestuneError, UsageError
from .fields import ALL, EACH, MIX, FormValues, TunerRow, changed, is_foreign, sampling_settings

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from ..context import StudioContext

_ROWS_AT_ONCE = 8
_PAUSE = 0.1


class Stopped(Exception):
    """The person has stopped the generation."""


@dataclass(frozen=True)
class Progress:
    """State of a generation for the page.

    Args:
        text: sentence for the person.
        preview: image of the latents, if there is a new one.
        saved: path and caption of an image that was written, if there is a new one.
    """

    text: str
    preview: Image.Image | None = None
    saved: tuple[Path, str] | None = None


class GenerationJob:
    """Generation of the values of a form; `run` is called by a thread of its own.

    Args:
        context: state of the studio.
        values: values of the form.
        report: receives each progress.
    """

    def __init__(self, context: StudioContext, values: FormValues, report: Callable[[Progress], None]) -> None:
        self._context = context
        self._values = values
        self._report = report
        self._stop = threading.Event()
        self._call = ""
        self.skipped: list[str] = []
        """Sentences about tuners that were left out."""

    def stop(self) -> None:
        """Stop at the end of the current step."""
        self._stop.set()

    def run(self) -> None:
        """Generate the images.

        Raises:
            RestuneError: if a value of the form is not allowed, or a tuner does not fit the base.
            Stopped: if `stop` is called.
        """
        context, values = self._context, self._values
        library = TunerLibrary(context.workspace.tuners)
        entries = {row.name: library.usable(row.name) for row in values.tuners}
        if values.mode == EACH and not entries:
            raise UsageError("No tuner is chosen; choose at least one, or make one image.")
        # Mistakes of the form are reported before a base is loaded.
        settings = sampling_settings(values, entries, context.settings)
        weights = settings.check()
        check_base(values.base, context.settings.vae)
        with self._turn():
            self._report(Progress("Loading the base and the tuners."))
            pipeline = self._own_pipeline(values.base)
            try:
                if values.mode == ALL:
                    values, entries = self._all_styles(library, pipeline)
                    settings = sampling_settings(values, entries, context.settings)
                    weights = settings.check()
                pipeline = settings.prepare(pipeline, weights)
                self._watch(settings, pipeline, values, entries)
            finally:
                pipeline.unload_tuner_weights()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Context manager that waits for the lock of the pipeline, which another browser may hold."""
        lock = self._context.lock
        if not lock.acquire(blocking=False):
            self._report(Progress("Waiting for another generation to end."))
            while not lock.acquire(timeout=_PAUSE):
                self._check_stopped()
        try:
            yield
        finally:
            lock.release()

    def _own_pipeline(self, base: str) -> Any:
        """Return a pipeline with a scheduler of its own, so that the settings of one generation end with it."""
        from ...pipelines.load_base import is_inpainting, sampling_pipeline

        pipeline = self._context.pipeline(base)
        return pipeline if is_inpainting(pipeline) else sampling_pipeline(pipeline)

    def _watch(
        self, settings: SamplingSettings, pipeline: Any, values: FormValues, entries: Mapping[str, TunerEntry]
    ) -> None:
        arguments = {**settings.arguments(pipeline), "callback_on_step_end": self._after_step(pipeline)}
        if isinstance(settings, GridSettings):
            self._grid(settings, pipeline, arguments)
        elif values.mode in (EACH, ALL):
            self._batches(settings, pipeline, arguments, values, entries)
        else:
            self._one_by_one(settings, pipeline, arguments)

    def _one_by_one(self, settings: SamplingSettings, pipeline: Any, arguments: dict[str, Any]) -> None:
        """Generate as `restune generate` does: one call for each seed, so that the images are equal bit for bit."""
        from ...pipelines.sampling.record import RunRecord

        record: RunRecord | None = None
        number = next_number(self._context.workspace.images)
        for count, seed in enumerate(settings.seeds, 1):
            self._call = f"Image {count} of {settings.images}: " if settings.images > 1 else ""
            image = pipeline(settings.prompt[0], generator=generator(seed), **arguments).images[0]
            record = record or RunRecord(settings, pipeline)
            path = self._context.workspace.images / image_name(number, seed)
            self._save(image, path, _chunks(record.of_image(settings.prompt[0], seed, image.size)), f"Seed {seed}")

    def _batches(
        self,
        settings: SamplingSettings,
        pipeline: Any,
        arguments: dict[str, Any],
        values: FormValues,
        entries: Mapping[str, TunerEntry],
    ) -> None:
        """Generate an image for each tuner, with one U-Net call for all of them in each step."""
        from ...pipelines.sampling.mix import unique_names
        from ...pipelines.sampling.record import RunRecord

        chosen = sorted(values.tuners, key=lambda row: is_foreign(entries[row.name]))
        names = unique_names([path for path, _ in settings.files()])
        loaded = {row.name: name for row, name in zip(chosen, names, strict=True)}
        rows: list[TunerRow | None] = [*([None] if values.with_base else []), *chosen]
        for seed in settings.seeds:
            for first in range(0, len(rows), _ROWS_AT_ONCE):
                batch = rows[first : first + _ROWS_AT_ONCE]
                self._call = f"Images {first + 1} to {first + len(batch)} of {len(rows)}: "
                mixes = [None if row is None else {loaded[row.name]: row.weight} for row in batch]
                prompts = [settings.prompt[0]] * len(batch)
                images = pipeline(
                    prompts,
                    tuners=mixes,
                    generator=[generator(seed) for _ in batch],
                    **_for_batch(arguments, len(batch)),
                ).images
                for row, image in zip(batch, images, strict=True):
                    own = changed(values, mode=MIX, tuners=() if row is None else (row,), images=1, seed=seed)
                    alone = sampling_settings(own, entries, self._context.settings)
                    facts, text = RunRecord(alone, pipeline).of_image(settings.prompt[0], seed, image.size)
                    folder = self._context.workspace.images
                    path = folder / image_name(next_number(folder), seed)
                    caption = "Without tuners" if row is None else row.name
                    self._save(image, path, _chunks(({**facts, "batch": len(batch)}, text)), caption)

    def _grid(self, settings: GridSettings, pipeline: Any, arguments: dict[str, Any]) -> None:
        columns = settings.columns()
        rows = settings.rows()
        images = []
        for number, (prompt, seed) in enumerate(rows, 1):
            self._call = f"Row {number} of {len(rows)}: "
            images.append(settings.row(pipeline, prompt, seed, columns, arguments))
        size = images[0][0].size
        path = free_path(self._context.workspace.images / "grid.png")
        chunks = settings.chunks(pipeline, columns, size)
        self._save(settings.sheet(images, columns), path, chunks, f"{len(rows)} by {len(columns)}")

    def _all_styles(self, library: TunerLibrary, pipeline: Any) -> tuple[FormValues, dict[str, TunerEntry]]:
        """Return the form with all tuners of the library that fit the base; those that do not are noted."""
        library.bind(pipeline)
        chosen = {row.name: row for row in self._values.tuners}
        has_condition = bool(self._values.control_image or self._values.control_from)
        entries: dict[str, TunerEntry] = {}
        for entry in library.list():
            problem = entry.problem
            if problem is None and entry.conditions and not has_condition:
                problem = "It needs a control image."
            if problem is None:
                try:
                    library.load(entry.name)
                except RestuneError as error:
                    problem = str(error)
            if problem is None:
                entries[entry.name] = entry
            else:
                self.skipped.append(f"{entry.name} was left out. {problem}")
        if not entries:
            raise UsageError(" ".join(["The library has no tuner for this base.", *self.skipped]))
        rows = [chosen.get(name, TunerRow(name)) for name in entries]
        return changed(self._values, tuners=rows), entries

    def _after_step(self, pipeline: Any) -> Callable[..., dict[str, Any]]:
        from .preview import Preview

        preview = Preview(pipeline)

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self._check_stopped()
            total = len(pipe.scheduler.timesteps)
            image = preview.image(tensors["latents"]) if preview.due() and step + 1 < total else None
            self._report(Progress(f"{self._call}step {min(step + 1, total)} of {total}", image))
            return {}

        return after_step

    def _check_stopped(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _save(self, image: Image.Image, path: Path, chunks: PngInfo, caption: str) -> None:
        with atomic_write(path) as file:
            image.save(file, format="PNG", pnginfo=chunks)
        self._report(Progress(f"{path.name} is saved.", None, (path, caption)))


def _chunks(record: tuple[dict[str, Any], str]) -> PngInfo:
    from ...imaging.generation_record import png_chunks

    return png_chunks(*record)


def _for_batch(arguments: Mapping[str, Any], images: int) -> dict[str, Any]:
    """Return the arguments of a call with a prompt for each image."""
    negative = arguments.get("negative_prompt")
    changes: dict[str, Any] = {} if negative is None else {"negative_prompt": [negative] * images}
    if "image" in arguments:
        changes["image"] = [arguments["image"]] * images
    return {**arguments, **changes}
