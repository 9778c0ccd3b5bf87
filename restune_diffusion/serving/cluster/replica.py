"""Replica on Ray Serve: one engine, and the application that uses it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, MutableMapping, Sequence
from typing import Any

from ..http.starting import ServerSettings, start_app

_REMEMBERED = 16
"""Tuners that a replica reports; an engine keeps about as many attached."""


class EngineReplica:
    """Engine of one replica; Ray Serve calls its methods.

    Args:
        settings: fields of `ServerSettings`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._app = start_app(ServerSettings(**settings))
        self._recent: OrderedDict[str, None] = OrderedDict()

    def check_health(self) -> None:
        """Raise an error if the engine cannot take requests; Ray Serve then replaces the replica."""
        self._app.service.engine.stats()

    def record_routing_stats(self) -> dict[str, Any]:
        """Return the tuners that were used last, for `TunerRouter`."""
        return {"tuners": list(self._recent)}

    async def answer(
        self, scope: dict[str, Any], body: bytes, tuners: Sequence[str] = ()
    ) -> AsyncIterator[MutableMapping[str, Any]]:
        """Yield the ASGI messages of the response to a request.

        Args:
            scope: ASGI scope of the request.
            body: its whole body.
            tuners: names of the tuners that it seems to want.
        """
        self._remember(tuners)
        messages: asyncio.Queue[MutableMapping[str, Any] | None] = asyncio.Queue()
        gone = asyncio.Event()
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> MutableMapping[str, Any]:
            if unread:
                return unread.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            messages.put_nowait(message)

        task = asyncio.ensure_future(self._app.behind_gate(scope, receive, send))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            # The client has gone, or the response is complete.
            gone.set()
            with contextlib.suppress(Exception):
                await task

    async def reply(self, scope: dict[str, Any], body: bytes) -> list[MutableMapping[str, Any]]:
        """Return the ASGI messages of the response to a short request, for all replicas at once."""
        return [message async for message in self.answer(scope, body)]

    def _remember(self, tuners: Sequence[str]) -> None:
        for name in tuners:
            self._recent[name] = None
            self._recent.move_to_end(name)
        while len(self._recent) > _REMEMBERED:
            self._recent.popitem(last=False)

    def __del__(self) -> None:
        if hasattr(self, "_app"):
            self._app.service.engine.close()
