import json
from pathlib import Path

import pytest
import torch

from benchmarks.icon_style.__main__ import BaseCommand
from benchmarks.icon_style.base import base_prompts, distances, recognized
from benchmarks.icon_style.data import CONCEPTS as TEST_CONCEPTS
from benchmarks.icon_style.data import IconData, to_images, to_pixels
from benchmarks.icon_style.judges import (
    IconClassifier,
    Judges,
    disturb_shapes,
    fit_classifier,
    fit_style_classifier,
    load_judges,
)
from benchmarks.icon_style.methods import batch_loss, bypass_variants, contestants, held_out_loss, tune
from benchmarks.icon_style.report import COLUMNS, mean_and_spread, table, write_report
from benchmarks.icon_style.runner import CLOCK, Settings, StyleRun, read_strip, slug
from benchmarks.icon_style.sampling import ImageSampler
from benchmarks.icon_style.scores import Scorer, Yardsticks
from benchmarks.icon_style.style_features import StyleFeatures
from benchmarks.icon_style.subject import SubjectRun
from research.restune_tiny.icon_sources import DEMO_CONCEPTS, PRETRAINING_SETS
from research.restune_tiny.parts.shares import colour_shares
from research.restune_tiny.prepare_icons import plain
from restune_diffusion.cli.run_demo import SUBJECTS
from restune_diffusion.evaluation import InceptionFeatures, Lpips

FEW = ("skip tuner", CLOCK, "biases only")
"""Methods whose whole course is run; the other methods differ in what `start` returns, which one test runs for all."""
TINY = Settings(steps=3, batch=2, inference_steps=2, concepts=4, drift_concepts=1, sweep=False)


def undisturbed(images, generator):
    return images


@pytest.fixture(scope="module")
def judges(icons):
    """Classifiers of the synthetic icons."""
    styles = list(icons.styles)
    numbers = torch.arange(len(icons.known))
    sets = [icons.styles[name].pixels(icons.known) for name in styles]
    concept = fit_classifier(
        IconClassifier, torch.cat(sets[:5])[None], numbers.repeat(5), len(numbers), undisturbed, epochs=6, seed=0
    )
    of_style = torch.arange(7).repeat_interleave(len(icons.known))
    style = fit_style_classifier(torch.cat(sets)[None], of_style, 7)
    return Judges(concept, style, icons.known, styles)


@pytest.fixture(scope="module")
def yardsticks(judges):
    return Yardsticks(InceptionFeatures(), Lpips(), judges)


@pytest.fixture(scope="module")
def scorer(icons, yardsticks):
    split = icons.split("openmoji", 0)
    return Scorer.of(icons, "openmoji", icons.test, split.tuning, split.reference, yardsticks)


# --- data


def test_the_hundred_test_concepts_are_never_tuned_on():
    test = json.loads(TEST_CONCEPTS.read_text())["test"]
    assert len(set(test)) == 100
    assert not set(test) & {plain(concept) for concept in DEMO_CONCEPTS}
    assert set(SUBJECTS[:4]) <= set(test)


def test_a_split_has_no_concept_twice_and_follows_from_its_seed(icons):
    split = icons.split("openmoji", 0)
    parts = [*split.tuning, *split.selection, *split.reference]
    assert len(parts) == len(set(parts))
    assert not set(parts) & set(icons.test)
    assert (len(split.tuning), len(split.selection)) == (24, 48)
    assert icons.split("openmoji", 0) == split
    assert icons.split("openmoji", 1).tuning != split.tuning


def test_pictures_lie_on_white_and_survive_the_file(icons):
    pixels = icons.styles["noto"].pixels(icons.known[:3])
    assert pixels.shape == (3, 3, 64, 64)
    assert (pixels[:, :, 0, 0] == 1).all()
    assert torch.allclose(to_pixels(to_images(pixels)), pixels, atol=0.5 / 255 + 1e-6)


# --- judges


