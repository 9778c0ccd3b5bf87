from __future__ import annotations

import itertools
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from restune_diffusion import BypassConfig
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.callbacks.base import UpdateAverage
from restune_diffusion.training.callbacks.tuner_files import FinalFile
from restune_diffusion.training.feature_cache.cache import FeatureCache
from restune_diffusion.training.feature_cache.layout import FeatureCacheLayout
from restune_diffusion.training.feature_cache.tap_features import record_features
from restune_diffusion.training.feature_cache.use import cached_feature_sampler, use_feature_cache
from restune_diffusion.training.latents.batches import Batches
from restune_diffusion.training.loop import run_loop
from restune_diffusion.training.state import TrainState
from restune_diffusion.training.trainer import acting, build_accelerator, build_training_state, prepared
from restune_diffusion.utils.errors import TrainingError

from ...tiny_training import sd_pipeline, sdxl_pipeline, write_images
from ...unit.training.test_train import assert_same

MakeConfig = Callable[..., TrainConfig]
SCRIPT = Path(__file__).parents[3] / "train" / "train_style.py"


@pytest.fixture
def bypass(config: MakeConfig) -> MakeConfig:
    """Configs of runs that train a small bypass from a feature cache in fp32."""

    def make(**changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {"tuner": "bypass", "feature_cache": 3, "feature_cache_dtype": "fp32"}
        return config(**{**settings, **changes})

    return make


def prepared_run(config: TrainConfig, pipeline: Any) -> Iterator[tuple[TrainState, str]]:
    accelerator = build_accelerator(config)
    with prepared(config, accelerator, pipeline) as inputs:
        yield build_training_state(config, accelerator, inputs), inputs.models


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def folder_of(config: TrainConfig) -> Path:
    (folder,) = (config.output / "feature-cache").iterdir()
    return folder


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("make_pipeline", [sd_pipeline, sdxl_pipeline])
def test_cached_features_are_those_of_a_forward_pass(
    bypass: MakeConfig, dtype: str, make_pipeline: Callable[[], Any]
) -> None:
    # 5 draws: a full file and a partial one
    changes = {"caption_dropout": 0.4, "noise_offset": 0.1, "bypass": BypassConfig(taps=("*",))}
    settings = bypass(feature_cache=5, feature_cache_dtype=dtype, **changes)
    pipeline = make_pipeline()
    for run, models in prepared_run(settings, pipeline):
        batches = run.batches
        assert isinstance(batches, Batches)
        feature_cache = use_feature_cache([run], models, verbose=False)
        sampler = cached_feature_sampler(settings.feature_cache, run.cache, settings.seed)
        for first, count in ((0, 4), (4, 1)):
            draws = [sampler.draw(2, first + number) for number in range(count)]
            batch = batches.of(draws)
            noisy = run.objective.add_noise(batch.latents, batch.input_noise, batch.timesteps)
            expected = record_features(
                pipeline.unet, feature_cache.layout.taps, noisy, batch.timesteps, **batch.inputs
            )
            found = feature_cache.read([(2, first + number) for number in range(count)])
            assert found.by_site.keys() == expected.by_site.keys() >= {"skip.0", "mid", "up.0", "out"}
            assert found.size == expected.size
            pairs = [(found.by_site[site], expected.by_site[site]) for site in found.by_site]
            for kept, made in [*pairs, (found.time, expected.time)]:
                if dtype == "fp32":
                    assert torch.equal(kept, made)
                else:
                    # half a unit in the last place; below the smallest normal number of fp16 an absolute error
                    bound = made.abs() * (2**-11 if dtype == "fp16" else 2**-8) + 2**-25
                    assert ((kept.float() - made).abs() <= bound).all()
                    assert not torch.equal(kept.float(), made)


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_accumulation_steps": 2, "caption_dropout": 0.5, "ema_decay": 0.9}, {"flip": True}],
)
def test_training_from_a_cache_is_training_on_the_same_draws(
    bypass: MakeConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    # 8 steps of 2 of 6 images: some images occur more often than they have draws
    settings = {"steps": 8, "feature_cache": 2, **changes}
    pipeline = sd_pipeline()
    cached = train(bypass(**settings), pipeline=pipeline, verbose=False)
    plain = bypass(output=tmp_path / "plain", **settings)
    for run, _ in prepared_run(plain, pipeline):
        # the same draws, with the whole base in each step
        with acting_on_base(run):
            run_loop(run, [UpdateAverage(), FinalFile()])
    first, second = load_file(cached.path), load_file(plain.file)
    for key in second:
        # Batches of another size round differently; the gate starts at zero.
        torch.testing.assert_close(first[key], second[key], rtol=1e-3, atol=1e-5, msg=key)
    fresh = train(bypass(output=tmp_path / "fresh", **{**settings, "steps": 1, "learning_rate": 1e-9}),
                  pipeline=pipeline, verbose=False)  # fmt: skip
    start = load_file(fresh.path)
    moved = max(float((second[key] - start[key]).abs().max()) for key in second)
    assert moved > 5e-3, "the tolerance is far below the change by training"


def acting_on_base(run: TrainState) -> Any:
    run.config = run.config.model_copy(update={"feature_cache": None})
    return acting(run)


def test_a_cache_of_one_draw_repeats_it(bypass: MakeConfig) -> None:
    settings = bypass(feature_cache=1, batch_size=6)
    for run, models in prepared_run(settings, sd_pipeline()):
        use_feature_cache([run], models, verbose=False)
        noises = [run.batches[number].noise for number in range(3)]
        for later in noises[1:]:
            assert {float(noise.sum()) for noise in later} == {float(noise.sum()) for noise in noises[0]}
        assert len({float(noise.sum()) for noise in noises[0]}) == 6


def test_the_base_never_runs_while_training(bypass: MakeConfig) -> None:
    pipeline = sd_pipeline()
    calls: list[str] = []
    body = ("conv_in", "time_embedding", "down_blocks", "mid_block", "up_blocks")
    for name, module in pipeline.unet.named_modules():
        if name.startswith(body) or not name:
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    heads: list[int] = []
    pipeline.unet.conv_out.register_forward_hook(lambda *_: heads.append(len(heads)))
    counts: list[tuple[int, int]] = []
    train(
        bypass(steps=5),
        pipeline=pipeline,
        verbose=False,
        on_progress=lambda _: counts.append((len(calls), len(heads))),
    )
    assert counts[0][0] > 0, "the base computed the cache"
    assert len({body_calls for body_calls, _ in counts}) == 1
    assert [later[1] - earlier[1] for earlier, later in itertools.pairwise(counts)] == [1] * 4
    assert sum(name == "" for name in calls) == 6, "one forward pass for the three draws of each image"
    assert not pipeline.unet._forward_pre_hooks


def test_the_predicted_size_is_the_real_one(bypass: MakeConfig) -> None:
    settings = bypass(feature_cache=5, feature_cache_dtype="fp16")
    for run, models in prepared_run(settings, sd_pipeline()):
        feature_cache = use_feature_cache([run], models, verbose=False)
    files = shards(settings.output)
    assert len(files) == 6 * 2
    headers = 0
    for file in files:
        headers += 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert sum(file.stat().st_size for file in files) - headers == feature_cache.layout.bytes
    assert headers < len(files) * 2500


def test_the_size_is_printed_before_anything_is_computed(
    bypass: MakeConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40, 2**20))
    settings = bypass(feature_cache=200)
    with pytest.raises(
        TrainingError, match=r"needs \d+\.\d MiB more in .*, but only 1\.0 MiB is free; lower --feature"
    ):
        train(settings, pipeline=sd_pipeline())
    assert "6 images x 200 noise samples in fp32 = " in capsys.readouterr().out
    assert not shards(settings.output)


