"""Who may use the page: its own pages on this machine without a password, or everyone who knows it."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ..serving.http.errors import RequestError
from ..serving.http.gate import check_local, key_digest

USER = "restune"


def check_password(digest: bytes) -> Callable[[str, str], bool]:
    """Return the function that Gradio calls with the name and the password of its login page.

    Args:
        digest: digest of the password.
    """

    def is_right(user: str, password: str) -> bool:
        given = key_digest(password.encode("utf-8", "replace"))
        return hmac.compare_digest(given, digest) and user == USER

    return is_right


class LocalPagesOnly:
    """ASGI middleware of a studio without a password: refuse the requests of other sites' pages.

    Args:
        app: the application.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        """Handle one connection of the server."""
        if scope["type"] == "http":
            try:
                check_local(scope)
            except RequestError as error:
                head = {"type": "http.response.start", "status": error.status, "headers": []}
                await send({**head, "headers": [(b"content-type", b"text/plain; charset=utf-8")]})
                await send({"type": "http.response.body", "body": str(error).encode()})
                return
        await self.app(scope, receive, send)
