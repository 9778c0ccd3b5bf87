"""Routes of the page that exist, and files that a request may name."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...serving.http.errors import RequestError

# What Gradio's page in the browser asks for. Gradio has more routes, some of them without a check of the password:
# they fetch addresses elsewhere, describe the API, edit the program, or list what others did.
_ROUTES = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/pwa_icon(/\d+)?"
    r"|/(assets|static|svelte)/.+"
    r"|/gradio_api/(queue/(join|data)|upload|upload_progress|heartbeat/[\w-]+|cancel|reset|app_id|startup-events"
    r"|theme\.css|info|file=.+)/?",
    re.DOTALL,
)
JOIN = "/gradio_api/queue/join"
_FILE = "/gradio_api/file="
_MOST_DEPTH = 64
# No SVG and no HTML: a browser runs the scripts in them.
_IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"})


class PageRules:
    """Checks of a request to the page.

    Args:
        cache: folder of uploaded files and of copies of shown files; only these can be inputs.
        image_folders: folders whose images are also shown.
    """

    def __init__(self, cache: Path, image_folders: Sequence[Path] = ()) -> None:
        self._cache = cache.resolve()
        self._image_folders = tuple(folder.resolve() for folder in image_folders)

    def check_path(self, path: str) -> None:
        """Check the path of a request.

        Raises:
            RequestError: if the page has no such route, or the path names a file that may not be read.
        """
        if not _ROUTES.fullmatch(path):
            raise RequestError("The studio has no such page.", 404)
        if path.startswith(_FILE):
            self._check_file(path.removeprefix(_FILE), shown=True)

    def check_body(self, body: bytes) -> None:
        """Check the files that the inputs of an event name: only those that were uploaded, or shown before.

        Raises:
            RequestError: if an input names another file or an address.
        """
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            raise RequestError("The request is not valid JSON; reload the page.", 400) from None
        for file in _named_files(value):
            self._check_file(file)

    def _check_file(self, path: object, *, shown: bool = False) -> None:
        """Raise `RequestError` unless a path, with links followed, is that of a file that may be used, or shown."""
        if isinstance(path, str) and "\0" not in path and Path(path).is_absolute():
            with contextlib.suppress(OSError, RuntimeError):
                resolved = Path(path).resolve()
                if resolved.is_relative_to(self._cache):
                    return
                is_image = resolved.suffix.lower() in _IMAGE_SUFFIXES
                if shown and is_image and any(resolved.is_relative_to(folder) for folder in self._image_folders):
                    return
        raise RequestError("This file was not uploaded here and is not shown on the page.", 403)


def _named_files(value: Any, depth: int = 0) -> Iterator[object]:
    """Yield the paths in all objects that Gradio can take for a file."""
    if depth > _MOST_DEPTH:
        raise RequestError("The request is nested too deeply; reload the page.", 400)
    if isinstance(value, dict):
        if value.get("path") is not None:
            yield value["path"]
        for each in value.values():
            yield from _named_files(each, depth + 1)
    elif isinstance(value, list):
        for each in value:
            yield from _named_files(each, depth + 1)
