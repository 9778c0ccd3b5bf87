"""Routes of OpenAI's Images API: generations, edits and models."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ....imaging.rgb import to_rgb
from ....utils.errors import RestuneError
from ...requests import ImageRequest
from ...tickets import GeneratedImage, Ticket
from ..bodies import EditBody, GenerationBody, read_body
from ..errors import RequestError
from ..image_files import DEFAULT_QUALITY, FileFormat, encode_image, record_of
from ..model_names import BASE_NAME, TunerWeights, checked_tuners, tuners_of_model
from ..service import Service, cancel, events, finished
from ..uploads import decode_base64_image, decode_image, edit_mask, fitted
from .forms import edit_values

if TYPE_CHECKING:
    from PIL import Image

    from ...library import TunerEntry

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_NO_TOKENS = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


def openai_routes(service: Service) -> APIRouter:
    """Return the routes under `/v1`."""
    router = APIRouter(prefix="/v1", tags=["OpenAI Images"])

    @router.get("/models")
    def list_models() -> dict[str, Any]:
        models = [_base_model(service), *(_tuner_model(entry) for entry in service.entries())]
        return {"object": "list", "data": models}

    @router.get("/models/{name:path}")
    def retrieve_model(name: str) -> dict[str, Any]:
        if name in service.base_names:
            return _base_model(service)
        for entry in service.entries():
            if entry.name == name:
                return _tuner_model(entry) | {"thumbnail": entry.thumbnail}
        tuners_of_model(name, service.tuner_names(), service.base_names)
        return {"id": name, "object": "model", "created": 0, "owned_by": "restune"}

    @router.post("/images/generations")
    async def generate(body: GenerationBody, request: Request) -> Response:
        image_request = await run_in_threadpool(_request_of, service, body)
        return await _answer(service, body, image_request, request, "image_generation")

    @router.post("/images/edits")
    async def edit(request: Request) -> Response:
        values, files = await edit_values(request, service.limits)
        body = read_body(EditBody, values)
        image_request = await run_in_threadpool(_edit_request_of, service, body, files)
        return await _answer(service, body, image_request, request, "image_edit")

    return router


def _base_model(service: Service) -> dict[str, Any]:
    return {"id": BASE_NAME, "object": "model", "created": 0, "owned_by": "restune", "base": service.base.name}


def _tuner_model(entry: TunerEntry) -> dict[str, Any]:
    return {
        "id": entry.name,
        "object": "model",
        "created": int(entry.modified),
        "owned_by": "restune",
        "base": entry.base,
        "title": entry.title,
        "families": entry.families,
        "conditions": entry.conditions,
        "trigger_words": entry.trigger_words,
        "bytes": entry.bytes,
        "problem": entry.problem and entry.problem.replace(str(entry.path), entry.name),
    }


def _request_of(service: Service, body: GenerationBody, **images: Any) -> ImageRequest:
    """Return the engine's request for a body.

    Raises:
        RequestError: if the body exceeds the limits of the server, or names an unknown tuner.
    """
    limits = service.limits
    count = body.n or 1
    if count > limits.images:
        raise RequestError(f"`n` is {count}; this server generates {limits.images} images at most.", param="n")
    if body.stream and count > 1:
        raise RequestError("A streamed request generates one image; set `n` to 1.", param="n")
    if (body.steps or 0) > limits.steps:
        raise RequestError(f"`steps` is {body.steps}; this server allows {limits.steps}.", param="steps")
    for name in ("prompt", "negative_prompt"):
        if len(getattr(body, name) or "") > limits.prompt_characters:
            raise RequestError(f"`{name}` is longer than {limits.prompt_characters} characters.", param=name)
    size = _size(body.size, service)
    settings: dict[str, Any] = {
        "negative_prompt": body.negative_prompt or "",
        "seed": body.seed,
        "tuners": _tuners(service, body),
        "scheduler": body.scheduler,
        "preview_every": 0,
        **({} if size is None else {"width": size[0], "height": size[1]}),
        **{name: getattr(body, name) for name in ("steps", "guidance") if getattr(body, name) is not None},
        **images,
    }
    if body.conditions:
        settings["conditions"] = {
            name: to_rgb(decode_base64_image(content, limits, f"conditions.{name}"))
            for name, content in body.conditions.items()
        }
    request = ImageRequest(body.prompt, **settings)
    if body.stream and body.partial_images:
        request = ImageRequest(
            body.prompt, **settings | {"preview_every": _preview_every(request, body.partial_images)}
        )
    return request


def _edit_request_of(service: Service, body: EditBody, files: Mapping[str, bytes]) -> ImageRequest:
    """Return the engine's request for an edit: image-to-image, or inpainting with a mask."""
    image = decode_image(files["image"], service.limits, "image")
    mask = edit_mask(decode_image(files["mask"], service.limits, "mask"), image) if "mask" in files else None
    size = _size(body.size, service) or service.size_of(image)
    # An area to repaint starts from noise, as in diffusers' inpainting pipelines.
    strength = body.strength if body.strength is not None else 0.8 if mask is None else 1.0
    return _request_of(
        service,
        body,
        width=size[0],
        height=size[1],
        image=fitted(to_rgb(image), size),
        mask=None if mask is None else fitted(mask, size),
        strength=strength,
    )


