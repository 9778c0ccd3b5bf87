"""Multipart forms of OpenAI's `images.edit`."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile

from ..errors import RequestError
from ..limits import Limits

_FILES = {"image": "image", "image[]": "image", "mask": "mask"}
_MOST_FIELDS = 64


async def edit_values(request: Request, limits: Limits) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the text fields of a form, and its files `image` and `mask`.

    Raises:
        RequestError: if the form is malformed, or lacks the image.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise RequestError("The body is not a form; send multipart/form-data with `image` and `prompt`.")
    # The parser ignores a last part that is not complete.
    if not (await request.body()).rstrip().endswith(b"--" + options[b"boundary"] + b"--"):
        raise RequestError("The form is not complete; send it again.")
    values: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    async with request.form(max_files=4, max_fields=_MOST_FIELDS, max_part_size=limits.body_bytes) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                await _add_file(files, name, value)
            elif not name.startswith("tuners["):
                values[name] = value
        tuners = _tuners(form)
    if "image" not in files:
        raise RequestError(
            "The parameter `image` is missing; send it as a file.", param="image", code="missing_required_parameter"
        )
    for name in ("tuners", "conditions"):
        if name in values:
            values[name] = _json(name, values[name])
    # The official client writes absent values as empty text.
    present = {name: value for name, value in values.items() if value != ""}
    return present | ({"tuners": tuners} if tuners else {}), files


async def _add_file(files: dict[str, bytes], name: str, file: UploadFile) -> None:
    if name not in _FILES:
        raise RequestError(f"Unknown file `{name[:80]}`; send `image` and `mask`.", param=name[:80])
    if _FILES[name] in files:
        raise RequestError(f"`{_FILES[name]}` is given twice; this server edits one image at a time.", param=name)
    files[_FILES[name]] = await file.read()


def _tuners(form: FormData) -> list[dict[str, str]]:
    """Return the tuners of fields `tuners[][name]` and `tuners[][weight]`, as the official client writes a list."""
    names = [str(value) for value in form.getlist("tuners[][name]")]
    weights = [str(value) for value in form.getlist("tuners[][weight]")]
    if weights and len(weights) != len(names):
        raise RequestError("Give either every tuner of `tuners` a weight, or none.", param="tuners")
    if not weights:
        return [{"name": name} for name in names]
    return [{"name": name, "weight": weight} for name, weight in zip(names, weights, strict=True)]


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError(f"`{name}` is not valid JSON.", param=name) from None
