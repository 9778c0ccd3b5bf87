"""Training on variants of captions: resumed, from a feature cache, and with the text encoders in every step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from restune_diffusion import read_info
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.build import build_accelerator, build_training_state
from restune_diffusion.training.callbacks.reporting import describe_plan
from restune_diffusion.training.feature_cache.shared_pass import features_of
from restune_diffusion.training.feature_cache.use import cached_feature_sampler, use_feature_cache
from restune_diffusion.training.inputs import prepared
from restune_diffusion.training.latents.batches import Batches
from restune_diffusion.training.state import TrainState
from restune_diffusion.utils.errors import TrainingError

from ...tiny_training import sd_pipeline, write_images
from ...unit.training.test_train import assert_same

MakeConfig = Callable[..., TrainConfig]
VARIED: dict[str, Any] = {
    "captions": "all",
    "shuffle_tags": True,
    "keep_tags": 1,
    "tag_dropout": 0.2,
    "wildcards": True,
    "trigger_word": "zorp",
    "caption_variants": 6,
    "caption_dropout": 0.2,
}


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return sd_pipeline()


@pytest.fixture
def varied(config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """Configs of runs on images with two captions of tags and wildcards each."""
    folder = write_images(tmp_path / "images", ["red", "blue", "teal"])
    (folder / "metadata.jsonl").unlink()
    for color in ("red", "blue", "teal"):
        (folder / f"{color}.txt").write_text(f"a {color} disc, x, y, {{big|small}}\n{color}, v, w")
    return lambda **changes: config(**{**VARIED, "data": folder, **changes})


def test_a_resumed_run_equals_the_uninterrupted(
    varied: MakeConfig, tmp_path: Path, pipeline: StableDiffusionPipeline
) -> None:
    def trained(folder: str, **changes: Any) -> Any:
        return train(varied(output=tmp_path / folder, **changes), pipeline=pipeline, verbose=False)

    trained("part", steps=3, checkpoint_every=3)
    resumed, whole = trained("part", steps=6, resume=True), trained("whole", steps=6)
    assert whole.losses[3:] == resumed.losses
    assert_same(whole.path, resumed.path)
    recorded = read_info(whole.path).training["config"]
    assert {name: recorded[name] for name in VARIED} == VARIED
    assert "keep_tags_separator" not in recorded
    for changes in ({"caption_variants": 7}, {"shuffle_tags": False}):
        with pytest.raises(TrainingError, match="cannot be resumed with"):
            trained("part", steps=6, resume=True, **changes)
    other = trained("other", steps=6, tag_dropout=0.0)
    assert other.losses != pytest.approx(whole.losses, rel=1e-4), "captions change the loss"


def prepared_run(stack: ExitStack, config: TrainConfig, pipeline: Any) -> tuple[TrainState, Any]:
    accelerator = build_accelerator(config)
    inputs = stack.enter_context(prepared(config, accelerator, pipeline))
    return build_training_state(config, accelerator, inputs), inputs


def test_a_feature_cache_holds_the_features_of_the_chosen_variants(
    varied: MakeConfig, tmp_path: Path, pipeline: StableDiffusionPipeline
) -> None:
    settings = varied(tuner="bypass", feature_cache=5, feature_cache_dtype="fp32")
    with ExitStack() as stack:
        run, inputs = prepared_run(stack, settings, pipeline)
        batches = run.batches
        assert isinstance(batches, Batches)
        cache = use_feature_cache([run], inputs.models, verbose=False)
        sampler = cached_feature_sampler(settings.feature_cache, run.cache, settings.seed)
        assert sampler is not None
        chosen: set[str] = set()
        for image in range(3):
            for number in range(5):
                draw = sampler.draw(image, number)
                chosen.add(run.cache.caption(image, draw.caption))
                # The batch size of the file: 4 draws, and then the fifth.
                first = number - number % 4
                draws = [sampler.draw(image, each) for each in range(first, min(first + 4, 5))]
                expected = features_of(run, cache.layout.taps, batches.of(draws))
                found = cache.read([(image, number)])
                for site, feature in found.by_site.items():
                    assert torch.equal(feature[0], expected.by_site[site][number - first])
        assert len(chosen) > 6
    other = varied(output=tmp_path / "out", tuner="bypass", feature_cache=5, tag_dropout=0.4)
    with ExitStack() as stack:
        run, inputs = prepared_run(stack, other, pipeline)
        assert use_feature_cache([run], inputs.models, verbose=False).folder != cache.folder


def test_text_encoders_in_every_step_see_the_same_variants(
    varied: MakeConfig, tmp_path: Path, pipeline: StableDiffusionPipeline
) -> None:
    """LoRA on the text encoder starts as the identity and hardly learns, so the embeddings are those of the cache."""
    common: dict[str, Any] = {"steps": 5, "max_grad_norm": 1e9}
    text: dict[str, Any] = {"tuner": ("skip", "text"), "text": {"rank": 1}, "text_learning_rate": 1e-12}
    cached = train(varied(output=tmp_path / "cached", **common), pipeline=pipeline, verbose=False)
    live = train(varied(output=tmp_path / "live", **text, **common), pipeline=pipeline, verbose=False)
    assert live.losses == pytest.approx(cached.losses, rel=1e-5)


def test_the_plan_states_the_number_and_memory_of_the_embeddings(
    varied: MakeConfig, pipeline: StableDiffusionPipeline
) -> None:
    settings = varied(shuffle_tags=False, keep_tags=0, tag_dropout=0, caption_variants=4)
    with ExitStack() as stack:
        run, _ = prepared_run(stack, settings, pipeline)
        (line,) = [line for line in describe_plan(run).splitlines() if line.startswith("variants")]
    # "a red disc, x, y, big", the same with "small", and "red, v, w"; 77 tokens of 32 channels in fp32 each
    assert line == (
        "variants    3 images with 3 distinct variants of 2 captions, 9 texts together; 9 text embeddings take 0.1 "
        "MiB of main memory"
    )