def test_the_judges_know_true_pictures_and_are_fooled_by_shuffled_captions(icons, judges):
    pairs = base_prompts(icons)
    images = torch.cat([icons.styles[style].pixels([concept]) for concept, style in pairs])
    right = recognized(judges, images, pairs)
    shuffled = recognized(judges, images, pairs[1:] + pairs[:1])
    assert right["top5"] > 0.9
    assert right["style_accuracy"] > 0.9
    assert shuffled["top5"] < 0.3
    assert right["top1"] <= right["top5"]


def test_the_base_is_as_near_to_its_styles_as_what_it_draws(icons):
    pairs = base_prompts(icons)
    true = torch.cat([icons.styles[style].pixels([concept]) for concept, style in pairs])
    order = [*PRETRAINING_SETS[1:], PRETRAINING_SETS[0]]
    mistaken = torch.cat(
        [icons.styles[order[PRETRAINING_SETS.index(style)]].pixels([concept]) for concept, style in pairs]
    )

    def features(images):
        return torch.nn.functional.avg_pool2d(images, 4).flatten(1) * 10

    own = distances(features, icons, true, pairs, reference=40)
    assert list(own) == list(PRETRAINING_SETS)
    for name, found in distances(features, icons, mistaken, pairs, reference=40).items():
        assert own[name]["drawn"] == own[name]["true pictures"] == found["true pictures"]
        assert found["drawn"] > found["true pictures"] + 10


def test_ranks_count_the_likelier_classes(icons, judges):
    ranks = judges.concept_ranks(icons.styles["noto"].pixels(icons.known), icons.known)
    assert ranks.min() == 0
    flipped = Judges(judges.concept, judges.style, icons.known[::-1], judges.styles)
    others = flipped.concept_ranks(icons.styles["noto"].pixels(icons.known), icons.known)
    assert others.float().mean() > ranks.float().mean()


