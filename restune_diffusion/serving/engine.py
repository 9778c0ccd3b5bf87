"""Engine that generates images for many requests at once, batched at the denoising step."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .errors import EngineStopped, QueueFull, RequestCancelled, RequestFailed, RequestRefused
from .execution.admission import Admittance
from .execution.batching import Admission, Batches
from .execution.decoding import Decoder
from .execution.denoiser import Denoiser
from .execution.job import Job
from .library import TunerLibrary
from .limits import Limits
from .requests import ImageRequest
from .statistics import EngineStats, Stopwatch
from .tickets import GeneratedImage, Ticket, Timings

logger = logging.getLogger(__name__)


class Engine:
    """Engine that keeps one U-Net busy with the denoising steps of many requests.

    Requests at different steps, with different numbers of steps, schedulers, guidance, seeds and tuners share a U-Net
    call. A request joins at the next step and leaves after its last one. The pipeline and its tuners belong to the
    engine until `close`.

    Args:
        pipeline: a Stable Diffusion pipeline with `RestuneLoaderMixin`, for example from `load_base`.
        library: the tuners that requests may name; None serves the base alone.
        limits: limits on rows, queue and memory.
        clock: clock of the seconds in `stats`; a benchmark may take `time.process_time`.

    Raises:
        RestuneError: if the pipeline is not supported, or the library serves another base.
    """

    def __init__(
        self,
        pipeline: Any,
        library: TunerLibrary | None = None,
        limits: Limits | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.limits = limits or Limits()
        self.library = library
        self._stats = EngineStats()
        self._watch = Stopwatch(self._stats, clock)
        self._admittance = Admittance(pipeline, library, self.limits)
        self._denoiser = Denoiser(pipeline, self._admittance.views, library, self.limits, self._watch)
        self._decoder = Decoder(self._admittance.views)
        # Reentrant, because a file may be read already when `submit` asks to be called back.
        self._lock = threading.RLock()
        """Guards the waiting requests, the counters of `submit` and the flags."""
        self._changed = threading.Condition(self._lock)
        self._stepping = threading.Lock()
        """Held during a step."""
        self._waiting: list[Job] = []
        self._running = Batches(self._admittance.rows_of)
        self._decoding: list[Job] = []
        self._thread: threading.Thread | None = None
        self._readers: ThreadPoolExecutor | None = None
        self._ending = False
        self._finishing = False
        self._closed = False
        self._failed = False

    @property
    def alive(self) -> bool:
        """Whether the thread of the engine computes steps: False before `start`, and after an error that ended it."""
        thread = self._thread
        return thread is not None and thread.is_alive() and not self._failed

    def submit(self, request: ImageRequest) -> Ticket:
        """Accept a request, from any thread.

        Raises:
            QueueFull: if too many requests are waiting.
            RequestRefused: if the request does not fit the base or the limits.
            TunerNameError: if a tuner is not in the library.
            TunerFileError: if the file of a tuner is broken.
            ConditionError: if a control tuner has no condition image.
            RequestCancelled: if the engine is closed or stops.
            EngineStopped: if its thread has ended by an error.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[ImageRequest]) -> list[Ticket]:
        """Accept all of several requests or none of them; the errors are those of `submit`."""
        try:
            jobs = [self._admittance.job(request) for request in requests]
            with self._lock:
                if self._failed:
                    raise EngineStopped
                if self._closed or self._ending:
                    raise RequestCancelled("The engine is shutting down; send the request to another one.")
                if len(self._waiting) + len(jobs) > self.limits.max_queue:
                    if len(jobs) > self.limits.max_queue:
                        raise RequestRefused(
                            f"{len(jobs)} images at once are more than the queue holds; use {self.limits.max_queue} "
                            "at most."
                        )
                    raise QueueFull(f"The queue is full with {len(self._waiting)} requests; try again later.")
                for job in jobs:
                    job.ticket._on_cancel = partial(self._drop_waiting, job)
                    if self._readers is not None and job.request.active_tuners:
                        job.loading = self._readers.submit(self._denoiser.load, job)
                        job.loading.add_done_callback(self._wake)
                    self._waiting.append(job)
                self._stats.submitted += len(jobs)
                self._changed.notify_all()
        except Exception:
            with self._lock:
                self._stats.refused += len(requests)
            raise
        return [job.ticket for job in jobs]

    def step(self) -> bool:
        """Compute one U-Net call, with the admissions before it and the decodings after it, in this thread.

        Returns:
            Whether anything was done; False if no request is running or decoding and none can be admitted.
        """
        with self._stepping, torch.no_grad(), self._watch.step():
            self._drop_cancelled()
            admitted = self._admit()
            batch = self._running.next()
            if batch:
                self._denoise(batch)
            decoded = self._decode_some(all_of_them=not batch)
        return bool(admitted or batch or decoded)

    def start(self) -> None:
        """Start the thread that computes the steps, and one that reads tuner files ahead."""
        with self._lock:
            if self._closed:
                raise RequestCancelled("The engine is closed; create another one.")
            if self._thread is not None:
                return
            self._ending = self._finishing = self._failed = False
            self._readers = ThreadPoolExecutor(1, thread_name_prefix="restune-tuner-files")
            self._thread = threading.Thread(target=self._run, name="restune-engine", daemon=True)
            self._thread.start()

    def stop(self, *, finish: bool = True, timeout: float | None = None) -> None:
        """Stop the threads; `submit` raises `RequestCancelled` until the next `start`.

        Args:
            finish: whether to finish the accepted requests first; otherwise they stay where they are.
            timeout: seconds to wait for them.
        """
        with self._lock:
            thread, readers = self._thread, self._readers
            self._ending, self._finishing = True, finish
            self._changed.notify_all()
        if thread is not None:
            thread.join(timeout)
            with self._lock:
                self._finishing = False
                self._changed.notify_all()
            thread.join()
        if readers is not None:
            readers.shutdown(cancel_futures=False)
        with self._lock:
            self._thread = self._readers = None

    def close(self) -> None:
        """Cancel all requests, stop the threads, and detach the engine's tuners from the base."""
        with self._lock:
            self._closed = True
        self.stop(finish=False)
        with self._stepping:
            self._end_all(RequestCancelled("The engine was closed before the image was done."))
            self._denoiser.close()

    def attached_tuners(self) -> list[str]:
        """Return the names of the tuners that are attached to the base, the most recently used first."""
        return self._denoiser.attached_tuners()

    def stats(self) -> EngineStats:
        """Return a copy of the counters."""
        with self._lock:
            self._denoiser.count(self._stats)
            return replace(
                self._stats,
                queued=len(self._waiting),
                running=len(self._running),
                decoding=len(self._decoding),
                latency_counts=list(self._stats.latency_counts),
            )

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._compute_steps()
        except BaseException as error:
            # Errors of requests and steps are handled inside; a SystemExit of a library is not.
            logger.critical("The thread of the engine has ended by an error.", exc_info=error)
            with self._lock:
                self._failed = True
            self._end_all(EngineStopped())

    def _compute_steps(self) -> None:
        while True:
            with self._lock:
                if self._ending and not (self._finishing and self._has_work()):
                    return
            try:
                worked = self.step()
            except Exception as error:
                # Not the fault of one request, or it would have ended it alone.
                logger.exception("A step of the engine failed; its requests are ended.")
                worked = True
                for job in list(self._running):
                    self._end(job, RequestFailed(f"The step failed: {type(error).__name__}; see the log."))
            if not worked:
                with self._lock:
                    if not self._ending and not any(self._is_ready(job) for job in self._waiting):
                        self._changed.wait()
                    elif self._ending and self._finishing and self._has_work():
                        # Only tuner files that are being read remain.
                        self._changed.wait(0.05)

    def _has_work(self) -> bool:
        return bool(self._waiting or self._decoding or len(self._running))

    @staticmethod
    def _is_ready(job: Job) -> bool:
        return job.ticket.cancelled or job.loading is None or job.loading.done()

    def _wake(self, *_: object) -> None:
        with self._lock:
            self._changed.notify_all()

    def _drop_waiting(self, job: Job) -> None:
        """End a cancelled request at once if it still waits; a running one ends before the next step."""
        with self._lock:
            waits = job in self._waiting
            if waits:
                self._waiting.remove(job)
            self._changed.notify_all()
        if waits:
            self._end(job, RequestCancelled("The request was cancelled."))

    def _drop_cancelled(self) -> None:
        for job in [*self._running, *self._decoding]:
            if job.ticket.cancelled:
                self._end(job, RequestCancelled("The request was cancelled."))

    def _admit(self) -> bool:
        with self._lock:
            waiting = list(self._waiting)
        gone = self._running.admit(waiting, self._prepare)
        with self._lock:
            self._waiting = [job for job in self._waiting if job not in gone]
        return bool(gone)

    def _prepare(self, job: Job) -> Admission:
        if not self._is_ready(job):
            return "not yet"
        try:
            if not self._denoiser.prepare(job):
                return "all wait"
        except Exception as error:
            self._end(job, _as_failure(error, job))
            return "failed"
        job.started = time.perf_counter()
        assert job.state is not None
        job.ticket._begin(job.state.steps)
        return "admitted"

    def _denoise(self, batch: list[Job]) -> None:
        """Compute a step of some requests; one that makes the call fail is found and ended alone."""
        try:
            predictions = self._denoiser.predict(batch)
        except Exception as error:
            self._denoiser.forget()
            if isinstance(error, torch.cuda.OutOfMemoryError):
                self._running.lower_limit(batch[0].size, sum(job.rows for job in batch) // 2)
                torch.cuda.empty_cache()
            if len(batch) == 1:
                self._end(batch[0], _as_failure(error, batch[0]))
                return
            half = len(batch) // 2
            self._denoise(batch[:half])
            self._denoise(batch[half:])
            return
        for job, predicted in zip(batch, predictions, strict=True):
            try:
                self._advance(job, predicted)
            except Exception as error:
                self._end(job, _as_failure(error, job))

    def _advance(self, job: Job, predicted: torch.Tensor) -> None:
        state, every = job.state, job.request.preview_every
        assert state is not None
        with self._watch("scheduler"):
            estimate = state.advance(predicted, estimate=bool(every) and (state.index + 1) % every == 0)
        if state.done:
            job.finished = time.perf_counter()
            self._running.remove(job)
            self._denoiser.release(job)
            self._decoding.append(job)
            job.ticket._advance("decoding", state.index)
            return
        preview = None
        if estimate is not None:
            with self._watch("vae"):
                preview = self._decoder.preview(estimate)
        job.ticket._advance("running", state.index, preview)

    def _decode_some(self, all_of_them: bool) -> int:
        """Decode finished latents: one in each step, and more if several wait, so that the others go on."""
        count = len(self._decoding) if all_of_them else min(len(self._decoding), 1 + len(self._decoding) // 4)
        for job in self._decoding[:count]:
            try:
                with self._watch("vae"):
                    image, flagged = self._decoder.image(job)
            except Exception as error:
                self._end(job, _as_failure(error, job))
                continue
            self._decoding.remove(job)
            self._deliver(job, image, flagged)
        return count

    def _deliver(self, job: Job, image: Any, flagged: bool) -> None:
        state, ticket = job.state, job.ticket
        assert state is not None
        total = time.perf_counter() - ticket.submitted
        timings = Timings(job.started - ticket.submitted, job.finished - job.started, total)
        result = GeneratedImage(image, state.latents, ticket.request, ticket.seed, state.steps, timings, flagged)
        with self._lock:
            self._stats.done += 1
            self._stats.add_latency(total)
        ticket._finish(result)

    def _end_all(self, error: BaseException) -> None:
        with self._lock:
            jobs = [*self._waiting, *self._running, *self._decoding]
            self._waiting, self._decoding = [], []
        for job in jobs:
            self._end(job, error)

    def _end(self, job: Job, error: BaseException) -> None:
        """End a request with an error, and free what it uses."""
        self._running.remove(job)
        if job in self._decoding:
            self._decoding.remove(job)
        self._denoiser.release(job)
        if not job.ticket._fail(error):
            return
        with self._lock:
            if isinstance(error, RequestCancelled):
                self._stats.cancelled += 1
            else:
                self._stats.failed += 1


def _as_failure(error: Exception, job: Job) -> Exception:
    """Return the error of a request: as it is if it is one sentence for a user, otherwise in one sentence."""
    from ..utils.errors import RestuneError

    if isinstance(error, RestuneError):
        return error
    logger.warning("A request failed.", exc_info=error)
    lines = str(error).strip().splitlines() or [""]
    failure = RequestFailed(f"The image could not be generated ({type(error).__name__}: {lines[0][:200]}).")
    failure.__cause__ = error
    return failure
