"""Tagger in the layout of WD14: a folder with `model.onnx` and `selected_tags.csv`.

The input is that of sd-scripts (finetune/tag_images_by_wd14_tagger.py): float32 images of shape (batch, side, side,
3), channels blue, green and red, values from 0 to 255, padded with white to a square. The output has a probability for
each row of the table, whose category is 0 for general tags, 4 for characters and 9 for ratings. The kaomojis are those
of stable-diffusion-webui-wd14-tagger (tagger/ui.py).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ....utils.errors import DataError
from ...files import read_text
from ..registry import Captioner, CaptionerSettings

MODEL_FILE, TAGS_FILE = "model.onnx", "selected_tags.csv"
_GENERAL, _CHARACTER = "0", "4"  # a third category, 9, is the rating
_SIDE = 448
# Tags that are faces: their underscores stay.
# fmt: off
_KAOMOJIS = frozenset([
    "0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o", "@_@", "^_^",
    "o_o", "u_u", "x_x", "|_|", "||_||",
])
# fmt: on


def load_onnx_tagger(settings: CaptionerSettings) -> Captioner:
    """Return a tagger from a folder in WD14's layout.

    Raises:
        DataError: if a file is missing or does not fit, or onnxruntime is not installed.
    """
    folder = Path(settings.needed_model("onnx")).expanduser()
    for name in (MODEL_FILE, TAGS_FILE):
        if not (folder / name).is_file():
            raise DataError(
                f"The tagger {folder} has no {name}; give a folder with {MODEL_FILE} and {TAGS_FILE} (WD14's layout)."
            )
    return OnnxTagger(
        _session(folder / MODEL_FILE, settings.device),
        read_tags(folder / TAGS_FILE),
        settings.general_threshold,
        settings.character_threshold,
    )


@dataclass(frozen=True)
class Tag:
    """Tag of the table: its text in a caption, and its category."""

    text: str
    category: str


def read_tags(path: Path) -> list[Tag]:
    """Read the table of tags, with the columns `name` and `category`.

    Raises:
        DataError: if the file cannot be read, or lacks a column.
    """
    rows = list(csv.DictReader(io.StringIO(read_text(path))))
    if not rows or any(not row.get("name") or not row.get("category") for row in rows):
        raise DataError(f"{path} is not a table of tags; its first line must name the columns tag_id,name,category.")
    return [Tag(spaced(row["name"]), row["category"]) for row in rows]


def spaced(tag: str) -> str:
    """Return a tag with spaces for underscores, except in kaomojis."""
    return tag if tag in _KAOMOJIS else tag.replace("_", " ")


class OnnxTagger:
    """Captioner that lists the tags above their threshold, from the highest score; ratings are left out.

    Args:
        session: ONNX Runtime's session of the model.
        tags: tags in the order of the model's outputs.
        general_threshold: smallest score of a tag.
        character_threshold: smallest score of a tag that names a character.

    Raises:
        DataError: if the model has no input of images, or another number of outputs than tags.
    """

    def __init__(
        self, session: Any, tags: Sequence[Tag], general_threshold: float, character_threshold: float
    ) -> None:
        self._session = session
        self._tags = tags
        self._thresholds = {_GENERAL: general_threshold, _CHARACTER: character_threshold}
        image = session.get_inputs()[0]
        shape = list(image.shape)
        if len(shape) != 4 or shape[3] != 3:
            raise DataError(
                f"The tagger's input has the shape {shape}, but WD14's layout has (batch, side, side, 3); "
                "use a model of this layout."
            )
        count = session.get_outputs()[0].shape[-1]
        if isinstance(count, int) and count != len(tags):
            raise DataError(
                f"The tagger has {count} outputs but {TAGS_FILE} has {len(tags)} tags; take both files from one model."
            )
        self._input = image.name
        self._batch = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else None
        self._side = shape[1] if isinstance(shape[1], int) and shape[1] > 0 else _SIDE

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """Return the tags of each image, separated by commas."""
        inputs = np.stack([prepared(image, self._side) for image in images])
        # Some models are exported for one number of images.
        step = self._batch or len(inputs)
        captions = []
        for start in range(0, len(inputs), step):
            chunk = inputs[start : start + step]
            missing = step - len(chunk)
            filled = np.concatenate([chunk, np.zeros((missing, *chunk.shape[1:]), chunk.dtype)]) if missing else chunk
            scores = self._session.run(None, {self._input: filled})[0][: len(chunk)]
            captions += [self._caption(row) for row in scores]
        return captions

    def _caption(self, scores: np.ndarray[Any, Any]) -> str:
        if len(scores) != len(self._tags):
            raise DataError(
                f"The tagger has {len(scores)} outputs but {TAGS_FILE} has {len(self._tags)} tags; take both files "
                "from one model."
            )
        kept = [
            (float(score), tag.text)
            for score, tag in zip(scores, self._tags, strict=True)
            if score >= self._thresholds.get(tag.category, np.inf)
        ]
        # The sort is stable: tags of equal score keep the order of the table.
        return ", ".join(text for _, text in sorted(kept, key=lambda each: -each[0]))


def prepared(image: Image.Image, side: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return an RGB image as the model's input: white square, bicubic, blue, green and red from 0 to 255."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), (255, 255, 255))
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    if longest != side:
        square = square.resize((side, side), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(square, dtype=np.float32)[:, :, ::-1])


def _session(path: Path, device: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise DataError(
            "The captioner onnx needs onnxruntime, which is not installed; run "
            "pip install 'restune-diffusion[caption]'."
        ) from error
    available = onnxruntime.get_available_providers()
    on_gpu = [name for name in ("CUDAExecutionProvider", "ROCMExecutionProvider") if name in available]
    if device == "cuda" and not on_gpu:
        raise DataError("This onnxruntime has no GPU support; pip install onnxruntime-gpu, or use --device cpu.")
    providers = [*(on_gpu if device in ("auto", "cuda") else []), "CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(str(path), providers=providers)
    except Exception as error:  # its error classes share no public base
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"The tagger {path} cannot be loaded: {reason}") from error
