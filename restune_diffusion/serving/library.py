"""Tuner library: a folder of tuner files that requests name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TunerEntry:
    """Tuner file of a library.

    Args:
        name: name of the tuner: the path inside the folder without the suffix, with `/` between folders.
        path: path of the file.
        version: changes whenever the file changes.
        bytes: size of the file.
        modified: modification time in seconds since 1970.
        families: families of the tuner's parts: `skip`, `bypass`, `res`, `control`, `text`, or `lora` for a file of
            another program.
        conditions: names of the condition images that the tuner takes.
        trigger_words: words that prompts need for the tuner to act as trained; placeholder tokens among them.
        base: name of the base that the tuner was trained on, if the file records it.
        title: title of the tuner, if the file has one.
        thumbnail: data URL of a thumbnail, if the file has one.
        problem: reason why the tuner cannot be used; None if the header is valid.
    """

    name: str
    path: Path
    version: str
    bytes: int
    modified: float
    families: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    trigger_words: tuple[str, ...] = ()
    base: str | None = None
    title: str | None = None
    thumbnail: str | None = None
    problem: str | None = None


class TunerLibrary:
    """Folder of tuner files: own files, and LoRA files of diffusers and kohya's sd-scripts.

    A new or changed file is used without a restart. Nothing outside the folder can be named. Safe to use from any
    thread.

    Args:
        folder: the folder; its subfolders are included.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        raise NotImplementedError

    def names(self) -> list[str]:
        """Return the names of all tuners, also of broken ones, in alphabetical order."""
        raise NotImplementedError

    def list(self) -> list[TunerEntry]:
        """Return the entries of all tuner files, also of broken ones, in alphabetical order."""
        raise NotImplementedError

    def entry(self, name: str) -> TunerEntry:
        """Return the entry of a tuner.

        Raises:
            TunerNameError: if the library has no tuner of this name.
        """
        raise NotImplementedError
