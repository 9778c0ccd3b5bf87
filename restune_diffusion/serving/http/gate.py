"""ASGI middleware before the API: API key, browsers of other sites, and limits on request bodies."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from .errors import RequestError
from .limits import Limits

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
"""Paths that need no key: probes of an orchestrator."""
_DISCARD_SECONDS = 5.0
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_KEY_NEEDED = "This server needs an API key; send it as `Authorization: Bearer KEY`, or as the password of basic auth."


class Gate:
    """ASGI middleware that refuses a request before the API sees it.

    Args:
        app: the API.
        key_digest: digest of the API key, from the function `key_digest`; None lets every local program in,
            but no web page of another site.
        limits: limits of the server.
    """

    def __init__(self, app: Application, key_digest: bytes | None, limits: Limits) -> None:
        self.app = app
        self.limits = limits
        self.draining = False
        """Whether new requests are refused because the server shuts down."""
        self._key = key_digest
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection of the server."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        held = _Held(self)
        try:
            try:
                self._check(scope)
                body = await self._body(scope, receive, held)
            except RequestError as error:
                held.release()
                await self._discard_body(scope, receive)
                await respond(send, error, scope["path"])
                return
            if body is not None:
                await self.app(scope, _replay(body, receive), send)
        finally:
            held.release()

    def _check(self, scope: Scope) -> None:
        headers = headers_of(scope)
        if scope["path"] in OPEN_PATHS:
            return
        if self._key is None:
            check_local(scope)
        elif not self._is_key(headers.get("authorization", "")):
            raise RequestError(_KEY_NEEDED, 401, code="invalid_api_key")
        if self.draining:
            raise RequestError("This server is shutting down; send the request to another one.", 503, retry_after=5)

    def _is_key(self, authorization: str) -> bool:
        """Return whether a header contains the key; takes the same time for every wrong one."""
        assert self._key is not None
        scheme, _, value = authorization.partition(" ")
        given = value.strip().encode("utf-8", "replace")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except (ValueError, binascii.Error):
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(key_digest(given), self._key)

    async def _body(self, scope: Scope, receive: Receive, held: _Held) -> bytes | None:
        """Return the body of a request; None if the client has gone.

        Raises:
            RequestError: if it is too large, too slow, or the server holds too many.
        """
        declared = headers_of(scope).get("content-length", "")
        if declared.isdigit() and len(declared) < 20:
            self._check_size(int(declared))
            held.add(int(declared))
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    self._check_size(len(body))
                    held.at_least(len(body))
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise RequestError(
                f"The body did not arrive within {self.limits.body_seconds:g} seconds; send it again.", 408
            ) from None

    async def _discard_body(self, scope: Scope, receive: Receive) -> None:
        """Read the rest of a body of moderate size: most clients read the response only after they have sent it."""
        if "expect" in headers_of(scope):
            return
        left = 4 * self.limits.body_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_SECONDS):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        return

    def _check_size(self, size: int) -> None:
        if size > self.limits.body_bytes:
            raise RequestError(f"The body is larger than {self.limits.body_bytes} bytes; send smaller images.", 413)


class _Held:
    """Bytes of one request that count towards the limit on all."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._bytes = 0

    def add(self, size: int) -> None:
        limits = self._gate.limits
        if self._gate._held + size > limits.all_bodies_bytes:
            raise RequestError("This server is reading too many large requests; try again later.", 503, retry_after=5)
        self._gate._held += size
        self._bytes += size

    def at_least(self, size: int) -> None:
        if size > self._bytes:
            self.add(size - self._bytes)

    def release(self) -> None:
        self._gate._held -= self._bytes
        self._bytes = 0


async def respond(send: Send, error: RequestError, path: str) -> None:
    """Send the response to a request that is refused."""
    content = json.dumps(error.body(path)).encode()
    # The rest of a body that was not read would be taken for the next request.
    headers = {"content-type": "application/json", "content-length": str(len(content)), "connection": "close"}
    pairs = [(name.encode(), value.encode()) for name, value in (headers | error.headers).items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})


def check_local(scope: Scope) -> None:
    """Refuse requests of other sites' web pages: without a key, only programs of this machine may use the server.

    A page of any site can send requests to this machine. The browser names the site in `Origin`. With DNS rebinding,
    the page reaches the server under the site's own name, which stands in `Host`.

    Args:
        scope: ASGI scope of the request.

    Raises:
        RequestError: if the request comes from such a page.
    """
    headers = headers_of(scope)
    host = _host_name(headers.get("host", ""))
    origin = headers.get("origin")
    if host not in LOOPBACK_NAMES or (origin is not None and _origin_name(origin) not in LOOPBACK_NAMES):
        raise RequestError(
            "This server answers only local programs; start it with --api-key to use it from elsewhere.", 403
        )


def _host_name(host: str) -> str:
    return _origin_name(f"//{host}")


def _origin_name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def key_digest(key: bytes) -> bytes:
    """Return the digest of an API key: keys of all lengths are compared in the same time."""
    return hashlib.sha256(key).digest()


def headers_of(scope: Scope) -> dict[str, str]:
    """Return the headers of a request by lower-case name."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body, then what the connection reports: that the client has gone."""
    given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
