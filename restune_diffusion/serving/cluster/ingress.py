"""Ingress on Ray Serve: the gate, and forwarding of requests to replicas."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ray.exceptions import RayActorError
from starlette.responses import Response

from ..http.errors import RequestError
from ..http.gate import Application, Gate, Receive, Scope, Send, respond
from ..http.starting import ServerSettings, http_limits
from .hints import wanted_tuners

TRIES = 3
"""Replicas that a request is sent to, one after the other, if they end before they answer."""
_SCOPE = ("type", "http_version", "method", "path", "raw_path", "query_string", "scheme")
_PROGRESS = "/sdapi/v1/progress"
# State of A1111's clients, which each replica has for itself.
_OF_ALL = frozenset({_PROGRESS, *(f"/sdapi/v1/{name}" for name in ("interrupt", "skip", "options"))})


class Ingress:
    """Ingress of one node; Ray Serve calls it with each request.

    Args:
        settings: fields of `ServerSettings`.
        replicas: handle of the deployment of `EngineReplica`.
    """

    def __init__(self, settings: dict[str, Any], replicas: Any) -> None:
        server = ServerSettings(**settings)
        self._gate = Gate(Forwarder(replicas), server.key_digest, http_limits(server))

    async def __call__(self, request: Any) -> Response:
        """Return a response that passes the request through the gate when it is sent."""
        return _Gated(self._gate)


class _Gated(Response):
    """Response that another application writes."""

    def __init__(self, app: Application) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request."""
        await self._app(scope, receive, send)


class Forwarder:
    """ASGI application that sends each request to a replica; one that ends before it answers is replaced by another.

    Args:
        replicas: handle of the deployment of `EngineReplica`.
    """

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas
        self._answer = replicas.options(method_name="answer", stream=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, whose body is read."""
        body = (await receive()).get("body", b"")
        plain = {name: scope[name] for name in _SCOPE if name in scope}
        plain["headers"] = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
        if scope["path"] in _OF_ALL and (scope["method"] == "POST" or scope["path"] == _PROGRESS):
            await self._ask_all(plain, body, send)
            return
        for _ in range(TRIES):
            started = False
            stream = self._answer.remote(plain, body, tuners=wanted_tuners(body))
            watch = asyncio.ensure_future(_cancel_when_gone(stream, receive))
            try:
                async for message in stream:
                    started = True
                    if message["type"] == "http.response.body" and not message.get("more_body"):
                        # A client that leaves now has its whole response.
                        watch.cancel()
                    await send(message)
                return
            except RayActorError:
                if started:
                    raise
            finally:
                watch.cancel()
        refusal = RequestError(
            "The replicas ended while they worked on the request; send it again.", 503, retry_after=5
        )
        await respond(send, refusal, scope["path"])

    async def _ask_all(self, scope: dict[str, Any], body: bytes, send: Send) -> None:
        """Send a request to all replicas, and answer with the response of one; for progress, of one that works."""
        answers = await self._replicas.broadcast("reply", scope, body).results_async()
        chosen = max(answers, key=_job_count) if scope["path"] == _PROGRESS else answers[0]
        for message in chosen:
            await send(message)


def _job_count(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of requests in a response of `progress`."""
    try:
        return int(json.loads(b"".join(each.get("body", b"") for each in messages))["state"]["job_count"])
    except (ValueError, KeyError, TypeError):
        return -1


async def _cancel_when_gone(stream: Any, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    with contextlib.suppress(Exception):
        stream.cancel()
