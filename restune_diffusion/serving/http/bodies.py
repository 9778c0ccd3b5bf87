"""Bodies of requests: validation with one sentence for the first fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from .errors import RequestError

Body = TypeVar("Body", bound=BaseModel)
MAX_SEED = 2**63 - 1


Number = Annotated[float, Field(allow_inf_nan=False)]
"""Finite number."""


def read_body(body_class: type[Body], values: Mapping[str, Any]) -> Body:
    """Return the validated body of a request.

    Raises:
        RequestError: for the first fault.
    """
    try:
        return body_class.model_validate(values)
    except ValidationError as error:
        raise body_error(error.errors(include_url=False)) from error


def body_error(faults: Sequence[Mapping[str, Any]]) -> RequestError:
    """Return the refusal of a body for the first of pydantic's faults."""
    fault = faults[0]
    place = [str(part) for part in fault["loc"]]
    where = ".".join(place[1:] if place[:1] in (["body"], ["path"], ["query"]) else place)[:80]
    if fault["type"] == "json_invalid":
        return RequestError("The body is not valid JSON.")
    if not where:
        return RequestError('The body is not a JSON object; send `{"prompt": "a fox"}` as application/json.')
    if fault["type"] == "extra_forbidden":
        return RequestError(f"Unknown parameter `{where}`; leave it out.", param=where, code="unknown_parameter")
    if fault["type"] == "missing":
        return RequestError(f"The parameter `{where}` is missing.", param=where, code="missing_required_parameter")
    reason = fault["msg"].removeprefix("Value error, ")
    return RequestError(f"Invalid `{where}`: {reason[:1].lower()}{reason[1:]}.", param=where, code="invalid_value")


class NamedTuner(BaseModel, extra="forbid"):
    """Tuner of a request and its weight."""

    name: str
    weight: Number = 1.0


class GenerationBody(BaseModel, extra="forbid"):
    """Body of `POST /v1/images/generations`."""

    prompt: str = Field(min_length=1)
    model: str | None = None
    n: int | None = Field(default=1, ge=1)
    size: str | None = "auto"
    response_format: str | None = Field(default=None, pattern="^(b64_json|url)$")
    output_format: str | None = Field(default="png", pattern="^(png|jpeg|webp)$")
    output_compression: int | None = Field(default=None, ge=0, le=100)
    background: str | None = Field(default=None, pattern="^(auto|opaque)$")
    stream: bool | None = False
    partial_images: int | None = Field(default=0, ge=0, le=3)
    # Settings of other models, which change nothing here.
    quality: str | None = None
    style: str | None = None
    moderation: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    # Settings of this server, for `extra_body`.
    tuners: list[NamedTuner] | None = None
    conditions: dict[str, str] | None = None
    negative_prompt: str | None = None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    steps: int | None = Field(default=None, ge=1)
    guidance: Number | None = Field(default=None, ge=0, le=100)
    scheduler: str | None = None


class EditBody(GenerationBody):
    """Text fields of `POST /v1/images/edits`."""

    input_fidelity: str | None = None
    strength: Number | None = Field(default=None, gt=0, le=1)


class Txt2ImgBody(BaseModel, extra="ignore"):
    """Body of `POST /sdapi/v1/txt2img`; fields that change nothing here are ignored."""

    prompt: str = ""
    negative_prompt: str | None = ""
    seed: int | None = Field(default=-1, le=MAX_SEED)
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=1, ge=1)
    n_iter: int = Field(default=1, ge=1)
    cfg_scale: Number | None = Field(default=7.0, ge=0, le=100)
    width: int | None = Field(default=None, ge=1)
    height: int | None = Field(default=None, ge=1)
    send_images: bool = True
    override_settings: dict[str, Any] | None = None
    # Saving on the server: many clients ask for it in every request, so it is refused only without `send_images`.
    save_images: bool | None = False
    # Functions that this server does not have; a request that asks for one is refused.
    enable_hr: bool | None = False
    restore_faces: bool | None = False
    tiling: bool | None = False
    subseed_strength: Number | None = 0.0
    seed_resize_from_w: int | None = 0
    seed_resize_from_h: int | None = 0
    refiner_checkpoint: str | None = None
    infotext: str | None = None
    styles: list[Any] | None = None
    script_name: str | None = None
    alwayson_scripts: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: Any) -> Any:
        """Drop null fields, for which A1111 takes its defaults."""
        if not isinstance(values, Mapping):
            return values
        return {name: value for name, value in values.items() if value is not None}


class Img2ImgBody(Txt2ImgBody):
    """Body of `POST /sdapi/v1/img2img`."""

    init_images: list[str] = Field(min_length=1)
    denoising_strength: Number | None = Field(default=0.75, gt=0, le=1)
    # Filling the borders (2) and resizing the latents (3) are not supported.
    resize_mode: int | None = Field(default=0, ge=0, le=1)
    mask: str | None = None
    mask_blur: Number | None = Field(default=4, ge=0, le=256)
    # Latent noise (2) and nothing (3) are not supported.
    inpainting_fill: int | None = Field(default=0, ge=0, le=1)
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: int | None = Field(default=0, ge=0, le=4096)
    inpainting_mask_invert: bool | None = False
    include_init_images: bool | None = False


class PngInfoBody(BaseModel, extra="ignore"):
    """Body of `POST /sdapi/v1/png-info`."""

    image: str
