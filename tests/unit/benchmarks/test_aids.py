from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.aids.__main__ import _pairs
from benchmarks.aids.variants import (
    Aid,
    Choice,
    Learner,
    Variant,
    loss_inside,
    losses_beside,
    train_beside,
    train_inside,
)
from benchmarks.icon_style.methods import held_out_loss
from restune_diffusion import BypassConfig
from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.training.latents.batches import Batches
from restune_diffusion.training.latents.cache import build_cache
from restune_diffusion.training.losses.objective import Objective

from ...tiny_training import sd_pipeline, write_images

STEPS = 3


def test_bypasses_that_share_passes_learn_what_each_learns_alone(tmp_path: Path) -> None:
    pipeline = sd_pipeline()
    unet = pipeline.unet.eval().requires_grad_(False)
    cache = build_cache(pipeline, load_samples(find_examples(write_images(tmp_path / "data")), 16))
    batches = Batches(
        cache, seed=0, size=2, timesteps=1000, caption_dropout=0, device=torch.device("cpu"), dtype=torch.float32
    )
    objective = Objective(pipeline.scheduler)
    choices = [
        Choice(Variant("bypass", BypassConfig(), ()), 1e-2, None),
        Choice(Variant("bypass", BypassConfig(), ()), 1e-2, Aid(1.0)),
        Choice(Variant("mixers", BypassConfig(form="mixers"), ()), 1e-2, None),
    ]
    together = [Learner.of(choice, unet, 0, STEPS) for choice in choices]
    train_beside(together, unet, batches, objective, 0, STEPS)
    losses = losses_beside(together, unet, cache, objective)
    assert len({held_out_loss(unet, cache, objective), *losses}) == 4
    assert len(together[1].distances) == STEPS
    assert together[1].distances[0] == 0 < together[1].distances[-1]
    for learner, loss in zip(together, losses, strict=True):
        assert loss == pytest.approx(loss_inside(learner, unet, cache, objective), rel=1e-5)
        if learner.choice.aid is None:
            alone = Learner.of(learner.choice, unet, 0, STEPS)
            train_inside(alone, unet, batches, objective, 0, STEPS)
            for one, other in zip(alone.tuner.parameters(), learner.tuner.parameters(), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_variant_is_compared_with_the_plain_tuner_of_its_seed() -> None:
    def row(method: str, seed: int, value: float) -> dict[str, float | str]:
        keys = ("held_out", "style_accuracy", "top5", "lpips", "drift")
        return {"method": method, "seed": seed, **dict.fromkeys(keys, value)}

    plain, noisy = "skip, batch 4", "skip, batch 4, consistency (PACE)"
    rows = [row(plain, 0, 0.25), row(plain, 1, 0.5), row(noisy, 0, 0.5), row(noisy, 1, 1.0), row(noisy, 2, 9.0)]
    (table,) = _pairs(rows)
    cells = [noisy, "+0.3750 ± 0.1768", *["+0.38 ± 0.18"] * 2, *["+0.375 ± 0.177"] * 2]
    assert table.splitlines()[2] == f"| {' | '.join(cells)} |"
    assert _pairs(rows[:2]) == []
