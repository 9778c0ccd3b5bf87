"""Refusals of the HTTP API, and their bodies in the shape of each API."""

from __future__ import annotations

import json
from typing import Any

from ...utils.display import printable
from ...utils.errors import RestuneError

A1111_PREFIX = "/sdapi"
_LONGEST = 500
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class RequestError(RestuneError):
    """A request that is refused.

    Args:
        message: one sentence with the cause and the remedy.
        status: HTTP status.
        param: name of the parameter at fault.
        code: OpenAI's code of the error.
        retry_after: seconds after which a client may try again.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(printable(" ".join(message.split()), _LONGEST))
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of the response."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return headers | ({"www-authenticate": 'Basic realm="restune", Bearer'} if self.status == 401 else {})

    def body(self, path: str) -> dict[str, Any]:
        """Return the body of the response in the shape of the API that owns a path."""
        return self.a1111_body() if path.startswith(A1111_PREFIX) else self.openai_body()

    def openai_body(self) -> dict[str, Any]:
        """Return the body in OpenAI's shape."""
        error_type = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": error_type, "param": self.param, "code": self.code}}

    def openai_event(self) -> str:
        """Return the server-sent event that ends a stream of OpenAI's API."""
        return f"event: error\ndata: {json.dumps({'type': 'error', **self.openai_body()})}\n\n"

    def a1111_body(self) -> dict[str, Any]:
        """Return the body in A1111's shape."""
        return {"error": "HTTPException", "detail": str(self), "body": "", "errors": ""}


def unknown_model(name: str) -> RequestError:
    """Return the refusal of a model name."""
    return RequestError(
        f"The model `{name}` does not exist; GET /v1/models lists the models.",
        404,
        param="model",
        code="model_not_found",
    )