def test_an_interrupted_cache_is_continued(bypass: MakeConfig, tmp_path: Path) -> None:
    pipeline = sd_pipeline()
    settings = bypass(feature_cache=5)
    passes: list[int] = []

    def dying(module: Any, args: Any, output: Any) -> None:
        passes.append(1)
        if len(passes) == 8:
            raise KeyboardInterrupt

    handle = pipeline.unet.register_forward_hook(dying)
    with pytest.raises(KeyboardInterrupt):
        train(settings, pipeline=pipeline, verbose=False)
    assert len(shards(settings.output)) == 7
    assert not pipeline.unet.conv_norm_out._forward_pre_hooks
    # Truncate another file, like an incomplete copy on a full disk.
    cut = shards(settings.output)[3]
    cut.write_bytes(cut.read_bytes()[:-1000])
    continued = train(settings, pipeline=pipeline, verbose=False)
    assert len(passes) == 8 + 5 + 1
    handle.remove()
    whole = train(bypass(feature_cache=5, output=tmp_path / "whole"), pipeline=pipeline, verbose=False)
    assert_same(continued.path, whole.path)
    ours, theirs = folder_of(settings), folder_of(bypass(output=tmp_path / "whole"))
    assert [file.read_bytes() for file in shards(ours)] == [file.read_bytes() for file in shards(theirs)]
    assert ours.name == theirs.name


