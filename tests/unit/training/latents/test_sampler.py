from __future__ import annotations

import torch

from restune_diffusion.training.latents.sampler import SeededSampler


def test_every_epoch_has_every_image_once_in_a_new_order() -> None:
    sampler = SeededSampler(7, seed=3)
    epochs = [[draw.index for draw in sampler.draws(7 * epoch, 7)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_position_draws_the_same_from_any_start() -> None:
    whole = list(SeededSampler(5, seed=0).draws(0, 23))
    parts = [draw for start in range(11, 23, 4) for draw in SeededSampler(5, seed=0).draws(start, 4)]
    for one, other in zip(whole[11:], parts, strict=False):
        assert one.index == other.index
        assert torch.equal(torch.randn(4, generator=one.generator), torch.randn(4, generator=other.generator))


def test_seeds_and_positions_draw_differently() -> None:
    noises = [
        tuple(torch.randn(4, generator=draw.generator).tolist())
        for seed in range(3)
        for draw in SeededSampler(5, seed).draws(0, 10)
    ]
    assert len(set(noises)) == 30
