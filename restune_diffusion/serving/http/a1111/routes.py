"""Routes of A1111's API: text to image, image to image, options, lists, progress and interruption."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Body, Request
from fastapi.concurrency import run_in_threadpool

from ....imaging.generation_record import parse_a1111, text_of_image
from ....imaging.rgb import to_rgb
from ...requests import ImageRequest
from ...tickets import GeneratedImage, Progress, Ticket
from ..bodies import Img2ImgBody, PngInfoBody, Txt2ImgBody
from ..errors import RequestError
from ..image_files import FileFormat, encode_image, record_of
from ..model_names import checked_tuners, tuners_of_prompt
from ..service import Service, finished
from ..uploads import decode_base64_image
from .inpaint import Repaint, repaint, resized
from .options import Options, refuse_missing_functions
from .samplers import samplers, schedule_types, scheduler_of

if TYPE_CHECKING:
    from PIL import Image

# Lists of functions that this server does not have; clients ask for them when they start.
_EMPTY_LISTS = (
    "upscalers", "latent-upscale-modes", "sd-vae", "hypernetworks", "face-restorers", "realesrgan-models",
    "prompt-styles", "script-info", "extensions",
)  # fmt: skip


@dataclass(eq=False)
class Job:
    """Images of one A1111 request that are being generated."""

    tickets: list[Ticket]
    started: float = field(default_factory=time.time)
    preview: Image.Image | None = None
    interrupted: bool = False

    def watch(self) -> None:
        """Keep the last preview of the first image."""
        self.tickets[0].listen(self._keep)

    def _keep(self, progress: Progress) -> None:
        self.preview = progress.preview or self.preview

    @property
    def steps(self) -> tuple[int, int]:
        """Denoising steps that are done, and all of them."""
        states = [ticket.progress for ticket in self.tickets]
        return sum(state.step for state in states), sum(state.steps for state in states)

    def interrupt(self) -> None:
        """Cancel the images that are not finished."""
        self.interrupted = True
        for ticket in self.tickets:
            ticket.cancel()


@dataclass(eq=False)
class Wanted:
    """Engine's request and what the response needs beside it."""

    request: ImageRequest
    count: int
    prompt: str
    """The prompt with its tags."""
    area: Repaint | None = None


def a1111_routes(service: Service) -> APIRouter:
    """Return the routes under `/sdapi/v1`."""
    router = APIRouter(prefix="/sdapi/v1", tags=["A1111"])
    options = Options(service)
    jobs: list[Job] = []

    @router.post("/txt2img")
    async def txt2img(body: Txt2ImgBody, request: Request) -> dict[str, Any]:
        wanted = await run_in_threadpool(_text_request, service, options, body)
        return await _answer(service, jobs, body, wanted, request)

    @router.post("/img2img")
    async def img2img(body: Img2ImgBody, request: Request) -> dict[str, Any]:
        wanted = await run_in_threadpool(_image_request, service, options, body)
        return await _answer(service, jobs, body, wanted, request)

    @router.get("/progress")
    async def progress(skip_current_image: bool = False) -> dict[str, Any]:
        job = jobs[0] if jobs else None
        return await run_in_threadpool(_progress, job, len(jobs), with_image=not skip_current_image)

    @router.post("/interrupt")
    @router.post("/skip")
    def interrupt() -> dict[str, Any]:
        for job in tuple(jobs):
            job.interrupt()
        return {}

    @router.post("/png-info")
    def png_info(body: PngInfoBody) -> dict[str, Any]:
        image = decode_base64_image(body.image, service.limits, "image")
        text = text_of_image(image)
        prompt, negative, pairs = parse_a1111(text)
        parameters = {"Prompt": prompt, "Negative prompt": negative, **pairs} if text else {}
        return {"info": text, "items": {"parameters": text} if text else {}, "parameters": parameters}

    @router.get("/options")
    def get_options() -> dict[str, Any]:
        return options.values()

    @router.post("/options")
    def set_options(body: dict[str, Any] = Body()) -> dict[str, Any]:  # noqa: B008 (FastAPI reads the default)
        options.change(body)
        return {}

    @router.get("/loras")
    def loras() -> list[dict[str, Any]]:
        return [
            {
                "name": entry.name,
                "alias": entry.title or entry.name,
                "path": f"{entry.name}{entry.path.suffix}",
                "metadata": {
                    "families": ", ".join(entry.families),
                    "trigger_words": ", ".join(entry.trigger_words),
                    "base": entry.base,
                },
            }
            for entry in service.entries()
            if entry.problem is None
        ]

    _add_lists(router, service)
    return router


