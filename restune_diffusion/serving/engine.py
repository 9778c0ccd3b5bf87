"""Engine that generates images for many requests at once, batched at the denoising step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .library import TunerLibrary
from .limits import Limits
from .requests import ImageRequest
from .statistics import EngineStats
from .tickets import Ticket


class Engine:
    """Engine that keeps one U-Net busy with the denoising steps of many requests.

    Requests at different steps, with different numbers of steps, schedulers, guidance, seeds and tuners share a U-Net
    call. A request joins at the next step and leaves after its last one. The pipeline and its tuners belong to the
    engine until `close`.

    Args:
        pipeline: a Stable Diffusion pipeline with `RestuneLoaderMixin`, for example from `load_base`.
        library: the tuners that requests may name; None serves the base alone.
        limits: limits on rows, queue and memory.
    """

    def __init__(self, pipeline: Any, library: TunerLibrary | None = None, limits: Limits | None = None) -> None:
        raise NotImplementedError

    def submit(self, request: ImageRequest) -> Ticket:
        """Accept a request, from any thread.

        Raises:
            QueueFull: if too many requests are waiting.
            RequestRefused: if the request does not fit the base or the limits.
            TunerNameError: if a tuner is not in the library.
            TunerFileError: if the file of a tuner is broken.
            ConditionError: if a control tuner has no condition image.
            RequestCancelled: if the engine is closed.
        """
        raise NotImplementedError

    def submit_all(self, requests: Sequence[ImageRequest]) -> list[Ticket]:
        """Accept all of several requests or none of them; the errors are those of `submit`."""
        raise NotImplementedError

    def step(self) -> bool:
        """Compute one U-Net call, with the admissions before it and the decodings after it, in this thread.

        Returns:
            Whether anything was done; False if no request is waiting, running or decoding.
        """
        raise NotImplementedError

    def start(self) -> None:
        """Start the thread that computes the steps."""
        raise NotImplementedError

    def stop(self, *, finish: bool = True, timeout: float | None = None) -> None:
        """Stop the thread.

        Args:
            finish: whether to finish the accepted requests first; otherwise they stay where they are.
            timeout: seconds to wait for them.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Cancel all requests, stop the thread, and detach the engine's tuners from the base."""
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """Return a copy of the counters."""
        raise NotImplementedError
