"""Whether a tuner fits the base of the page, and why not."""

from __future__ import annotations

import functools

from ...backbones.description import BaseInfo
from ...serving.library import TunerEntry
from ...utils.errors import RestuneError


@functools.lru_cache(maxsize=4)
def base_structure(base: str) -> BaseInfo | str:
    """Return the structure of a base from its config, or the reason why it cannot be read."""
    from ...conversion.bases import describe_checkpoint

    try:
        return describe_checkpoint(base)
    except RestuneError as error:
        return str(error)


def problem_of(entry: TunerEntry, base: str) -> str | None:
    """Return the sentence why a tuner cannot be used with a base; None if nothing is known to be wrong.

    Args:
        entry: the tuner.
        base: path or id of the base.
    """
    from ...storage.header import read_header

    if entry.problem is not None:
        return entry.problem
    structure = base_structure(base)
    if isinstance(structure, str):
        return structure
    if entry.families == ("lora",):
        return None
    try:
        info = read_header(entry.path)
        info.base.check_fits(structure)
        info.base.check_text_fits(structure.text)
    except RestuneError as error:
        return str(error).replace(str(entry.path), "The file")
    return None
