"""Ticket of a submitted request: progress, previews, cancellation and result."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from PIL import Image

from .errors import RequestCancelled
from .requests import ImageRequest

if TYPE_CHECKING:
    import torch

State: TypeAlias = Literal["waiting", "running", "decoding", "done", "failed", "cancelled"]
_FINAL = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Timings:
    """Seconds of one request."""

    waited: float
    """From `submit` to the first denoising step."""
    denoised: float
    """From the first denoising step to the last one."""
    total: float
    """From `submit` to the finished image."""


@dataclass(frozen=True, eq=False)
class GeneratedImage:
    """Result of a request.

    Args:
        image: the image; black if the base's safety checker rejects it.
        latents: latents of the image, `(1, channels, height, width)`, on the device of the base.
        request: the request.
        seed: seed of the noise, which is chosen by the engine if the request has none.
        steps: number of denoising steps that were computed.
        timings: seconds of the request.
        flagged: whether the base's safety checker rejected the image.
    """

    image: Image.Image
    latents: torch.Tensor = field(repr=False)
    request: ImageRequest
    seed: int
    steps: int
    timings: Timings
    flagged: bool = False


@dataclass(frozen=True)
class Progress:
    """State of a request.

    Args:
        state: `waiting`, `running`, `decoding`, `done`, `failed` or `cancelled`.
        step: number of denoising steps that are done.
        steps: number of denoising steps of the request.
        preview: preview of the image after this step, if the request asks for one.
    """

    state: State
    step: int
    steps: int
    preview: Image.Image | None = field(default=None, repr=False, compare=False)

    @property
    def is_final(self) -> bool:
        """Whether the request is done, failed or cancelled."""
        return self.state in _FINAL


Listener: TypeAlias = Callable[[Progress], None]


class Ticket:
    """Handle of a request that an engine has accepted; safe to use from any thread.

    Args:
        request: the request.
        seed: seed of the noise.
        steps: number of denoising steps.
    """

    def __init__(self, request: ImageRequest, seed: int, steps: int) -> None:
        self.request = request
        self.seed = seed
        self.submitted = time.perf_counter()
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._progress = Progress("waiting", 0, steps)
        self._listeners: list[Listener] = []
        self._cancelled = False
        self._result: GeneratedImage | None = None
        self._error: BaseException | None = None
        self._on_cancel: Callable[[], None] = lambda: None

    @property
    def progress(self) -> Progress:
        """Current state of the request."""
        return self._progress

    @property
    def done(self) -> bool:
        """Whether the request is done, failed or cancelled."""
        return self._done.is_set()

    @property
    def cancelled(self) -> bool:
        """Whether cancellation was requested."""
        return self._cancelled

    def result(self, timeout: float | None = None) -> GeneratedImage:
        """Wait for the image and return it.

        Raises:
            TimeoutError: if it is not finished after `timeout` seconds.
            RequestCancelled: if the request was cancelled, or the engine was closed.
            RestuneError: if the request failed.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"The image is not finished after {timeout:g} seconds.")
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """Cancel the request; its rows are free from the next step on. Without effect on a finished request."""
        with self._lock:
            if self._done.is_set():
                return
            self._cancelled = True
        self._on_cancel()

    def listen(self, listener: Listener) -> None:
        """Call a function with the current state and with each later one.

        It is called in the thread of the engine and delays the next step, so it must return at once; asyncio code
        passes the state on with `loop.call_soon_threadsafe`. An error in it is ignored.
        """
        with self._lock:
            self._listeners.append(listener)
            progress = self._progress
        _call(listener, progress)

    def events(self, timeout: float | None = None) -> Iterator[Progress]:
        """Yield the current state and each later one, previews included, and end after the final one.

        Args:
            timeout: seconds to wait for the next state; None waits without limit.

        Raises:
            TimeoutError: if there is no next state within the timeout.
        """
        states: queue.SimpleQueue[Progress] = queue.SimpleQueue()
        self.listen(states.put)
        try:
            while True:
                try:
                    progress = states.get(timeout=timeout)
                except queue.Empty:
                    raise TimeoutError(f"There was no progress in {timeout:g} seconds.") from None
                yield progress
                if progress.is_final:
                    return
        finally:
            with self._lock:
                self._listeners.remove(states.put)

    def _begin(self, steps: int) -> None:
        """Start the denoising, with its exact number of steps."""
        with self._lock:
            if not self._done.is_set():
                self._progress = Progress(self._progress.state, 0, steps)
        self._advance("running", 0)

    def _advance(self, state: State, step: int | None = None, preview: Image.Image | None = None) -> None:
        """Set the state and call the listeners; only the engine calls it."""
        self._set(state, step, preview)

    def _finish(self, result: GeneratedImage) -> bool:
        """End the request with its result; return whether it had not ended before."""
        return self._set("done", result=result)

    def _fail(self, error: BaseException) -> bool:
        """End the request with an error; return whether it had not ended before."""
        return self._set("cancelled" if isinstance(error, RequestCancelled) else "failed", error=error)

    def _set(
        self,
        state: State,
        step: int | None = None,
        preview: Image.Image | None = None,
        result: GeneratedImage | None = None,
        error: BaseException | None = None,
    ) -> bool:
        with self._lock:
            # A waiting request can be cancelled by one thread while another begins it.
            if self._done.is_set():
                return False
            before = self._progress
            self._progress = Progress(state, before.step if step is None else step, before.steps)
            self._result, self._error = result, error
            progress = Progress(state, self._progress.step, before.steps, preview)
            listeners = list(self._listeners)
            if progress.is_final:
                self._done.set()
        for listener in listeners:
            _call(listener, progress)
        return True


def _call(listener: Listener, progress: Progress) -> None:
    with contextlib.suppress(Exception):
        listener(progress)
