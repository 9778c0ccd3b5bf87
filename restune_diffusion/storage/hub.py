"""Publish a tuner file on the Hugging Face Hub, with a model card and sample images. Nothing here runs by itself."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..utils.errors import RestuneError
from .header import read_info
from .model_card import model_card, sample_paths
from .sources import TUNER_WEIGHT_NAME

if TYPE_CHECKING:
    from PIL.Image import Image


def hub_files(
    tuner_file: str | os.PathLike[str],
    repo_id: str,
    *,
    samples: Sequence[tuple[str, Image]] = (),
    base_model: str | None = None,
    license: str | None = None,
) -> dict[str, bytes]:
    """Return the files that `push_to_hub` would upload, as bytes by path in the repository.

    Args:
        tuner_file: a file that `save_tuner` wrote.
        repo_id: `user/name`.
        samples: prompts with the images that were generated from them.
        base_model: id of the base's repository; defaults to the id in the file.
        license: license identifier of the Hub.

    Raises:
        TunerFileError: if the file is not a tuner file, or is damaged.
    """
    info = read_info(tuner_file)
    paths = sample_paths(samples)
    files = {path: _png(image) for path, (_, image) in zip(paths, samples, strict=True)}
    prompts = {path: prompt for path, (prompt, _) in zip(paths, samples, strict=True)}
    card = model_card(info, repo_id, samples=prompts, base_model=base_model, license=license)
    # `load_tuner_weights(repo_id)` looks for this name by default.
    return {TUNER_WEIGHT_NAME: Path(tuner_file).read_bytes(), "README.md": card.encode(), **files}


def push_to_hub(
    tuner_file: str | os.PathLike[str],
    repo_id: str,
    *,
    samples: Sequence[tuple[str, Image]] = (),
    base_model: str | None = None,
    license: str | None = None,
    commit_message: str = "Upload a tuner of restune-diffusion",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a tuner file with its model card and samples in one commit; create the repository if it does not exist.

    Args:
        tuner_file: a file that `save_tuner` wrote.
        repo_id: `user/name`.
        samples: prompts with the images that were generated from them, for the card's gallery.
        base_model: id of the base's repository; defaults to the id in the file.
        license: license identifier of the Hub.
        commit_message: title of the commit.
        private: whether a new repository is private; defaults to the account's setting.
        token: token for the Hub; defaults to the token of the current login.
        revision: branch to commit to.
        create_pr: open a pull request instead of committing.

    Returns:
        URL of the commit.

    Raises:
        TunerFileError: if the file is not a tuner file, or is damaged; nothing is uploaded then.
        RestuneError: if the Hub cannot be reached or rejects the upload.
    """
    files = hub_files(tuner_file, repo_id, samples=samples, base_model=base_model, license=license)
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Without a connection huggingface_hub raises the errors of its HTTP library, which depends on its version.
    refusals = cast("tuple[type[Exception], ...]", (*HfHubHTTPError.__bases__, HFValidationError, OSError, ValueError))
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path, content) for path, content in files.items()],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    except refusals as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RestuneError(f"The tuner was not uploaded to {repo_id}: {reason}") from error
    return str(commit.commit_url)


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