def _add_lists(router: APIRouter, service: Service) -> None:
    """Add the routes that list what the server has."""
    base = dict.fromkeys(("title", "model_name", "filename"), service.base.name)
    answers: dict[str, Any] = {
        "samplers": samplers(),
        "schedulers": schedule_types(),
        "sd-models": [{**base, "hash": None, "sha256": None, "config": None}],
        "scripts": {"txt2img": [], "img2img": []},
        "embeddings": {"loaded": {}, "skipped": {}},
        "cmd-flags": {},
        "memory": {"ram": {}, "cuda": {}},
        **{name: [] for name in _EMPTY_LISTS},
    }
    for name, answer in answers.items():
        router.add_api_route(f"/{name}", _always(answer), methods=["GET"], response_model=None)
    for name in ("refresh-loras", "refresh-checkpoints"):
        router.add_api_route(f"/{name}", _always({}), methods=["POST"], response_model=None)


def _always(answer: Any) -> Callable[[], Any]:
    def endpoint():  # type: ignore[no-untyped-def]  # FastAPI evaluates annotations
        return answer

    return endpoint


def _text_request(service: Service, options: Options, body: Txt2ImgBody, **images: Any) -> Wanted:
    """Return the engine's request for a body.

    Raises:
        RequestError: if the body exceeds the limits, or asks for a function that this server does not have.
    """
    limits = service.limits
    refuse_missing_functions(body, service)
    count = body.batch_size * body.n_iter
    if count > limits.images:
        raise RequestError(f"{count} images are too many; this server generates {limits.images} at most.")
    if (body.steps or 0) > limits.steps:
        raise RequestError(f"`steps` is {body.steps}; this server allows {limits.steps}.", param="steps")
    if max(len(body.prompt), len(body.negative_prompt or "")) > limits.prompt_characters:
        raise RequestError(f"The prompt is longer than {limits.prompt_characters} characters.", param="prompt")
    known = service.tuner_names()
    prompt, tuners = tuners_of_prompt(body.prompt, known)
    width, height = _size(service, body)
    settings: dict[str, Any] = images if body.steps is None else {"steps": body.steps, **images}
    request = ImageRequest(
        prompt,
        negative_prompt=body.negative_prompt or "",
        seed=body.seed if body.seed is not None and body.seed >= 0 else None,
        width=width,
        height=height,
        guidance=7.0 if body.cfg_scale is None else body.cfg_scale,
        scheduler=scheduler_of(body.sampler_name or body.sampler_index, body.scheduler),
        tuners=checked_tuners(tuners, known, limits),
        preview_every=options.preview_every,
        **settings,
    )
    return Wanted(request, count, body.prompt)


def _size(service: Service, body: Txt2ImgBody) -> tuple[int, int]:
    width, height = body.width or service.base.size[0], body.height or service.base.size[1]
    service.check_size(width, height, "width")
    return width, height


def _image_request(service: Service, options: Options, body: Img2ImgBody) -> Wanted:
    if len(body.init_images) > 1:
        raise RequestError("`init_images` has several images; send one.", param="init_images")
    image = to_rgb(decode_base64_image(body.init_images[0], service.limits, "init_images"))
    strength = 0.75 if body.denoising_strength is None else body.denoising_strength
    size = _size(service, body)
    if not body.mask:
        settings = {"image": resized(image, size, body.resize_mode), "strength": strength}
        return _text_request(service, options, body, **settings)
    area = repaint(image, decode_base64_image(body.mask, service.limits, "mask"), body, size)
    settings = {"image": area.image, "mask": area.mask, "strength": strength}
    wanted = _text_request(service, options, body, **settings)
    wanted.area = area
    return wanted


