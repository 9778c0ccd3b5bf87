"""U-Net calls for several requests at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..library import TunerLibrary
from ..limits import Limits
from ..statistics import EngineStats, Stopwatch
from .attachments import Attachments, Loaded
from .job import Job
from .preparation import Preparation
from .text_cache import TextCache
from .views import PipelineViews


class Denoiser:
    """Prepares requests, and computes their U-Net calls with each request's tuners on its own rows.

    Args:
        pipeline: the pipeline of the base.
        views: its pipelines by task.
        library: the tuners.
        limits: the limits.
        watch: clock of the engine.
    """

    def __init__(
        self, pipeline: Any, views: PipelineViews, library: TunerLibrary | None, limits: Limits, watch: Stopwatch
    ) -> None:
        self._unet = pipeline.unet
        self._device = views.device
        self._library = library
        if library is not None:
            library.bind(pipeline)
        self._attachments = Attachments(pipeline, views.device, limits.max_attached)
        self._text = TextCache(views)
        self._preparation = Preparation(views)
        self._watch = watch

    def load(self, job: Job) -> Loaded:
        """Read the tuners of a request; safe to call from any thread."""
        names = [name for name, _ in job.request.active_tuners]
        assert self._library is not None or not names
        return [self._library.load(name) for name in names if self._library is not None]

    def prepare(self, job: Job) -> bool:
        """Attach a request's tuners, encode its prompt, and create its latents.

        Returns:
            False if it must wait, because too many other tuners are in use.
        """
        request = job.request
        with self._watch("tuner"):
            loaded = self.load(job) if job.loading is None else job.loading.result()
            uses = self._attachments.take(request, loaded)
        if uses is None:
            return False
        job.uses = uses
        job.loading = None
        with self._watch("text"):
            active = self._attachments.activate_text(uses)
            guided = self._preparation.guided(request.guidance)
            prompt = self._text.encode(request.prompt, request.negative_prompt if guided else None, active)
        with self._watch("vae" if request.image is not None else "scheduler"):
            job.state = self._preparation.denoising(job, prompt)
        with self._watch("tuner"):
            self._attachments.encode_conditions(job, job.state)
        return True

    def predict(self, batch: Sequence[Job]) -> list[torch.Tensor]:
        """Return the U-Net's predictions for the rows of each request."""
        states = [job.state for job in batch if job.state is not None]
        with self._watch("tuner"):
            self._attachments.apply(batch, batch[0].size)
        latents = torch.cat([state.model_input() for state in states])
        times = torch.tensor([state.timestep for state in states for _ in range(state.rows)])
        embeds = torch.cat([state.embeds for state in states])
        options: dict[str, Any] = {}
        if states[0].timestep_cond is not None:
            conds = [state.timestep_cond for state in states if state.timestep_cond is not None]
            options["timestep_cond"] = torch.cat(conds)
        if states[0].added:
            options["added_cond_kwargs"] = {
                name: torch.cat([state.added[name] for state in states]) for name in states[0].added
            }
        try:
            with self._watch("unet", rows=len(latents)):
                predicted: torch.Tensor = self._unet(
                    latents, times.to(self._device), encoder_hidden_states=embeds, return_dict=False, **options
                )[0]
                if self._device.type == "cuda":
                    # The times would be those of the launches; and a request could not join before queued work.
                    torch.cuda.synchronize(self._device)
        finally:
            self._attachments.leave()
        return list(predicted.split([state.rows for state in states]))

    def release(self, job: Job) -> None:
        """End the use of a request's tuners."""
        self._attachments.give_back(job.uses)
        job.uses = []
        if job.state is not None:
            job.state.conditions.clear()

    def forget(self) -> None:
        """Set the weights again in the next call, after one that failed."""
        self._attachments.invalidate()

    def count(self, stats: EngineStats) -> None:
        """Write the counters of tuners and texts."""
        counts = self._attachments.counts
        stats.tuners = len(self._attachments)
        stats.tuner_hits, stats.tuner_misses, stats.tuner_evictions = counts.hits, counts.misses, counts.evictions
        stats.text_hits, stats.text_misses = self._text.hits, self._text.misses

    def attached_tuners(self) -> list[str]:
        """Return the names of the attached tuners, the most recently used first; safe to call from any thread."""
        return self._attachments.names()

    def close(self) -> None:
        """Detach all tuners."""
        self._attachments.close()
