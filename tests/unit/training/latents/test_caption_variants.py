"""The variant of a caption at each position: its distribution, and what it must not depend on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from restune_diffusion.data.captions import read_examples
from restune_diffusion.data.config import DataConfig
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.training.feature_cache.batches import CachedFeatureSampler
from restune_diffusion.training.latents.batches import Batches
from restune_diffusion.training.latents.cache import Cache, build_cache
from restune_diffusion.training.latents.cache_shards import merge, share
from restune_diffusion.training.latents.sampler import BucketedSampler, SeededSampler
from restune_diffusion.training.latents.text_conditioning import Conditioning, encode_caption

from ....tiny_training import sd_pipeline, write_images
from ...data.test_caption_variants import COUNT, assert_distributed

VARIED: dict[str, Any] = {"captions": "all", "shuffle_tags": True, "caption_variants": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_images(tmp_path_factory.mktemp("data") / "images", ["red", "blue", "teal"])
    (folder / "metadata.jsonl").unlink()
    (folder / "red.txt").write_text("a, b, c, d\ne, f, g, h")
    (folder / "blue.txt").write_text("alone")
    (folder / "teal.txt").write_text("i, j, k")
    return folder


def encoded(folder: Path, part: int = 0, parts: int = 1, **settings: Any) -> Cache:
    examples = share(read_examples(DataConfig(data=folder, **settings), []), part, parts)
    return build_cache(sd_pipeline(), load_samples(examples, 16))


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    return encoded(folder, **VARIED)


def batches(cache: Cache, size: int = 1, seen: list[Any] | None = None, **changes: Any) -> Batches:
    def encode(captions: Sequence[str | None]) -> list[Conditioning]:
        assert seen is not None
        seen.extend(captions)
        return [cache.unconditional for _ in captions]

    if seen is not None:
        changes["encode"] = encode
    cpu = torch.device("cpu")
    return Batches(
        cache, size=size, timesteps=1000, device=cpu, dtype=torch.float32,
        **{"seed": 0, "caption_dropout": 0.25, **changes},
    )  # fmt: skip


def captions_of(cache: Cache, numbers: Sequence[int], size: int = 1, **changes: Any) -> list[Any]:
    seen: list[Any] = []
    source = batches(cache, size, seen, **changes)
    for number in numbers:
        source[number]
    return seen


def stored(variants: Sequence[tuple[str, ...]]) -> Cache:
    """A cache of texts alone."""
    any_text: Any = None
    return Cache([], [each[0] for each in variants], [], {}, any_text, [], variants=list(variants))


@pytest.mark.parametrize(
    "sampler",
    [
        SeededSampler(2, seed=5),
        CachedFeatureSampler(2, seed=5, count=COUNT),
        BucketedSampler([[0], [1]], seed=5, step=2),
    ],
)
def test_each_variant_is_chosen_as_often_as_its_share(sampler: SeededSampler) -> None:
    texts = stored([("a", "b", "c"), ("d", "e", "e", "f", "g")])
    found: dict[int, list[str]] = {0: [], 1: []}
    for draw in sampler.draws(0, 2 * COUNT):
        found[draw.index].append(texts.caption(draw.index, draw.caption))
    assert len(found[0]) == len(found[1]) == COUNT
    assert_distributed(found[0], {"a": 1, "b": 1, "c": 1})
    assert_distributed(found[1], {"d": 1, "e": 2, "f": 1, "g": 1})
    # The next choice does not depend on the last one.
    pairs = list(zip(found[0][::2], found[0][1::2], strict=True))
    assert_distributed(pairs, {(one, other): 1 for one in "abc" for other in "abc"})


def test_the_captions_follow_from_the_position_alone(cache: Cache, folder: Path) -> None:
    whole = captions_of(cache, range(24))
    assert len({caption for caption in whole if caption is not None}) > 6
    assert captions_of(cache, range(6), size=4) == whole
    # Two processes take turns, and a resumed run encodes the data again and starts in the middle.
    first, second = captions_of(cache, range(0, 24, 2)), captions_of(cache, range(1, 24, 2))
    assert [caption for pair in zip(first, second, strict=True) for caption in pair] == whole
    assert captions_of(encoded(folder, **VARIED), range(10, 24)) == whole[10:]
    numbers = [{draw.caption for draw in SeededSampler(3, seed).draws(0, 24)} for seed in range(2)]
    assert len(numbers[0] | numbers[1]) == 48


def test_two_processes_encode_the_same_variants_as_one(cache: Cache, folder: Path) -> None:
    merged = merge([encoded(folder, part, 2, **VARIED) for part in range(2)])
    assert (merged.variants, merged.digests) == (cache.variants, cache.digests)
    assert {*merged.conditionings} == {*cache.conditionings}


def test_every_variant_has_the_embedding_of_its_text(cache: Cache) -> None:
    pipeline = sd_pipeline()
    texts = {text for variants in cache.variants for text in variants}
    assert {*cache.conditionings} == texts
    # Red has 2 captions with 2 variants each.
    assert [len(variants) for variants in cache.variants] == [4, 4, 4]
    assert {len({*variants}) for variants in cache.variants[:1]} == {1}, "blue has one caption and one tag"
    assert cache.text_bytes == len(texts) * 77 * 32 * 4
    for text in texts:
        assert torch.equal(cache.conditionings[text].states, encode_caption(pipeline, text).states)
    seen: list[Any] = []
    source, live = batches(cache, size=5), batches(cache, size=5, seen=seen)
    for number in range(3):
        expected = source[number].inputs["encoder_hidden_states"]
        live[number]
        found = [cache.unconditional if text is None else cache.conditionings[text] for text in seen[-5:]]
        assert torch.equal(expected, torch.stack([each.states for each in found]))


def test_variants_change_no_other_random_number(cache: Cache, folder: Path) -> None:
    plain = encoded(folder)
    assert plain.variants == [("alone",), ("a, b, c, d\ne, f, g, h",), ("i, j, k",)]
    for number in range(3):
        one, other = batches(cache, size=8)[number], batches(plain, size=8)[number]
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.noise, other.noise)
        assert torch.equal(one.timesteps, other.timesteps)
    dropped = [caption is None for caption in captions_of(cache, range(24))]
    assert dropped == [caption is None for caption in captions_of(plain, range(24))]
    assert 0 < sum(dropped) < 24


def test_the_hash_of_the_data_follows_the_variants_only_where_there_are_several(cache: Cache, folder: Path) -> None:
    plain = encoded(folder)
    assert [one == other for one, other in zip(cache.digests, plain.digests, strict=True)] == [True, False, False]
    assert encoded(folder, **{**VARIED, "caption_variants": 6}).digests != cache.digests