def test_disturbed_pictures_keep_their_range_and_follow_from_the_generator(icons):
    images = icons.styles["noto"].pixels(icons.known[:8])
    changed = disturb_shapes(images, torch.Generator().manual_seed(1))
    assert changed.shape == images.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert torch.equal(changed, disturb_shapes(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(changed, disturb_shapes(images, torch.Generator().manual_seed(2)))


def test_a_palette_is_the_share_of_each_colour():
    image = torch.ones(1, 3, 4, 4)
    image[:, :, :1] = torch.tensor([1.0, 0.0, 0.5])[None, :, None, None]
    counts = colour_shares(image, levels=3)[0].view(3, 3, 3)
    assert counts[2, 2, 2] == 0.75  # white
    assert counts[2, 0, 1] == 0.25
    # Half way between two levels counts for both.
    between = colour_shares(torch.full((1, 3, 4, 4), 0.25) * torch.tensor([1.0, 0, 0])[:, None, None], levels=3)
    assert torch.allclose(between[0].view(3, 3, 3)[:2, 0, 0], torch.tensor([0.5, 0.5]))
    assert torch.allclose(between.sum(), torch.tensor(1.0))


def test_style_features_ignore_where_things_are_but_not_colour_or_sharpness(icons):
    features, image = StyleFeatures(), icons.styles["noto"].pixels(icons.known[:1])
    found = features(image)
    assert found.shape == (1, StyleFeatures.size)

    def change(other):
        return float((features(other) - found).norm() / found.norm())

    moved = change(image.roll((4, 8), (2, 3)))
    blurred = torch.nn.functional.avg_pool2d(image, 7, 1, 3, count_include_pad=False)
    assert moved < 0.2
    assert change(image.flip(1)) > 2 * moved
    assert change(blurred) > 1.5 * moved


def test_the_style_judge_tells_styles_of_concepts_that_it_never_saw(icons):
    names = list(icons.styles)
    seen, unseen = icons.known[::2], icons.known[1::2]
    images = torch.cat([icons.styles[name].pixels(seen) for name in names])
    judge = fit_style_classifier(images[None], torch.arange(7).repeat_interleave(len(seen)), 7)
    asked = torch.cat([icons.styles[name].pixels(unseen) for name in names])
    right = judge(asked).argmax(1) == torch.arange(7).repeat_interleave(len(unseen))
    assert right.float().mean() > 0.9
    # Labels in random order cannot be learned.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    misled = fit_style_classifier(images[None], torch.arange(7).repeat_interleave(len(seen))[order], 7)
    right = misled(asked).argmax(1) == torch.arange(7).repeat_interleave(len(unseen))
    assert right.float().mean() < 0.4


def test_judges_are_trained_once_and_kept(icons, tiny_base, tmp_path):
    few = IconData(icons.folder, test=icons.known[:4])
    vars(few)["known"] = icons.known[:20]
    images = icons.styles["noto"].pixels(icons.known[:5])
    first = load_judges(few, tiny_base.vae, tmp_path, epochs=1)
    written = (tmp_path / "style-judge.safetensors").stat().st_mtime_ns
    again = load_judges(few, tiny_base.vae, tmp_path, epochs=1)
    assert (tmp_path / "style-judge.safetensors").stat().st_mtime_ns == written
    assert torch.equal(first.concept(images), again.concept(images))
    load_judges(few, tiny_base.vae, tmp_path, epochs=1, decoded=False)
    assert (tmp_path / "style-judge.safetensors").stat().st_mtime_ns > written


# --- scores


def test_true_pictures_score_best(icons, scorer):
    true = scorer.score(scorer.true_images)
    other_style = scorer.score(icons.styles["noto"].pixels(icons.test))
    shuffled = scorer.score(scorer.true_images.roll(1, 0))
    assert true["lpips"] == 0
    assert true["similarity"] == pytest.approx(1)
    assert true["style_accuracy"] > other_style["style_accuracy"]
    assert true["kid"] < other_style["kid"]
    # Another order of the same images: the same style, other content.
    assert shuffled["kid"] == pytest.approx(true["kid"], abs=2)
    assert shuffled["style_accuracy"] == true["style_accuracy"]
    assert shuffled["similarity"] < true["similarity"]
    assert shuffled["top5"] <= true["top5"]


def test_tuning_pictures_count_as_copies(icons, scorer):
    tuning = icons.styles["openmoji"].pixels(icons.split("openmoji", 0).tuning[: len(icons.test)])
    assert scorer.score(tuning)["nearest_tuning"] == pytest.approx(0, abs=1e-6)
    assert scorer.score(scorer.true_images)["nearest_tuning"] > 0.001


# --- methods


@pytest.mark.parametrize("methods_of", [contestants, bypass_variants])
def test_every_method_starts_at_the_base_learns_and_leaves_the_base_alone(
    icons, tiny_base, judges, tmp_path, methods_of
):
    run = StyleRun(tiny_base, icons, Yardsticks(None, None, judges), "openmoji", 0, TINY, tmp_path)
    before = {name: value.clone() for name, value in tiny_base.unet.state_dict().items()}
    batch = run.batches[0]
    with torch.no_grad():
        expected = batch_loss(tiny_base.unet, batch, run.objective)
    methods = methods_of(tiny_base.unet)
    for method in methods:
        trainable = method.start(tiny_base.unet, 0)
        with torch.no_grad():
            assert torch.allclose(batch_loss(trainable.unet, batch, run.objective), expected, rtol=1e-5)
        fixed = dict.fromkeys(range(3), batch)
        rate = method.learning_rates[-1]
        course = tune(trainable, fixed, run.objective, steps=3, learning_rate=rate, warmup=0.1)  # type: ignore[arg-type]
        with torch.no_grad():
            assert batch_loss(trainable.unet, batch, run.objective) < 0.98 * expected, method.name
        assert course.steps == 3
        assert course.seconds > 0
    assert all(torch.equal(value, before[name]) for name, value in tiny_base.unet.state_dict().items())
    assert not tiny_base.unet._forward_pre_hooks


def test_the_first_six_have_equally_many_parameters(tiny_base):
    methods = contestants(tiny_base.unet)
    assert len(methods) == 10
    assert set(FEW) <= {method.name for method in methods}
    budget, *others = [method.start(tiny_base.unet, 0).count for method in methods[:6]]
    assert all(abs(count - budget) < 0.1 * budget for count in others)


def test_only_the_process_own_time_counts(icons, tiny_base, judges, tmp_path, monkeypatch):
    run = StyleRun(tiny_base, icons, Yardsticks(None, None, judges), "openmoji", 0, TINY, tmp_path)
    trainable = next(method for method in contestants(tiny_base.unet) if method.name == "biases only").start(
        tiny_base.unet, 0
    )
    readings = iter([0.0, 1.0, 10.0, 12.0, 20.0, 29.0])
    monkeypatch.setattr("time.process_time", lambda: next(readings))
    course = tune(trainable, run.batches, run.objective, steps=3, learning_rate=1e-3, warmup=0.1)
    assert (course.seconds_per_step, course.seconds) == (2, 6)


def test_the_same_seed_gives_the_same_start_and_another_seed_another(tiny_base):
    method = contestants(tiny_base.unet)[3]
    first, again, other = (method.start(tiny_base.unet, seed).parameters for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_held_out_loss_is_the_mean_over_noise_levels(icons, tiny_base, judges, tmp_path):
    run = StyleRun(tiny_base, icons, Yardsticks(None, None, judges), "openmoji", 0, TINY, tmp_path)
    whole = held_out_loss(tiny_base.unet, run.selection, run.objective, levels=2)
    assert whole == held_out_loss(tiny_base.unet, run.selection, run.objective, levels=2)
    assert 0 < whole < 2


def test_drawing_away_from_a_prompt_adds_to_its_guidance(tiny_base):
    prompts, bare = ["red apple, noto style", "cat face, blob style"], ["red apple", "cat face"]
    plain = ImageSampler(tiny_base, steps=2).generate(prompts, seed=3)
    assert torch.equal(ImageSampler(tiny_base, steps=2, away=2.0).generate(prompts, seed=3), plain)
    pushed = ImageSampler(tiny_base, steps=2, guidance=3.0, away=2.0).generate(prompts, seed=3, others=bare)
    assert not tiny_base.unet._forward_hooks

    # By hand, from three predictions a step.
    scheduler = tiny_base.scheduler.from_config(tiny_base.scheduler.config)
    scheduler.set_timesteps(2)
    noisy = torch.cat([torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(30_000 + i)) for i in (0, 1)])
    states = [tiny_base.encode_prompt(texts, "cpu", 1, False)[0] for texts in ([""] * 2, prompts, bare)]
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            free, named, other = (tiny_base.unet(noisy, timestep, each).sample for each in states)
            guided = free + 3.0 * (named - free) + 2.0 * (named - other)
            noisy = scheduler.step(guided, timestep, noisy).prev_sample
        wanted = tiny_base.vae.decode(noisy / tiny_base.vae.config.scaling_factor).sample
    torch.testing.assert_close(pushed, (wanted / 2 + 0.5).clamp(0, 1), rtol=0, atol=2e-4)
    assert (pushed - plain).abs().mean() > 0.01


def test_away_needs_guidance_to_add_to(tiny_base):
    with pytest.raises(ValueError, match="needs a guidance scale above 1, not 1"):
        ImageSampler(tiny_base, guidance=1.0, away=2.0)
    with pytest.raises(SystemExit, match="needs a guidance scale above 1"):
        BaseCommand(icons=Path("icons"), work=Path("work"), guidance=1.0, away=2.0).run()


def test_rescaled_guidance_takes_contrast_back(tiny_base):
    prompts = ["red apple, noto style", "cat face, blob style"]
    plain, half, whole = (
        ImageSampler(tiny_base, steps=4, guidance=8.0, rescale=rescale).generate(prompts, seed=3)
        for rescale in (0.0, 0.5, 1.0)
    )
    colour = [float((images.amax(1) - images.amin(1)).mean()) for images in (plain, half, whole)]
    assert colour[0] > 1.05 * colour[1] > 1.05**2 * colour[2]


def test_a_picture_depends_on_its_prompt_and_seed_alone(tiny_base):
    sampler = ImageSampler(tiny_base, steps=2, batch=2)
    three = sampler.generate(["red apple", "cat face", "house"], seed=3)
    two = ImageSampler(tiny_base, steps=2, batch=3).generate(["red apple", "cat face"], seed=3)
    assert torch.allclose(three[:2], two, atol=1e-4)
    assert not torch.allclose(two, sampler.generate(["red apple", "cat face"], seed=4), atol=1e-2)


# --- the whole thing


def test_a_run_gives_every_row_and_goes_on_where_it_was_left(icons, tiny_base, yardsticks, tmp_path, monkeypatch):
    run = StyleRun(tiny_base, icons, yardsticks, "openmoji", 0, TINY, tmp_path)
    rows = run.run(log=lambda text: None, only=FEW)
    methods = [row["method"] for row in rows if row["table"] == "steps"]
    assert [row["method"] for row in rows if row["table"] == "time"] == methods
    assert sorted(methods) == sorted(FEW)
    assert rows[0]["lpips"] == 0
    assert rows[1]["drift"] == 0
    assert all(row["drift"] > 0 for row in rows[2:])
    assert read_strip(run.folder / "drawings" / f"{slug(methods[0])}-steps.png").shape == (4, 3, 64, 64)

    def refuse(*_args, **_settings):
        raise AssertionError("a finished row was computed again")

    monkeypatch.setattr("benchmarks.icon_style.runner.tune", refuse)
    again = StyleRun(tiny_base, icons, yardsticks, "openmoji", 0, TINY, tmp_path)
    assert again.run(log=lambda text: None, only=FEW) == rows
    write_report(
        tmp_path / "out",
        rows,
        [],
        {"about": "About.", "versions": {"torch": "x"}, "command": "c", "machine": "m"},
    )
    text = (tmp_path / "out" / "report.md").read_text()
    assert all(text.count(f"| {method} |") == 2 for method in methods)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rows"] == rows


def test_the_subject_task_scores_the_true_pictures_best(tiny_base, yardsticks, tmp_path, monkeypatch):
    methods = contestants(tiny_base.unet)
    few = [method for method in methods if method.name in FEW]
    monkeypatch.setattr("benchmarks.icon_style.subject.contestants", lambda unet: few)
    task = SubjectRun(tiny_base, yardsticks.inception, yardsticks.lpips, TINY, 0, {}, tmp_path)
    rows = task.run()
    true, base = rows[:2]
    assert true["prompt"] == 1
    assert true["true"] == pytest.approx(1)
    assert true["subject"] > base["subject"] + 0.1
    assert [row["method"] for row in rows[2:]] == [method.name for method in few]
    assert all(row["leak"] > 0 for row in rows[2:])


def test_spread_over_seeds_is_the_sample_deviation():
    assert mean_and_spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    assert mean_and_spread([0.5], 3) == "0.500"
    assert mean_and_spread([1e-3, 2e-3, 1e-3], None) == "0.001 / 0.002"


def test_the_table_leaves_out_what_no_row_has():
    rows = [
        {"method": "a", "kid": 1.0, "top1": 0.5},
        {"method": "a", "kid": 2.0, "top1": 0.7},
        {"method": "b", "kid": 9.0},
    ]
    lines = table(rows, COLUMNS).splitlines()
    assert lines[0] == "| method | KID x1000 ↓ | top-1 ↑ |"
    assert lines[2] == "| a | 1.5 ± 0.7 | 0.600 ± 0.141 |"
    assert lines[3] == "| b | 9.0 |  |"


def test_pretraining_prompts_name_the_style_of_a_set_that_draws_the_concept(icons):
    pairs = base_prompts(icons)
    assert sorted(concept for concept, _ in pairs) == icons.known
    assert {style for _, style in pairs} <= set(PRETRAINING_SETS)
