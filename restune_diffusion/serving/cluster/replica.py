"""Replica on Ray Serve: one engine, and the application that uses it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, MutableMapping, Sequence
from typing import Any

from ..errors import EngineStopped
from ..http.starting import ServerSettings, start_app

UNAVAILABLE = "restune.unavailable"
"""Type of the only message of a replica whose engine has stopped: another replica can answer the request."""


class EngineReplica:
    """Engine of one replica; Ray Serve calls its methods.

    Args:
        settings: fields of `ServerSettings`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._app = start_app(ServerSettings(**settings))
        self._engine = self._app.service.engine

    def check_health(self) -> None:
        """Raise `EngineStopped` if the engine computes no requests; Ray Serve then replaces the replica."""
        if not self._engine.alive:
            raise EngineStopped

    def record_routing_stats(self) -> dict[str, Any]:
        """Return the tuners that the engine holds and whether it works, for `TunerRouter`."""
        return {"tuners": self._engine.attached_tuners(), "alive": self._engine.alive}

    def metrics(self) -> tuple[str, str]:
        """Return the id of the replica, and its metrics in Prometheus's text format."""
        return self._name, self._app.metrics.text().decode()

    def ready(self) -> bool:
        """Return whether the engine works."""
        return self._engine.alive

    async def answer(
        self, scope: dict[str, Any], body: bytes, tuners: Sequence[str] = (), avoid: Sequence[str] = ()
    ) -> AsyncIterator[MutableMapping[str, Any]]:
        """Yield the ASGI messages of the response to a request; `UNAVAILABLE` alone if the engine has stopped.

        Args:
            scope: ASGI scope of the request.
            body: its whole body.
            tuners: names of the tuners that it seems to want, for `TunerRouter`.
            avoid: ids of replicas that could not answer it, for `TunerRouter`.
        """
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
                if message.get("status") == 503 and not self._engine.alive:
                    yield {"type": UNAVAILABLE, "replica": self._name}
                    return
                yield message
        finally:
            # The client has gone, or the response is complete.
            gone.set()
            with contextlib.suppress(Exception):
                await task

    async def reply(self, scope: dict[str, Any], body: bytes) -> list[MutableMapping[str, Any]]:
        """Return the ASGI messages of the response to a short request, for all replicas at once."""
        return [message async for message in self.answer(scope, body)]

    @property
    def _name(self) -> str:
        """Id of the replica."""
        from ray import serve

        return str(serve.get_replica_context().replica_id.unique_id)

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()
