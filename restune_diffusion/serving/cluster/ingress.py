"""Ingress on Ray Serve: the gate, and forwarding of requests to replicas."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from prometheus_client.exposition import CONTENT_TYPE_LATEST
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError
from starlette.responses import JSONResponse, Response

from ..http.errors import RequestError
from ..http.gate import Application, Gate, Receive, Scope, Send, respond
from ..http.starting import ServerSettings, http_limits
from .hints import wanted_tuners
from .metrics import merged_metrics
from .replica import UNAVAILABLE

TRIES = 3
"""Replicas that a request is sent to, one after the other, if they end before they answer."""
_SCOPE = ("type", "http_version", "method", "path", "raw_path", "query_string", "scheme")
# Requests about the whole server, which the ingress answers.
_OWN = frozenset({"/healthz", "/readyz", "/metrics"})
_BROADCAST_SECONDS = 10.0
_ENDED = RequestError("The replicas ended while they worked on the request; send it again.", 503, retry_after=5)
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
        try:
            if scope["path"] in _OWN:
                await self._answer_itself(scope["path"], send)
            elif scope["path"] in _OF_ALL and (scope["method"] == "POST" or scope["path"] == _PROGRESS):
                await self._ask_all(plain, body, send)
            else:
                await self._forward(plain, body, receive, send)
        except (DeploymentUnavailableError, TimeoutError):
            await respond(
                send, RequestError("No replica answers now; try again later.", 503, retry_after=5), scope["path"]
            )

    async def _forward(self, scope: dict[str, Any], body: bytes, receive: Receive, send: Send) -> None:
        """Send a request to a replica, and to others if that one ends."""
        response, tuners, avoid = HeldResponse(send), wanted_tuners(body), list[str]()
        for _ in range(TRIES):
            response.forget()
            stream = self._answer.remote(scope, body, tuners=tuners, avoid=avoid)
            watch = asyncio.ensure_future(_cancel_when_gone(stream, receive))
            try:
                async for message in stream:
                    if message["type"] == UNAVAILABLE:
                        avoid.append(message["replica"])
                        break
                    if message["type"] == "http.response.body" and not message.get("more_body"):
                        # A client that leaves now has its whole response.
                        watch.cancel()
                    await response.add(message)
                else:
                    return
            except RequestCancelledError:
                # The client has left, so nobody waits for a response.
                return
            except RayActorError:
                if response.complete:
                    return
                if response.begun:
                    await response.end(_ENDED.openai_event())
                    return
            finally:
                watch.cancel()
        await respond(send, _ENDED, scope["path"])

    async def _ask_all(self, scope: dict[str, Any], body: bytes, send: Send) -> None:
        """Send a request to all replicas, and answer with the response of one; for progress, of one that works."""
        answers = [each for each in await self._of_all("reply", scope, body) if each[0]["type"] != UNAVAILABLE]
        if not answers:
            raise TimeoutError
        chosen = max(answers, key=_job_count) if scope["path"] == _PROGRESS else answers[0]
        for message in chosen:
            await send(message)

    async def _answer_itself(self, path: str, send: Send) -> None:
        """Answer a request about the whole server."""
        if path == "/healthz":
            response: Response = JSONResponse({"status": "ok"})
        elif path == "/readyz":
            ready = any(await self._of_all("ready"))
            response = JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)
        else:
            content = merged_metrics(dict(sorted(await self._of_all("metrics"))))
            response = Response(content, media_type=CONTENT_TYPE_LATEST)
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body})

    async def _of_all(self, method: str, *arguments: Any) -> list[Any]:
        """Return the results of a method of all replicas; those that end during the call are left out.

        Raises:
            DeploymentUnavailableError: if there is no replica.
            TimeoutError: if one does not answer.
        """
        response = self._replicas.broadcast(method, *arguments)
        results = await response.results_async(timeout_s=_BROADCAST_SECONDS, return_exceptions=True)
        return [result for result in results if not isinstance(result, Exception)]


class HeldResponse:
    """Response that is held back until it is complete, so that another replica can still give it.

    A stream of events is sent from its first event on.

    Args:
        send: ASGI function of the connection.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: list[MutableMapping[str, Any]] = []
        self._is_stream = False
        self.begun = False
        """Whether a part has been sent."""
        self.complete = False
        """Whether all has been sent."""

    async def add(self, message: MutableMapping[str, Any]) -> None:
        """Add an ASGI message of the response."""
        self._held.append(message)
        if message["type"] == "http.response.start":
            headers = {bytes(name).lower(): bytes(value) for name, value in message["headers"]}
            self._is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            return
        last = not message.get("more_body")
        if last or (self._is_stream and message.get("body")):
            self.begun, self.complete = True, last
            for each in self._held:
                await self._send(each)
            self._held = []

    async def end(self, text: str) -> None:
        """End a stream of events with another event."""
        self.complete = True
        # The replica may have ended within an event.
        await self._send({"type": "http.response.body", "body": b"\n\n" + text.encode()})

    def forget(self) -> None:
        """Drop what is held, before another replica answers."""
        self._held = []


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
