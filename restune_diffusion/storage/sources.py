"""Find a tuner file on this machine or on the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..utils.errors import TunerFileError

TUNER_WEIGHT_NAME = "pytorch_tuner_weights.safetensors"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


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
    """Return the path of a tuner file; what is neither a file nor a folder is asked of the Hub, if it can be an id.

    The arguments are those of `RestuneLoaderMixin.load_tuner_weights`.

    Raises:
        TunerFileError: if there is no such file.
    """
    return local_tuner_file(source, weight_name, subfolder) or _download(
        str(source), weight_name, subfolder, revision, token, cache_dir, local_files_only
    )


def local_tuner_file(
    source: str | os.PathLike[str], weight_name: str | None = None, subfolder: str | None = None
) -> Path | None:
    """Return the tuner file that a local path means, or None where nothing exists at the path."""
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
        f"{folder} holds {len(found)} safetensors files; name one with weight_name."
        if weight_name is None
        else f"There is no {weight_name} in {folder}."
    )


def _download(
    repository: str,
    weight_name: str | None,
    subfolder: str | None,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool | None,
) -> Path:
    # A path that merely does not exist must never become a network call.
    if not _HUB_ID.fullmatch(repository) or repository.endswith((".safetensors", ".bin", ".pt", ".ckpt")):
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
            f"There is no file or folder {repository} here, and the Hub did not give it: {reason}"
        ) from error