async def _answer(
    service: Service, jobs: list[Job], body: Txt2ImgBody, wanted: Wanted, request: Request
) -> dict[str, Any]:
    """Generate the images of a request and return the response."""
    job = Job(await run_in_threadpool(service.submit, wanted.request, wanted.count))
    jobs.append(job)
    try:
        job.watch()
        images = await _images(service, job, request)
    finally:
        jobs.remove(job)
    return await run_in_threadpool(_response, service, body, wanted, images)


async def _images(service: Service, job: Job, request: Request) -> list[GeneratedImage]:
    """Return the images of a job; those that were finished, if it was interrupted."""
    try:
        return await finished(job.tickets, request, service)
    except RequestError:
        if not job.interrupted:
            raise
    done: list[GeneratedImage] = []
    for ticket in job.tickets:
        if ticket.progress.state == "done":
            done.append(ticket.result(0))
    return done


def _response(service: Service, body: Txt2ImgBody, wanted: Wanted, images: list[GeneratedImage]) -> dict[str, Any]:
    records = [record_of(each, service.base, wanted.prompt) for each in images]
    texts = [text for _, text in records]
    contents = [
        encode_image(each.image if wanted.area is None else wanted.area.pasted(each.image), FileFormat(), *record)
        for each, record in zip(images, records, strict=True)
    ]
    encoded = [base64.b64encode(content).decode() for content in contents] if body.send_images else []
    return {
        "images": encoded,
        "parameters": body.model_dump(
            exclude={"init_images", "mask", "override_settings", "styles", "alwayson_scripts"}
        ),
        "info": json.dumps(_info(service, wanted, images, texts)),
    }


def _info(service: Service, wanted: Wanted, images: list[GeneratedImage], texts: list[str]) -> dict[str, Any]:
    request, seeds = wanted.request, [each.seed for each in images]
    return {
        "prompt": wanted.prompt,
        "all_prompts": [wanted.prompt] * len(images),
        "negative_prompt": request.negative_prompt,
        "all_negative_prompts": [request.negative_prompt] * len(images),
        "seed": seeds[0] if seeds else -1,
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * len(images),
        "subseed_strength": 0,
        "width": request.width,
        "height": request.height,
        "sampler_name": request.scheduler or service.base.sampler,
        "cfg_scale": request.guidance,
        "steps": request.steps,
        "batch_size": wanted.count,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": service.base.name,
        "sd_model_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": request.strength if request.image is not None else None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "interrupted": len(images) < wanted.count,
    }


def _progress(job: Job | None, count: int, *, with_image: bool) -> dict[str, Any]:
    """Return the answer of `/sdapi/v1/progress` for the oldest request."""
    done, steps = (0, 0) if job is None else job.steps
    fraction = done / steps if steps else 0.0
    seconds = 0.0 if job is None else time.time() - job.started
    image = None
    if job is not None and job.preview is not None and with_image:
        image = base64.b64encode(encode_image(job.preview, FileFormat(), {}, "")).decode()
    state = {
        "skipped": False,
        "interrupted": job is not None and job.interrupted,
        "stopping_generation": False,
        "job": "" if job is None else "scripts_txt2img",
        "job_count": count,
        "job_timestamp": "0" if job is None else time.strftime("%Y%m%d%H%M%S", time.localtime(job.started)),
        "job_no": 0,
        "sampling_step": done,
        "sampling_steps": steps,
    }
    eta = seconds / fraction - seconds if fraction else 0.0
    return {"progress": fraction, "eta_relative": eta, "state": state, "current_image": image, "textinfo": None}
