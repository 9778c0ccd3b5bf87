"""Which images are held out, and that they never train."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from restune_diffusion.data.example import Example
from restune_diffusion.storage.tuner_file import load_tuner, read_info
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.build import build_accelerator, build_training_state
from restune_diffusion.training.inputs import prepared
from restune_diffusion.training.latents.cache import Latent
from restune_diffusion.training.validation.held_out import chosen_examples
from restune_diffusion.training.validation.loss import TIMESTEPS, held_out_batches
from restune_diffusion.utils.errors import DataError, TrainingError

from .... import tiny_training as tiny

MakeConfig = Callable[..., TrainConfig]


def examples(count: int, content: Callable[[int], bytes] = lambda number: f"image {number}".encode()) -> list[Example]:
    return [
        Example(Path(f"{number}.png"), "a", content=lambda number=number: content(number))  # type: ignore[misc]
        for number in range(count)
    ]


def chosen(given: list[Example], holdout: int | float, seed: int = 0) -> set[bytes]:
    return {given[number].read() for number in chosen_examples(given, holdout, seed)}


def held_out_names(output: Path) -> list[str]:
    return [each["name"] for each in json.loads((output / "data.json").read_text())["held_out"]]


def trained_names(output: Path) -> list[str]:
    return [each["name"] for each in json.loads((output / "data.json").read_text())["files"]]


def test_the_number_is_as_asked() -> None:
    assert [len(chosen(examples(30), holdout)) for holdout in (1, 7, 0.1, 0.5, 0.01)] == [1, 7, 3, 15, 1]


def test_the_choice_depends_on_the_seed_and_the_content_alone() -> None:
    first = chosen(examples(30), 6)
    assert chosen(examples(30)[::-1], 6) == first
    assert chosen(examples(30), 6, seed=1) != first
    # Each of these numbers is held out about as often as another.
    counts = [sum(f"image {number}".encode() in chosen(examples(10), 3, seed) for seed in range(200)) for number in
              range(10)]  # fmt: skip
    assert sum(counts) == 600
    assert 35 < min(counts) <= max(counts) < 90


def test_an_added_image_moves_at_most_one() -> None:
    for count in range(6, 30):
        before, after = chosen(examples(count), 5), chosen(examples(count + 1), 5)
        assert after == before or (before - after and after - before == {f"image {count}".encode()})


def test_copies_of_an_image_are_held_out_together() -> None:
    twins = examples(20, lambda number: f"image {number // 2}".encode())
    for seed in range(5):
        numbers = chosen_examples(twins, 5, seed)
        assert len(numbers) == 6
        assert {number ^ 1 for number in numbers} == numbers


def test_an_image_that_cannot_be_read_is_left_to_training() -> None:
    def content(number: int) -> bytes:
        if number == 3:
            raise OSError("gone")
        return f"image {number}".encode()

    assert 3 not in chosen_examples(examples(6, content), 5, 0)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    return tiny.write_images(tmp_path / "many", [*tiny.COLORS, "gray", "black"])


def inputs_of(config: TrainConfig) -> tuple[Any, Any]:
    """Training state and inputs of a run, as `train` builds them."""
    accelerator = build_accelerator(config)
    with prepared(config, accelerator) as inputs:
        return build_training_state(config, accelerator, inputs), inputs


def test_no_training_batch_has_a_held_out_image(config: MakeConfig, many: Path) -> None:
    run, inputs = inputs_of(config(data=many, crop="random", flip=True, validation={"holdout": 3}))
    held_out = inputs.held_out
    assert (len(inputs.cache), len(held_out.cache), len(held_out.entries), len(held_out.examples)) == (5, 3, 3, 3)
    assert [Path(example.path).name for example in held_out.examples] == [entry.name for entry in held_out.entries]
    captions = [entry.caption for entry in held_out.entries]
    assert held_out.cache.captions == captions
    assert not {*captions} & {*inputs.cache.captions}
    # Values, not bookkeeping: without the noise of the VAE, every drawn latent is that of a view.
    inputs.cache.latents[:] = [Latent(latent.mean, torch.zeros_like(latent.std)) for latent in inputs.cache.latents]
    drawn = {latent.numpy().tobytes() for number in range(60) for latent in run.batches[number].latents}
    assert drawn == {latent.mean.numpy().tobytes() for latent in inputs.cache.latents}
    assert not drawn & {latent.mean.numpy().tobytes() for latent in held_out.cache.latents}


def test_a_run_learns_as_if_the_held_out_images_did_not_exist(config: MakeConfig, many: Path, tmp_path: Path) -> None:
    settings = {"steps": 3, "tuner": "bypass", "feature_cache": 2, "batch_size": 1}
    kept = train(config(data=many, output=tmp_path / "kept", validation={"holdout": 3}, **settings), verbose=False)
    names = held_out_names(tmp_path / "kept")
    assert sorted(names + trained_names(tmp_path / "kept")) == sorted(path.name for path in many.glob("*.png"))
    fewer = shutil.copytree(many, tmp_path / "fewer")
    for name in names:
        (fewer / name).unlink()
    rows = [row for row in (many / "metadata.jsonl").read_text().splitlines() if json.loads(row)["file_name"] not in
            names]  # fmt: skip
    (fewer / "metadata.jsonl").write_text("\n".join(rows))
    without = train(config(data=fewer, output=tmp_path / "without", **settings), verbose=False)
    first, second = load_tuner(kept.path).state_dict(), load_tuner(without.path).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    facts, others = read_info(kept.path).training, read_info(without.path).training
    assert (facts["images"], facts["held_out_images"], facts["data_hash"]) == (5, 3, others["data_hash"])
    caches = [sorted(path.name for path in (tmp_path / name / "feature-cache").rglob("*")) for name in
              ("kept", "without")]  # fmt: skip
    assert caches[0] == caches[1]


def test_a_folder_is_read_as_the_data_folder_is(config: MakeConfig, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "held"
    folder.mkdir()
    for color in ("gray", "black"):
        tiny.draw_image(color).save(folder / f"{color}.png")
    (folder / "gray.txt").write_text("a gray disc")
    settings = {"trigger_word": "zorp", "prompt": "a disc", "steps": 2, "validation": {"holdout": folder}}
    result = train(config(**settings), verbose=False)
    data = json.loads((tmp_path / "out" / "data.json").read_text())
    assert [(each["name"], each["caption"]) for each in data["held_out"]] == [
        ("black.png", "zorp, a disc"), ("gray.png", "zorp, a gray disc"),
    ]  # fmt: skip
    assert data["images"] == len(tiny.COLORS)
    # Measuring changes nothing: neither the weights nor the random numbers.
    without = train(config(**settings | {"output": tmp_path / "without", "validation": {}}), verbose=False)
    assert result.losses == without.losses


@pytest.mark.parametrize("where", ["inside", "same", "around"])
def test_a_folder_that_overlaps_the_data_is_refused(config: MakeConfig, images: Path, where: str) -> None:
    (images / "more").mkdir(exist_ok=True)
    folder = {"inside": images / "more", "same": images, "around": images.parent}[where]
    with pytest.raises(DataError, match=r"The folder of held-out images .* overlaps the image folder .*; move the"):
        train(config(validation={"holdout": folder}), verbose=False)


def test_a_copy_of_a_training_image_is_refused(config: MakeConfig, images: Path, tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    shutil.copy(images / "teal.png", tmp_path / "held" / "copy.png")
    with pytest.raises(DataError, match=r"The held-out image copy\.png is also the training image teal\.png; remove"):
        train(config(prompt="a disc", validation={"holdout": tmp_path / "held"}), verbose=False)


@pytest.mark.parametrize("holdout", [6, 60, 0.99])
def test_a_holdout_of_all_images_is_refused(config: MakeConfig, holdout: int | float) -> None:
    with pytest.raises(
        DataError, match=rf"Holding out 6 images leaves none to train on, .*\(now {holdout}\), or give"
    ):
        train(config(validation={"holdout": holdout}), verbose=False)


def test_held_out_images_that_cannot_be_read_are_refused_or_left_out(config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "held"
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"no image")
    settings = {"prompt": "a disc", "steps": 1, "validation": {"holdout": folder}}
    with pytest.raises(DataError, match=r"None of the 1 held-out image can be used: .*broken.png is not an image"):
        train(config(**settings), verbose=False)
    tiny.draw_image("gray").save(folder / "gray.png")
    train(config(**settings), verbose=False)
    data = json.loads((tmp_path / "out" / "data.json").read_text())
    assert [each["name"] for each in data["held_out"]] == ["gray.png"]
    assert [Path(each["name"]).name for each in data["left_out"] if each["fault"]] == ["broken.png"]


def test_a_resumed_run_needs_the_same_held_out_images(config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "held"
    folder.mkdir()
    tiny.draw_image("gray").save(folder / "gray.png")
    settings = {"prompt": "a disc", "checkpoint_every": 2, "steps": 2, "validation": {"holdout": folder}}
    train(config(**settings), verbose=False)
    tiny.draw_image("black").save(folder / "black.png")
    with pytest.raises(TrainingError, match="cannot be resumed with held-out images and captions = "):
        train(config(**settings | {"resume": True, "steps": 3}), verbose=False)


def test_each_measurement_has_the_same_draws(config: MakeConfig, many: Path, tmp_path: Path) -> None:
    def drawn(**changes: Any) -> list[Any]:
        run, inputs = inputs_of(config(data=many, validation={"holdout": 3}, **changes))
        return list(held_out_batches(run, inputs.held_out))

    first, second = drawn(seed=0), drawn(seed=7, crop="random", flip=True, noise_offset=0.3, caption_dropout=0.9)
    assert [batch.timesteps.tolist() for batch in first] == [
        [time] * size for time in range(62, 1000, 125) for size in (2, 1)
    ], "the midpoints of eight parts of 1000, in batches of two"
    assert len(first) == 2 * TIMESTEPS
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.noise, other.noise)
        assert torch.equal(one.inputs["encoder_hidden_states"], other.inputs["encoder_hidden_states"])
    noises = torch.cat([batch.noise for batch in first]).flatten(1)
    assert torch.unique(noises, dim=0).shape[0] == 3 * TIMESTEPS, "no two draws are equal"
