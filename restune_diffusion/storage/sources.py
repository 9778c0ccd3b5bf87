"""Locate a tuner file on disk or on the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from ..utils.errors import TunerFileError
from .base_files.location import is_hub_id

TUNER_WEIGHT_NAME = "pytorch_tuner_weights.safetensors"


def tuner_file(
    source: str | os.PathLike[str],
    weight_name: str | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool | None = None,
) -> Path:
    """Return the path of a tuner file; download it if the source is a repository id and not a local file or folder.

    The arguments are those of `RestuneLoaderMixin.load_tuner_weights`.

    Raises:
        TunerFileError: if the file is neither on disk nor on the Hub.
    """
    return local_tuner_file(source, weight_name, subfolder) or _download(
        str(source), weight_name, subfolder, revision, token, cache_dir, local_files_only
    )


def local_tuner_file(
    source: str | os.PathLike[str], weight_name: str | None = None, subfolder: str | None = None
) -> Path | None:
    """Return the tuner file at a local path or in a local folder, or None if the path does not exist."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        return None
    folder = path / (subfolder or "")
    named = folder / (weight_name or TUNER_WEIGHT_NAME)
    if named.is_file():
        return named
    found = sorted(folder.glob("*.safetensors")) if weight_name is None else []
    if len(found) == 1:
        return found[0]
    raise TunerFileError(
        f"{folder} contains {len(found)} safetensors files{_listed(found)}; select one with weight_name."
        if weight_name is None
        else f"There is no {weight_name} in {folder}."
    )


def _listed(paths: list[Path]) -> str:
    return f" ({', '.join(path.name for path in paths)})" if paths else ""


def _download(
    repository: str,
    weight_name: str | None,
    subfolder: str | None,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool | None,
) -> Path:
    # A mistyped local path must not cause a network call.
    if not is_hub_id(repository):
        raise TunerFileError(f"There is no tuner file at {repository}.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(
            hf_hub_download(
                repository,
                weight_name or TUNER_WEIGHT_NAME,
                subfolder=subfolder,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=bool(local_files_only),
            )
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TunerFileError(
            f"There is no local file or folder {repository}, and the download from the Hub failed: {reason}"
        ) from error
