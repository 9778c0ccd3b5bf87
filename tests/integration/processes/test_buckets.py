from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from restune_diffusion.data.buckets import Buckets, bucket_sizes, bucket_step
from restune_diffusion.data.image_files import SizeConditioning, centred
from restune_diffusion.storage.tuner_file import load_tuner
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.latents.batches import Batches
from restune_diffusion.training.latents.cache import Cache, Latent
from restune_diffusion.training.latents.sampler import BucketedSampler, SeededSampler
from restune_diffusion.training.latents.text_conditioning import Conditioning

from ...tiny_training import draw_image, sdxl_pipeline
from ...unit.training.test_train import assert_same

SCRIPT = Path(__file__).parents[3] / "train" / "train_style.py"
SIZES = [(24, 20), (40, 16), (16, 40), (32, 32), (20, 44), (50, 20), (21, 20)]
MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three shapes."""
    folder = tmp_path_factory.mktemp("shapes")
    for number, size in enumerate(SIZES):
        draw_image("red", size).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a disc of {size[0]} by {size[1]}")
    return folder


def test_the_step_comes_from_the_model() -> None:
    def base(scale: int, levels: int) -> Any:
        return SimpleNamespace(
            vae_scale_factor=scale, unet=SimpleNamespace(config=SimpleNamespace(block_out_channels=(1,) * levels))
        )

    assert [bucket_step(base(8, 4)), bucket_step(base(8, 3)), bucket_step(base(2, 4)), bucket_step(base(4, 6))] == [
        64, 64, 16, 128,
    ]  # fmt: skip


def test_sizes_at_512_are_these() -> None:
    assert bucket_sizes(512, 64, 2) == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    assert bucket_sizes(512, 64, 1) == [(512, 512)]


@given(st.integers(1, 20), st.sampled_from([8, 16, 32, 64]), st.floats(1, 6))
@settings(max_examples=50, deadline=None)
def test_sizes_stay_within_area_and_shape(steps: int, step: int, longest: float) -> None:
    resolution = steps * step
    sizes = bucket_sizes(resolution, step, longest)
    assert (resolution, resolution) in sizes
    assert {(height, width) for width, height in sizes} == set(sizes)
    for width, height in sizes:
        assert width % step == height % step == 0
        assert width * height <= resolution**2
        assert max(width, height) <= longest * min(width, height)
        # the next larger size would be too large
        assert max((width + step) * height, width * (height + step)) > resolution**2


def test_an_image_goes_to_the_nearest_shape_and_is_scaled_no_more_than_it_needs() -> None:
    buckets = Buckets(bucket_sizes(512, 64, 3))
    assert buckets.choose((1500, 1000)) == (640, 384)
    assert buckets.choose((1000, 1500)) == (384, 640)
    assert buckets.choose((511, 512)) == (512, 512)
    assert buckets.choose((4000, 500)) == max(buckets.sizes, key=lambda size: size[0] / size[1])
    crop = centred((1500, 1000), (640, 384))
    assert crop.scaled == (640, 427), "the width fits, the height is cut"
    assert crop.corner == (0, 21)


def test_small_images_keep_their_own_size_if_asked() -> None:
    sizes = bucket_sizes(512, 64, 3)
    assert Buckets(sizes).choose((300, 200)) == (640, 384)
    kept = Buckets(sizes, grid=64, max_aspect_ratio=3)
    assert kept.choose((300, 200)) == (256, 192)
    assert kept.choose((3000, 2000)) == (640, 384)
    assert kept.choose((30, 20)) == (64, 64), "nothing is smaller than the grid"
    assert kept.choose((2000, 130)) == (384, 128)


@pytest.mark.parametrize(
    "members", [[[0, 1, 2, 3], [4, 5]], [[0], [1, 2, 3, 4, 5, 6]], [[3, 1], [0, 2], [5, 4, 6, 7]]]
)
def test_each_step_has_one_bucket_and_each_image_comes_equally_often(members: list[list[int]]) -> None:
    size = 3
    stream = BucketedSampler(members, seed=5, step=size)
    images = sum(map(len, members))
    steps = [[draw.index for draw in stream.draws(number * size, size)] for number in range(images)]
    bucket = {image: number for number, bucket in enumerate(members) for image in bucket}
    assert all(len({bucket[image] for image in step}) == 1 for step in steps)
    assert set(Counter(image for step in steps for image in step).values()) == {size}
    turns = [[bucket[step[0]] for step in steps]]
    turns.append([bucket[next(BucketedSampler(members, 6, size).draws(n * size, 1)).index] for n in range(images)])
    assert turns[0] != turns[1], "another seed takes the buckets in another order"


@given(st.integers(0, 200), st.sampled_from([1, 2, 3, 6]), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_a_bucketed_position_draws_the_same_however_the_step_is_split(step: int, batch: int, seed: int) -> None:
    members, size = [[0, 1, 2], [3, 4, 5, 6, 7], [8]], 6
    whole = list(BucketedSampler(members, seed, size).draws(step * size, size))
    stream = BucketedSampler(members, seed, size)
    parts = [draw for start in range(0, size, batch) for draw in stream.draws(step * size + start, batch)]
    assert [draw.index for draw in whole] == [draw.index for draw in parts]
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(torch.randn(3, generator=one.generator), torch.randn(3, generator=other.generator))
        assert torch.equal(torch.randn(3, generator=one.view), torch.randn(3, generator=other.view))


def cache_of(shapes: list[tuple[int, int]], views: int = 1, repeats: list[int] | None = None) -> Cache:
    """A cache in which the latents of an image are filled with its number, and those of its view with a tenth more."""
    latents = [
        Latent(torch.full((4, *shape), number + view / 10), torch.zeros(4, *shape))
        for number, shape in enumerate(shapes)
        for view in range(views)
    ]
    states = Conditioning(torch.zeros(7, 8))
    return Cache(
        latents,
        ["a"] * len(latents),
        [SizeConditioning((1, 1), (0, 0), (1, 1))] * len(latents),
        {"a": states},
        states,
        "hash",
        views=[list(range(number * views, (number + 1) * views)) for number in range(len(shapes))],
        repeats=repeats or [1] * len(shapes),
    )


def batches(cache: Cache, size: int, step_size: int | None = None) -> Batches:
    return Batches(
        cache, seed=0, size=size, timesteps=1000, caption_dropout=0, device=torch.device("cpu"), dtype=torch.float32,
        step_size=step_size,
    )  # fmt: skip


def test_a_batch_never_mixes_sizes() -> None:
    cache = cache_of([(2, 2), (2, 4), (4, 2), (2, 2), (2, 2), (2, 4), (2, 4)])
    drawn = batches(cache, 4)
    seen = {tuple(drawn[number].latents.shape) for number in range(20)}
    assert seen == {(4, 4, 2, 2), (4, 4, 2, 4), (4, 4, 4, 2)}
    halves = batches(cache, 2, step_size=4)
    for number in range(10):
        both = torch.cat([halves[2 * number].latents, halves[2 * number + 1].latents])
        assert torch.equal(drawn[number].latents, both)


def test_repeated_images_come_so_much_oftener() -> None:
    drawn = batches(cache_of([(2, 2)] * 3, repeats=[1, 3, 2]), 6)
    for number in range(5):
        assert Counter(drawn[number].latents[:, 0, 0, 0].tolist()) == {0: 1, 1: 3, 2: 2}


def test_views_are_drawn_evenly_and_leave_everything_else_as_it_was() -> None:
    plain, viewed = batches(cache_of([(2, 2)] * 5), 400)[0], batches(cache_of([(2, 2)] * 5, views=2), 400)[0]
    values = viewed.latents[:, 0, 0, 0]
    assert torch.equal(values.floor(), plain.latents[:, 0, 0, 0])
    assert torch.equal(viewed.noise, plain.noise)
    assert torch.equal(viewed.timesteps, plain.timesteps)
    assert 0.42 < (values > values.floor() + 0.05).float().mean() < 0.58


def test_images_of_one_size_are_drawn_as_ever() -> None:
    drawn = batches(cache_of([(2, 2)] * 5), 2, step_size=8)
    order = [draw.index for draw in SeededSampler(5, 0).draws(0, 10)]
    assert [int(value) for number in range(5) for value in drawn[number].latents[:, 0, 0, 0]] == order


BUCKETED = {"resolution": 32, "bucketing": True, "flip": True, "steps": 4, "learning_rate": 1e-3}


def test_two_processes_with_buckets_train_as_one_with_twice_the_batch(
    config: MakeConfig, shapes: Path, tmp_path: Path, script: Callable[..., Any]
) -> None:
    one = train(config(data=shapes, output=tmp_path / "one", batch_size=2, **BUCKETED), verbose=False)
    shared = config(data=shapes, output=tmp_path / "two")
    process = script(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, "--base", shared.base,
        "--data", shapes, "--output", shared.output, "--batch-size=1", "--cpu", "--steps=4", "--learning-rate=1e-3",
        "--checkpoint-every=0", "--resolution=32", "--bucketing", "--flip",
    )  # fmt: skip
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert output.count("7 in 3 sizes, 7 captions, 14 views") == 1
    first, second = load_tuner(one.path).state_dict(), load_tuner(shared.file).state_dict()
    for key in first:
        assert (first[key] - second[key]).norm() <= 1e-2 * first[key].norm(), key


def test_a_bucketed_run_goes_on_as_if_nothing_had_happened(config: MakeConfig, shapes: Path, tmp_path: Path) -> None:
    settings = {**BUCKETED, "data": shapes, "batch_size": 2, "checkpoint_every": 2}
    whole = train(config(output=tmp_path / "whole", **settings), verbose=False)
    train(config(output=tmp_path / "broken", **{**settings, "steps": 2}), verbose=False)
    resumed = train(config(output=tmp_path / "broken", resume=True, **settings), verbose=False)
    assert_same(whole.path, resumed.path)


def test_sdxl_is_told_the_size_and_section_of_each_bucket(config: MakeConfig, shapes: Path) -> None:
    seen: list[list[float]] = []
    pipeline = sdxl_pipeline()
    pipeline.unet.register_forward_pre_hook(
        lambda _, __, kwargs: seen.extend(kwargs["added_cond_kwargs"]["time_ids"].tolist()), with_kwargs=True
    )
    train(config(data=shapes, **{**BUCKETED, "flip": False, "steps": 12}), pipeline=pipeline, verbose=False)
    told = {tuple(map(int, row)) for row in seen}
    # (20, 24) is the first image's height and width; scaled to 38 x 32, three columns are cut on either side
    assert (20, 24, 0, 3, 32, 32) in told
    assert {row[:2] for row in told} == {(height, width) for width, height in SIZES}
    assert {row[4:] for row in told} == {(32, 32), (16, 48), (48, 16)}
