"""Tuners that a request names: in a model name, in a list, or as `<lora:NAME:WEIGHT>` in the prompt."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from typing import TypeAlias

from .errors import RequestError, unknown_model
from .limits import Limits

TunerWeights: TypeAlias = tuple[tuple[str, float], ...]
"""Names and weights of tuners."""

BASE_NAME = "base"
"""Model name of the base without tuners."""
LORA_TAG = re.compile(r"<(?:lora|lyco):([^<>]*)>", re.IGNORECASE)


def tuners_of_model(model: str | None, known: Collection[str], base_names: Collection[str]) -> TunerWeights:
    """Return the tuners of a model name such as `watercolor`, `watercolor:0.8+ink:0.4` or `base`.

    Args:
        model: the model name; None is the base.
        known: names of the tuners in the library. A name with `+` or `:` is recognized only if it is the
            whole model name.
        base_names: names of the base.

    Raises:
        RequestError: if a part is not a known name, or a weight is not a number.
    """
    if model is None or model in base_names:
        return ()
    if model in known:
        return ((model, 1.0),)
    tuners: list[tuple[str, float]] = []
    for part in model.split("+"):
        name, colon, text = part.rpartition(":")
        if part in known or not colon:
            name, weight = part, 1.0
        else:
            weight = _number(text, f"The weight `{text}` of the model `{model}`", "model")
        if name in base_names and not colon:
            continue
        if name not in known:
            raise unknown_model(name)
        tuners.append((name, weight))
    return tuple(tuners)


def tuners_of_prompt(prompt: str, known: Collection[str]) -> tuple[str, TunerWeights]:
    """Return a prompt without its `<lora:NAME:WEIGHT>` tags, and the tuners that they name.

    Args:
        prompt: prompt in A1111's syntax.
        known: names of the tuners in the library.

    Raises:
        RequestError: if a tag is malformed, or names an unknown tuner.
    """
    tuners = tuple(_tuner_of_tag(tag, known) for tag in LORA_TAG.findall(prompt))
    return re.sub(r"[ \t]{2,}", " ", LORA_TAG.sub("", prompt)).strip() if tuners else prompt, tuners


def checked_tuners(tuners: Iterable[tuple[str, float]], known: Collection[str], limits: Limits) -> TunerWeights:
    """Return the tuners of a request.

    Raises:
        RequestError: if one is unknown or named twice, there are too many, or a weight is too large.
    """
    checked = tuple(tuners)
    names = [name for name, _ in checked]
    if len(checked) > limits.tuners:
        raise RequestError(
            f"The request names {len(checked)} tuners; this server allows {limits.tuners}.", param="tuners"
        )
    for name, weight in checked:
        if name not in known:
            raise RequestError(
                f"The tuner `{name}` does not exist; GET /v1/models lists the tuners.",
                404,
                param="tuners",
                code="model_not_found",
            )
        if names.count(name) > 1:
            raise RequestError(f"The tuner `{name}` is named twice; name it once.", param="tuners")
        if not math.isfinite(weight) or abs(weight) > limits.weight:
            raise RequestError(
                f"The weight {weight:g} of the tuner `{name}` is not allowed; use a number from {-limits.weight:g} to "
                f"{limits.weight:g}.",
                param="tuners",
            )
    return checked


def _tuner_of_tag(tag: str, known: Collection[str]) -> tuple[str, float]:
    if tag.strip() in known:
        return tag.strip(), 1.0
    name, *values = (part.strip() for part in tag.split(":"))
    if len(values) > 1:
        raise RequestError(
            f"The tag `<lora:{tag}>` has {len(values)} weights; use one, as in `<lora:{name}:0.8>`.", param="prompt"
        )
    if name not in known:
        raise RequestError(
            f"The tuner `{name}` of the tag `<lora:{tag}>` does not exist; GET /sdapi/v1/loras lists the tuners.",
            404,
            param="prompt",
        )
    return name, _number(values[0], f"The weight of the tag `<lora:{tag}>`", "prompt") if values else 1.0


def _number(text: str, subject: str, param: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not text.isascii():
        raise RequestError(f"{subject} is not a number; write for example `watercolor:0.8`.", param=param)
    return value