def test_shares_are_disjoint_and_complete(bypass: MakeConfig, tmp_path: Path) -> None:
    for run, models in prepared_run(bypass(feature_cache=5), sd_pipeline()):
        feature_cache = use_feature_cache([run], models, verbose=False)
    made: list[str] = []
    shared = FeatureCache(tmp_path, feature_cache.layout, {"of": "nothing"})
    sources = {shard.name: shard for shard in feature_cache.layout.shards()}

    def compute(shard: Any) -> Any:
        made.append(shard.name)
        return feature_cache.read([(shard.image, shard.first + number) for number in range(shard.count)])

    shared.build(compute, 1, 3)
    assert len(made) == 4
    assert len(shared.missing()) == 8
    shared.build(compute, 0, 3)
    shared.build(compute, 2, 3)
    assert sorted(made) == sorted(sources)
    assert not shared.missing()
    shared.build(compute)
    assert len(made) == len(sources)


def test_a_cache_is_shared_by_runs_with_the_same_draws_only(bypass: MakeConfig, images: Path, tmp_path: Path) -> None:
    pipeline = sd_pipeline()
    folder = tmp_path / "caches"
    passes: list[int] = []
    pipeline.unet.register_forward_hook(lambda *_: passes.append(1))
    number = iter(range(100))

    def made(**changes: Any) -> int:
        passes.clear()
        settings = {"feature_cache_dir": folder, "output": tmp_path / str(next(number)), "steps": 1, **changes}
        train(bypass(**settings), pipeline=pipeline, verbose=False)
        return len(passes)

    assert made() == 6
    assert made(learning_rate=1e-4, bypass={"ratio": 0.5}, batch_size=3, optimizer="adafactor", steps=2) == 0
    assert made(seed=1) == 6
    assert made(feature_cache=2) == 6
    assert made(min_timestep=500) == 6
    assert made(caption_dropout=0.5) == 6
    assert made(bypass={"taps": ("up.*",)}) == 6
    assert made(feature_cache_dtype="fp16") == 6
    assert made(data=write_images(tmp_path / "other", ["red", "pink"])) == 2
    with torch.no_grad():
        pipeline.vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert made() == 6
    assert made() == 0
    assert len(list(folder.iterdir())) == 9
    facts = next(folder.iterdir()) / "bank.json"
    assert '"format": 1' in facts.read_text()


def test_a_folder_of_another_cache_is_refused(tmp_path: Path) -> None:
    layout = FeatureCacheLayout.of(FAKE_BASE, [], [], 1, "fp16")
    feature_cache = FeatureCache(tmp_path, layout, {"data": 1})
    feature_cache.build(None)
    (feature_cache.folder / "bank.json").write_text('{"data": 2}')
    with pytest.raises(TrainingError, match="holds features of other data or settings; delete it"):
        FeatureCache(tmp_path, layout, {"data": 1})


