"""Service behind the routes: submits requests to the engine and waits for their images."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...utils.errors import BaseMismatchError, RestuneError, TunerFileError, TunerNameError
from ..errors import EngineStopped, QueueFull, RequestCancelled, RequestFailed
from ..requests import ImageRequest
from ..tickets import GeneratedImage, Progress, Ticket
from .errors import RequestError
from .image_files import BaseFacts
from .limits import Limits
from .model_names import BASE_NAME

if TYPE_CHECKING:
    from PIL import Image

    from ..engine import Engine
    from ..library import TunerEntry, TunerLibrary

RANDOM_SEEDS = 2**32
_STATUS = {
    QueueFull: 429,
    TunerNameError: 404,
    TunerFileError: 422,
    BaseMismatchError: 422,
    RequestFailed: 500,
    EngineStopped: 503,
}
_RETRY_AFTER = {429: 2, 503: 5}


@dataclass
class Service:
    """Engine and what the routes need to know of it.

    Args:
        engine: the engine; its thread must be running.
        library: its tuners; None serves the base alone.
        base: facts about the base.
        limits: limits of the server.
    """

    engine: Engine
    library: TunerLibrary | None
    base: BaseFacts
    limits: Limits = field(default_factory=Limits)
    ready: bool = True
    """Whether `/readyz` reports that the server takes requests."""

    @property
    def base_names(self) -> frozenset[str]:
        """Model names of the base without tuners."""
        return frozenset({BASE_NAME, self.base.name})

    def tuner_names(self) -> frozenset[str]:
        """Return the names of the tuners in the library."""
        return frozenset(() if self.library is None else self.library.names())

    def entries(self) -> list[TunerEntry]:
        """Return the entries of the tuners in the library."""
        return [] if self.library is None else self.library.list()

    def check_size(self, width: int, height: int, param: str) -> None:
        """Raise `RequestError` if an image is larger than the limits, or its sides do not fit the base."""
        factor, most = self.base.factor, self.limits.side
        if max(width, height) > most or min(width, height) < factor or width % factor or height % factor:
            raise RequestError(
                f"A size of {width}x{height} is not possible; use multiples of {factor} up to {most}.", param=param
            )

    def size_of(self, image: Image.Image) -> tuple[int, int]:
        """Return the size of an edited image: that of the image if the base supports it, else the native size."""
        factor, most = self.base.factor, self.limits.side
        fits = max(image.size) <= most and all(side % factor == 0 for side in image.size)
        return image.size if fits else self.base.size

    def submit(self, request: ImageRequest, count: int) -> list[Ticket]:
        """Submit a request for several images with consecutive seeds.

        Raises:
            RequestError: if the engine refuses it.
        """
        first = secrets.randbelow(RANDOM_SEEDS) if request.seed is None else request.seed
        try:
            return self.engine.submit_all([replace(request, seed=first + number) for number in range(count)])
        except RestuneError as error:
            raise self.refusal(error) from error

    def refusal(self, error: RestuneError) -> RequestError:
        """Return the refusal for an error of the engine."""
        if isinstance(error, RequestError):
            return error
        if isinstance(error, RequestCancelled):
            return RequestError("The request was cancelled; the server is shutting down.", 503, retry_after=5)
        status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 400)
        codes = {429: "rate_limit_exceeded", 404: "model_not_found"}
        return RequestError(
            self._without_folder(str(error)), status, code=codes.get(status), retry_after=_RETRY_AFTER.get(status)
        )

    def _without_folder(self, message: str) -> str:
        """Return a message without the path of the library, which clients must not learn."""
        for entry in self.entries():
            for path in (str(entry.path), str(Path(os.path.realpath(entry.path)))):
                message = message.replace(path, entry.name)
        return message


async def events(tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Progress]]:
    """Yield the states of tickets with the ticket's number, until all are final."""
    loop = asyncio.get_running_loop()
    states: asyncio.Queue[tuple[int, Progress]] = asyncio.Queue()

    def listener(number: int) -> Callable[[Progress], None]:
        def listen(progress: Progress) -> None:
            loop.call_soon_threadsafe(states.put_nowait, (number, progress))

        return listen

    for number, ticket in enumerate(tickets):
        ticket.listen(listener(number))
    unfinished = len(tickets)
    while unfinished:
        number, progress = await states.get()
        unfinished -= progress.is_final
        yield number, progress


async def finished(tickets: Sequence[Ticket], request: Any, service: Service) -> list[GeneratedImage]:
    """Wait for the images of tickets; cancel them if the client disconnects or one of them fails.

    Args:
        tickets: the tickets.
        request: the HTTP request, whose body has been read.
        service: the service that issued them.

    Raises:
        RequestError: if an image fails, or the client has gone.
    """
    work = asyncio.ensure_future(_all_final(tickets))
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise RequestError("The client has disconnected.", 499)
        # Those that failed first: the others need not be finished.
        failed = [ticket for ticket in tickets if ticket.progress.state in ("failed", "cancelled")]
        return [ticket.result(0) for ticket in (*failed, *tickets)]
    except RestuneError as error:
        raise service.refusal(error) from error
    finally:
        cancel(tickets)
        work.cancel()
        gone.cancel()


def cancel(tickets: Sequence[Ticket]) -> None:
    """Cancel tickets; without effect on finished ones."""
    for ticket in tickets:
        ticket.cancel()


async def disconnected(request: Any) -> None:
    """Return when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _all_final(tickets: Sequence[Ticket]) -> None:
    """Return when all tickets are final, or one has failed."""
    async for _, progress in events(tickets):
        if progress.state in ("failed", "cancelled"):
            return
