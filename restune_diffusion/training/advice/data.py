"""Warnings about the training images and their captions."""

from __future__ import annotations

from collections.abc import Iterator

from ...utils.display import counted
from .outline import RunOutline

_FAR_ENLARGED = 1.5
# A subject often has the same caption for its 5 to 20 images.
_MANY_IMAGES = 30
# If training helps and harms images at random, the losses of n images all rise together once in 2^n times.
_FEW_HELD_OUT = 4


def data_warnings(run: RunOutline) -> Iterator[str]:
    """Yield the warnings about the training images and their captions."""
    if run.images == 1:
        yield (
            "there is one training image, so the tuner learns its composition too; use 5 or more images of a subject, "
            "20 or more of a style."
        )
    small = sum(entry.enlarged > _FAR_ENLARGED for entry in run.entries)
    if 2 * small > len(run.entries):
        yield (
            f"{small} of {counted(len(run.entries), 'image')} are enlarged more than {_FAR_ENLARGED} times, so the "
            f"tuner learns to blur; use larger images or a lower --resolution."
        )
    config = run.config
    subject = config.learns_from_text or config.data.trigger_word or config.preservation.method != "none"
    if len(run.entries) >= _MANY_IMAGES and len({entry.caption for entry in run.entries}) == 1 and not subject:
        yield (
            f"all {len(run.entries)} images have the same caption, so prompts will have little control over the "
            f"content; describe the content of each image in its own caption."
        )
    if 0 < run.held_out < _FEW_HELD_OUT:
        yield (
            f"the loss of {counted(run.held_out, 'held-out image')} says little: even a rise on each of them happens "
            f"by chance once in {2**run.held_out} times; hold out {_FEW_HELD_OUT} or more, better 8."
        )