FAKE_BASE: Any = namedtuple("base", "stations")(["up.0", "out"])


def test_a_damaged_file_is_named(bypass: MakeConfig) -> None:
    settings = bypass(checkpoint_every=1, steps=2)
    pipeline = sd_pipeline()
    train(settings, pipeline=pipeline, verbose=False)
    for file in shards(folder_of(settings)):
        content = file.read_bytes()
        header = int.from_bytes(content[:8], "little")
        file.write_bytes(content[:8] + b"\xff" * header + content[8 + header :])
    with pytest.raises(TrainingError, match=r"\.safetensors cannot be read \(.*\); delete it, and the next run"):
        train(bypass(checkpoint_every=1, steps=4, resume=True), pipeline=pipeline, verbose=False)


def test_features_out_of_range_for_fp16_are_refused(bypass: MakeConfig) -> None:
    pipeline = sd_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_in.weight *= 1e6
    with pytest.raises(TrainingError, match=r"feature at skip\.0 is out of range for fp16; set --feature-cache-dtype"):
        train(bypass(feature_cache_dtype="fp16"), pipeline=pipeline, verbose=False)


@pytest.mark.parametrize("tuner", ["skip", ("bypass", "text"), ("skip", "bypass")])
def test_a_cache_is_for_a_bypass_alone(bypass: MakeConfig, tuner: Any) -> None:
    with pytest.raises(ValueError, match="a feature cache is for a tuner of a bypass part alone"):
        bypass(tuner=tuner, **({"text": {"rank": 2}} if "text" in tuner else {}))


def test_a_resumed_run_equals_the_uninterrupted_one(bypass: MakeConfig, tmp_path: Path) -> None:
    pipeline = sd_pipeline()
    train(bypass(steps=3, checkpoint_every=3), pipeline=pipeline, verbose=False)
    resumed = train(bypass(steps=8, checkpoint_every=3, resume=True), pipeline=pipeline, verbose=False)
    assert len(resumed.losses) == 5
    whole = train(bypass(output=tmp_path / "whole", steps=8), pipeline=pipeline, verbose=False)
    assert_same(resumed.path, whole.path)
    with pytest.raises(TrainingError, match="feature_cache = 4, because it was made with 3"):
        train(bypass(steps=9, feature_cache=4, resume=True), pipeline=pipeline, verbose=False)


def test_a_file_of_another_shape_is_not_taken_for_ours(bypass: MakeConfig) -> None:
    settings = bypass(feature_cache=1, steps=1)
    pipeline = sd_pipeline()
    train(settings, pipeline=pipeline, verbose=False)
    file = shards(folder_of(settings))[0]
    good = file.read_bytes()
    save_file({"mid": torch.zeros(1, 2)}, file)
    settings.file.unlink()
    train(settings, pipeline=pipeline, verbose=False)
    assert file.read_bytes() == good


def test_two_processes_build_one_cache_and_train_as_one(
    bypass: MakeConfig, tmp_path: Path, script: Callable[..., Any]
) -> None:
    one = train(bypass(output=tmp_path / "one", batch_size=2, steps=3), verbose=False)
    shared = bypass(output=tmp_path / "two")
    process = script(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, "--base", shared.base,
        "--data", shared.data.folder, "--output", shared.output, "--batch-size=1", "--cpu", "--steps=3",
        "--learning-rate=1e-3", "--checkpoint-every=0", "--tuner", "bypass", "--feature-cache=3",
        "--feature-cache-dtype=fp32",
    )  # fmt: skip
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert output.count("6 images x 3 noise samples") == 1
    ours, theirs = folder_of(bypass(output=tmp_path / "one")), folder_of(shared)
    assert ours.name == theirs.name
    assert [file.read_bytes() for file in shards(ours)] == [file.read_bytes() for file in shards(theirs)]
    first, second = load_file(one.path), load_file(shared.file)
    for key in first:
        assert (first[key] - second[key]).norm() <= 1e-2 * first[key].norm(), key
