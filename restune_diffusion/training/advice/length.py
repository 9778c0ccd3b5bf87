"""Warnings about the length of a run."""

from __future__ import annotations

from collections.abc import Iterator

from ...utils.display import counted
from .outline import RunOutline

# A style of 23 images was worse than the base after 348 epochs (docs/first-style.md).
_MANY_EPOCHS = 350
_FEW_IMAGES = 100


def length_warnings(run: RunOutline) -> Iterator[str]:
    """Yield the warnings about steps, epochs and warm-up."""
    images, per_step = run.images, run.images_per_step
    shown = run.steps * per_step / images
    if images < _FEW_IMAGES and shown > _MANY_EPOCHS and not run.config.teacher.generates:
        fewer = max(1, _MANY_EPOCHS // 3 * images // per_step)
        yield (
            f"{counted(run.steps, 'step')} show each of {counted(images, 'image')} {shown:.0f} times, which usually "
            f"memorizes them; try --steps {fewer}, and compare the tuners of --save-every."
        )
    if per_step > run.samples:
        yield (
            f"a step of {counted(per_step, 'image')} is larger than the data set and contains images several times; "
            f"lower --batch-size or --gradient-accumulation-steps."
        )
    warm_up = run.config.optimizer.lr_warmup_steps
    if warm_up >= run.steps:
        yield (
            f"the warm-up of {counted(warm_up, 'step')} lasts for the whole run, so the learning rate never reaches "
            f"its peak; lower --lr-warmup-steps."
        )
