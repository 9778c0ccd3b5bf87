"""ASGI application of the HTTP API."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from ...utils.errors import RestuneError
from ...utils.version import __version__
from .a1111.routes import a1111_routes
from .bodies import body_error
from .errors import RequestError
from .gate import Application, Gate
from .metrics import Metrics
from .openai.routes import openai_routes
from .service import Service


class ServingApp:
    """ASGI application: routes of both APIs, health, metrics, and the gate before them.

    Args:
        service: engine, library and limits.
        key_digest: digest of the API key that requests need; None lets local programs in.
    """

    def __init__(self, service: Service, key_digest: bytes | None = None) -> None:
        self.service = service
        self.metrics = metrics = Metrics(service.engine)
        api = _api(service, metrics)
        self.behind_gate: Application = metrics.counted(api)
        """Application for requests that another gate has let in."""
        self.gate = Gate(api, key_digest, service.limits)
        self._app: Application = metrics.counted(self.gate)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one connection of the server."""
        await self._app(scope, receive, send)

    def drain(self) -> None:
        """Refuse new requests; those in progress are finished."""
        self.service.ready = False
        self.gate.draining = True


def _api(service: Service, metrics: Metrics) -> FastAPI:
    # The pages of FastAPI's documentation load scripts from another host.
    api = FastAPI(title="restune-diffusion", version=__version__, docs_url=None, redoc_url=None)
    api.include_router(openai_routes(service))
    api.include_router(a1111_routes(service))

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/readyz")
    async def readyz() -> JSONResponse:
        if service.ready and service.engine.alive:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready"}, 503)

    @api.get("/metrics")
    def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @api.exception_handler(RestuneError)
    async def refused(request: Request, error: RestuneError) -> JSONResponse:
        return _response(request, service.refusal(error))

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        refusal = body_error(error.errors())
        # A1111 answers 422, and OpenAI 400.
        refusal.status = 422 if request.url.path.startswith("/sdapi") else 400
        return _response(request, refusal)

    @api.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        messages = {
            404: "There is no such path; the paths are under /v1 and /sdapi/v1.",
            405: f"The path does not support {request.method[:16]}.",
        }
        detail = messages.get(error.status_code) or f"The request cannot be read: {error.detail}"
        return _response(request, RequestError(detail.rstrip(".") + ".", error.status_code))

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return _response(request, RequestError("The server failed on this request; its log has the reason.", 500))

    return api


def _response(request: Request, error: RequestError) -> JSONResponse:
    return JSONResponse(error.body(request.url.path), error.status, error.headers)