def _tuners(service: Service, body: GenerationBody) -> TunerWeights:
    known = service.tuner_names()
    tuners = tuners_of_model(body.model, known, service.base_names)
    tuners += tuple((tuner.name, tuner.weight) for tuner in body.tuners or ())
    return checked_tuners(tuners, known, service.limits)


def _size(text: str | None, service: Service) -> tuple[int, int] | None:
    """Return width and height of a size such as `512x512`; None for `auto`."""
    if text in (None, "auto"):
        return None
    assert text is not None
    match = _SIZE.fullmatch(text)
    if match is None:
        raise RequestError(f"The size `{text[:40]}` is not valid; use `auto`, or for example `512x512`.", param="size")
    width, height = map(int, match.groups())
    service.check_size(width, height, "size")
    return width, height


def _preview_every(request: ImageRequest, wanted: int) -> int:
    steps = request.steps if request.image is None else int(request.steps * request.strength)
    return max(1, steps // (wanted + 1))


async def _answer(
    service: Service, body: GenerationBody, image_request: ImageRequest, request: Request, event: str
) -> Response:
    """Submit a request and return the response, as JSON or as a stream of events."""
    tickets = await run_in_threadpool(service.submit, image_request, body.n or 1)
    quality = body.output_compression if body.output_compression is not None else DEFAULT_QUALITY
    file_format = FileFormat(body.output_format or "png", quality)
    if body.stream:
        stream = _stream(service, tickets[0], file_format, body.partial_images or 0, event)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-store"})
    images = await finished(tickets, request, service)
    contents = [await run_in_threadpool(_encoded, service, each, file_format) for each in images]
    as_url = body.response_format == "url"
    data = [
        {"url": f"data:image/{file_format.name};base64,{content}"} if as_url else {"b64_json": content}
        for content in contents
    ]
    return JSONResponse(
        {
            "created": int(time.time()),
            "background": "opaque",
            "output_format": file_format.name,
            "size": _size_text(images[0].image),
            "data": [entry | {"seed": each.seed} for entry, each in zip(data, images, strict=True)],
            "usage": _NO_TOKENS,
        }
    )


async def _stream(
    service: Service, ticket: Ticket, file_format: FileFormat, partial_images: int, event: str
) -> AsyncIterator[str]:
    """Yield the events of a streamed request; its rows are freed when the client disconnects."""
    sent = 0
    try:
        async for _, progress in events([ticket]):
            if progress.preview is not None and sent < partial_images and progress.step < progress.steps:
                content = await run_in_threadpool(_file, progress.preview, file_format)
                kind = f"{event}.partial_image"
                extra = {"partial_image_index": sent}
                yield _event(kind, _described(progress.preview, content, file_format) | extra)
                sent += 1
        generated = ticket.result(0)
        content = await run_in_threadpool(_encoded, service, generated, file_format)
        extra_facts = {"usage": _NO_TOKENS, "seed": generated.seed}
        yield _event(f"{event}.completed", _described(generated.image, content, file_format) | extra_facts)
    except RestuneError as error:
        yield service.refusal(error).openai_event()
    except asyncio.CancelledError:
        raise
    finally:
        cancel([ticket])


def _described(image: Image.Image, content: str, file_format: FileFormat) -> dict[str, Any]:
    return {
        "b64_json": content,
        "created_at": int(time.time()),
        "size": _size_text(image),
        "quality": "auto",
        "background": "opaque",
        "output_format": file_format.name,
    }


def _event(kind: str, facts: Mapping[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **facts})}\n\n"


def _encoded(service: Service, generated: GeneratedImage, file_format: FileFormat) -> str:
    content = encode_image(generated.image, file_format, *record_of(generated, service.base))
    return base64.b64encode(content).decode()


def _file(image: Image.Image, file_format: FileFormat) -> str:
    return base64.b64encode(encode_image(image, file_format, {}, "")).decode()


def _size_text(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
