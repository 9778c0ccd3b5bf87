"""ASGI middleware before the page: who may use it, and what a request may ask for."""

from __future__ import annotations

import hmac
import math
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ...serving.http.errors import RequestError
from ...serving.http.gate import Application, Receive, Scope, Send, check_local, headers_of, key_digest
from .login_page import login_page
from .rules import JOIN, PageRules
from .sessions import Attempts, Sessions

_COOKIE = "restune_session"
_MOST_LOGIN_BYTES = 8192
_MOST_EVENT_BYTES = 64 << 20
# Gradio's page has scripts and styles inline, and builds functions from text; everything comes from this server.
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: "
        "blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_REPLACED = frozenset(name.encode() for name in _HEADERS)


class StudioGate:
    """Gate of the page: refuses a request before Gradio sees it.

    Without a password only pages of this machine may use the studio. With one, every route but the login needs the
    cookie of a session.

    Args:
        app: the application.
        digest: digest of the password, from the function `key_digest`; None without a password.
        rules: checks of routes and files.
    """

    def __init__(self, app: Application, digest: bytes | None, rules: PageRules) -> None:
        self.app = app
        self._digest = digest
        self._rules = rules
        self._sessions, self._attempts = Sessions(), Attempts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection of the server."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            await self._answer(scope, receive, send)
        except RequestError as error:
            text = {"content-type": "text/plain; charset=utf-8", **error.headers}
            text.pop("www-authenticate", None)
            await _respond(send, error.status, str(error).encode(), text)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = headers_of(scope)
        path, method = scope["path"], scope["method"]
        if self._digest is None:
            check_local(scope)
        else:
            _check_own_page(headers, method)
            if path in ("/login", "/logout") and method == "POST":
                await self._log_in_or_out(scope, headers, receive, send)
                return
            if not self._sessions.is_open(_token(scope, headers)):
                if path in ("/", "/login"):
                    await _respond(send, 401, login_page(), _HTML)
                    return
                raise RequestError("The studio needs its password; reload the page.", 401)
        self._rules.check_path(path)
        if path.rstrip("/") == JOIN:
            body = await _body(receive, _MOST_EVENT_BYTES)
            self._rules.check_body(body)
            receive = _replayed(body, receive)
        await self.app(scope, receive, _with_headers(send))

    async def _log_in_or_out(self, scope: Scope, headers: Mapping[str, str], receive: Receive, send: Send) -> None:
        assert self._digest is not None
        if scope["path"] == "/logout":
            self._sessions.close(_token(scope, headers))
            await _respond(
                send, 303, b"", {"location": "/", "set-cookie": f"{_cookie_name(scope)}=; Max-Age=0; Path=/"}
            )
            return
        client = (scope.get("client") or ("", 0))[0]
        body = await _body(receive, _MOST_LOGIN_BYTES)
        # Checked after the body is read, so that slow requests cannot be prepared at once and sent together.
        if wait := math.ceil(self._attempts.wait(client)):
            problem = f"There were too many wrong passwords; try again in {wait} seconds."
            await _respond(send, 429, login_page(problem), {**_HTML, "retry-after": str(wait)})
            return
        password = parse_qs(body.decode("latin-1"), encoding="utf-8").get("password", [""])[0]
        if not hmac.compare_digest(key_digest(password.encode("utf-8", "replace")), self._digest):
            self._attempts.note_wrong(client)
            await _respond(send, 401, login_page("This is not the password; try again."), _HTML)
            return
        self._attempts.note_right(client)
        cookie = f"{_cookie_name(scope)}={self._sessions.open()}; HttpOnly; SameSite=Strict; Path=/; Max-Age=604800"
        await _respond(send, 303, b"", {"location": "/", "set-cookie": cookie})


_HTML = {"content-type": "text/html; charset=utf-8", "cache-control": "no-store"}


def _check_own_page(headers: Mapping[str, str], method: str) -> None:
    """Raise `RequestError` for a request that a page of another site sends with this site's cookie."""
    origin = headers.get("origin")
    foreign = origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
    if foreign or (method != "GET" and headers.get("sec-fetch-site") == "cross-site"):
        raise RequestError("The studio answers only its own page; open it by its own address.", 403)


def _cookie_name(scope: Scope) -> str:
    """Return the name of the cookie: browsers send cookies to all ports of a machine."""
    return f"{_COOKIE}_{(scope.get('server') or ('', 0))[1]}"


def _token(scope: Scope, headers: Mapping[str, str]) -> str:
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(_cookie_name(scope))
    except CookieError:
        return ""
    return "" if cookie is None else cookie.value


async def _body(receive: Receive, most: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > most:
            raise RequestError("The request is too large.", 413)
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body, then what the connection reports."""
    messages: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return messages.pop() if messages else await receive()

    return again


def _with_headers(send: Send) -> Send:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message.get("headers", []) if pair[0].lower() not in _REPLACED]
            added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            message = {**message, "headers": [*kept, *added]}
        await send(message)

    return sending


async def _respond(send: Send, status: int, content: bytes, headers: Mapping[str, str]) -> None:
    pairs = {**headers, "content-length": str(len(content)), "connection": "close"}
    start = {"type": "http.response.start", "status": status}
    sending = _with_headers(send)
    await sending({**start, "headers": [(name.encode(), value.encode()) for name, value in pairs.items()]})
    await sending({"type": "http.response.body", "body": content})
