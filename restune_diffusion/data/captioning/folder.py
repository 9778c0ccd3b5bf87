"""Write the caption files of a folder of images, batch by batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ...hooks.placeholder_tokens import contains_token
from ...utils.atomic_write import atomic_write
from ...utils.errors import DataError, RestuneError
from ..conventions.caption_files import CaptionFiles
from ..conventions.label_files import label_of
from ..example import check_caption
from ..files import is_image, list_files, read_text
from ..image_files import read_image
from ..metadata import find_metadata
from ..refusals import Refused
from ..saved_dataset import is_saved_dataset
from .job import CaptionJob, Existing, Outcome
from .progress import Progress
from .registry import Captioner


def find_images(folder: Path) -> tuple[list[Path], CaptionFiles]:
    """Return the images of a folder, without masks and condition images, and its caption files.

    Raises:
        DataError: if the folder does not exist, has no images, or its captions are in a metadata file or a dataset.
    """
    if not folder.is_dir():
        raise DataError(f"The image folder {folder} does not exist; give the path of a folder of images.")
    if is_saved_dataset(folder):
        raise DataError(
            f"{folder} is a saved dataset, whose captions are a column; caption files beside images need a folder of "
            "image files."
        )
    files = list_files(folder, [])
    metadata = find_metadata(folder, files)
    if metadata is not None:
        raise DataError(
            f"The captions of {folder} are in {metadata.relative_to(folder)}, and caption files would not be read; "
            "move that file away, or change its captions with `restune data edit`."
        )
    images = [path for path in files if is_image(path) and label_of(path) is None]
    if not images:
        raise DataError(f"The image folder {folder} has no images; put some PNG, JPEG or WebP files there.")
    return images, CaptionFiles(files)


def caption_folder(
    job: CaptionJob, load: Callable[[], Captioner], outcome: Outcome, advance: Callable[[int], object]
) -> None:
    """Caption the images of a folder; a stop at any time leaves whole files, and the same job continues.

    Args:
        job: folder and settings.
        load: returns the captioner; not called if every image has a caption.
        outcome: receives what is done, also when the job is stopped.
        advance: is called with the number of images that were dealt with.

    Raises:
        DataError: if the folder has no images to caption, or the captioner fails.
    """
    images, sidecars = find_images(job.folder)
    outcome.images = len(images)
    shared = _shared_names(images)
    with Progress(job) as progress:
        wanted = []
        for image in images:
            current = sidecars.of(image)
            if image in progress or (job.existing == "skip" and current is not None and _has_text(current)):
                outcome.unchanged += 1
                advance(1)
            else:
                wanted.append((image, current))
        captioner: Captioner | None = None
        for start in range(0, len(wanted), job.batch_size):
            batch = wanted[start : start + job.batch_size]
            read = [(*each, pixels) for each in batch if (pixels := _read(each[0], outcome.refused)) is not None]
            if read:
                captioner = captioner or load()
                captions = run_captioner(captioner, [pixels for *_, pixels in read])
                for (image, current, _), caption in zip(read, captions, strict=True):
                    _write(job, image, _target(image, current, shared), caption, outcome)
                    progress.add(image)
            advance(len(batch))
        progress.finish()


def run_captioner(captioner: Captioner, images: Sequence[Image.Image]) -> list[str]:
    """Return the captions of some images, on one line each.

    Raises:
        DataError: if the captioner raises an error, or does not return one string for each image.
    """
    try:
        captions = list(captioner(images))
    except RestuneError:
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
            raise
        reason = " ".join(str(error).split())[:300] or "no message"
        raise DataError(f"The captioner failed ({type(error).__name__}): {reason}") from error
    if len(captions) != len(images) or not all(isinstance(caption, str) for caption in captions):
        raise DataError(
            f"The captioner returned {len(captions)} values for {len(images)} images; it must return one string for "
            "each image."
        )
    return [" ".join(caption.split()) for caption in captions]


def _read(path: Path, refused: list[Refused]) -> Image.Image | None:
    """Return an image as RGB, or None if it cannot be read, which is noted."""
    try:
        return read_image(path)[0]
    except MemoryError:
        raise
    except DataError as error:
        reason = str(error).rstrip(".")
    except UnidentifiedImageError:
        reason = "is not an image of a known format"
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file
        message = " ".join((getattr(error, "strerror", None) or str(error)).split())
        reason = f"cannot be read as an image ({message or type(error).__name__})"
    refused.append(Refused(str(path), reason))
    return None


def _shared_names(images: Sequence[Path]) -> set[Path]:
    """Return the paths without suffix that several images have, such as `a` of `a.png` and `a.jpg`."""
    counts = Counter(image.with_suffix("") for image in images)
    return {stem for stem, count in counts.items() if count > 1}


def _has_text(path: Path) -> bool:
    """Return whether a caption file has a text, readable or not."""
    try:
        return bool(read_text(path).strip())
    except DataError:
        return True


def _target(image: Path, current: Path | None, shared: set[Path]) -> Path:
    """Return the caption file to write: the image's own, which no other image reads."""
    if image.with_suffix("") in shared:
        return current if current is not None and current.stem == image.name else Path(f"{image}.txt")
    return current or image.with_suffix(".txt")


def _write(job: CaptionJob, image: Path, target: Path, caption: str, outcome: Outcome) -> None:
    try:
        if not caption:
            raise DataError("got an empty caption; lower the thresholds, or write its caption by hand")
        check_caption(caption)
        before = read_text(target).strip() if target.is_file() else ""
        text = joined(before, caption, job.existing, job.trigger_word)
    except DataError as error:
        outcome.refused.append(Refused(str(image), str(error).rstrip(".")))
        return
    if text == before:
        outcome.unchanged += 1
        return
    with atomic_write(target) as file:
        file.write(f"{text}\n".encode())
    outcome.written.append(target)


def joined(before: str, caption: str, existing: Existing, trigger_word: str | None) -> str:
    """Return the text of a caption file after captioning; a caption that is already there is not added again.

    Args:
        before: text of the file, empty if there is none.
        caption: the new caption.
        existing: treatment of the text before.
        trigger_word: word at the start of each line that lacks it.
    """
    lines = [line.strip() for line in before.split("\n") if line.strip()]
    if not lines or existing in ("skip", "overwrite"):
        lines = [caption]
    elif existing == "add-line":
        lines += [] if caption in _bare(lines, trigger_word) else [caption]
    elif existing == "append":
        lines = [line if line.endswith(caption) else f"{line}, {caption}" for line in lines]
    else:
        bare = _bare(lines, trigger_word)
        lines = [line if line.startswith(caption) else f"{caption}, {line}" for line in bare]
    return "\n".join(_with_trigger(line, trigger_word) for line in lines)


def _bare(lines: Sequence[str], trigger_word: str | None) -> list[str]:
    """Return lines without the trigger word at their start."""
    return [line.removeprefix(f"{trigger_word}, ") if trigger_word else line for line in lines]


def _with_trigger(line: str, trigger_word: str | None) -> str:
    return line if not trigger_word or contains_token(line, [trigger_word]) else f"{trigger_word}, {line}"


def refusals(outcome: Outcome, folder: Path) -> Iterator[str]:
    """Yield a line for each refused image, with its path in the folder."""
    for each in outcome.refused:
        yield str(each.inside(folder))
