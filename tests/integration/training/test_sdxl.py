"""Training on SDXL's structure: two text encoders, pooled text embeddings and size conditioning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.latents.batches import Batches
from restune_diffusion.training.latents.cache import build_cache
from restune_diffusion.training.latents.sampler import SeededSampler

from ... import tiny_training as tiny
from ...unit.training.test_train import assert_same

MakeConfig = Callable[..., TrainConfig]
SIZES = {"a": (40, 20), "b": (16, 32), "c": (24, 24)}


@pytest.fixture
def odd_sizes(tmp_path: Path) -> Path:
    folder = tmp_path / "sizes"
    folder.mkdir()
    for name, size in SIZES.items():
        tiny.draw_image("teal", size).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"picture {name}")
    return folder


def test_each_sample_has_its_own_sizes_and_text(odd_sizes: Path) -> None:
    pipeline = tiny.sdxl_pipeline()
    cache = build_cache(pipeline, load_samples(find_examples(odd_sizes), 16))
    batches = Batches(cache, seed=3, size=3, timesteps=1000, caption_dropout=0.0, device=torch.device("cpu"),
                      dtype=torch.float32)  # fmt: skip
    added = batches[0].inputs["added_cond_kwargs"]
    corners = {"a": (0, 8), "b": (8, 0), "c": (0, 0)}
    for row, draw in enumerate(SeededSampler(3, 3).draws(0, 3)):
        name = "abc"[draw.index]
        width, height = SIZES[name]
        asked = pipeline._get_add_time_ids((height, width), corners[name], (16, 16), torch.float32, 32)
        assert torch.equal(added["time_ids"][row], asked[0])
        states, _, pooled, _ = pipeline.encode_prompt(f"picture {name}", device="cpu")
        torch.testing.assert_close(added["text_embeds"][row], pooled[0])
        torch.testing.assert_close(batches[0].inputs["encoder_hidden_states"][row], states[0])


@pytest.mark.parametrize("kind", ["skip", "bypass", "res"])
def test_training_lowers_the_loss(config: MakeConfig, odd_sizes: Path, kind: str) -> None:
    losses = []
    for rate in (1e-12, 1e-2):
        name = f"tuner-{len(losses)}"
        settings = config(data=odd_sizes, name=name, tuner=kind, steps=30, batch_size=3, learning_rate=rate)
        losses.append(train(settings, pipeline=tiny.sdxl_pipeline(), verbose=False).losses)
    idle, trained = losses
    assert trained[0] == idle[0], "the same draws"
    assert sum(trained[-10:]) < 0.97 * sum(idle[-10:])


def test_resuming_changes_nothing(config: MakeConfig, odd_sizes: Path, tmp_path: Path) -> None:
    settings = {"data": odd_sizes, "checkpoint_every": 1, "caption_dropout": 0.5}
    whole = train(config(output=tmp_path / "whole", steps=3, **settings), pipeline=tiny.sdxl_pipeline(), verbose=False)
    part = config(output=tmp_path / "part", steps=1, **settings)
    train(part, pipeline=tiny.sdxl_pipeline(), verbose=False)
    rest = part.model_copy(update={"steps": 3, "resume": True})
    resumed = train(rest, pipeline=tiny.sdxl_pipeline(), verbose=False)
    assert resumed.losses == whole.losses[1:]
    assert_same(whole.path, resumed.path)
