"""Text embeddings of a teacher that acts on the text encoders, computed once before training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...pipelines.load_base import sampling_pipeline
from ..latents.text_conditioning import Conditioning, encode_caption, encode_empty_caption
from .teacher import Teacher


def encode_teacher_text(
    teacher: Teacher | None, pipeline: Any, captions: Iterable[str]
) -> dict[str | None, Conditioning] | None:
    """Return the embeddings of captions, and under None of the empty one; None if they are those of the base.

    The student, which does not change the text encoders, thus learns the effect of placeholder tokens and text LoRA
    from the predictions.

    Args:
        teacher: the teacher, if there is one.
        pipeline: the base, without tuners.
        captions: the captions.
    """
    if teacher is None or not teacher.acts_on_text:
        return None
    with teacher.attached_whole(pipeline):
        encoder = sampling_pipeline(pipeline)
        found: dict[str | None, Conditioning] = {caption: encode_caption(encoder, caption) for caption in captions}
        found[None] = encode_empty_caption(encoder)
    return found
