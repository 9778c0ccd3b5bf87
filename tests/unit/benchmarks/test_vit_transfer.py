import copy
import json
import math
from itertools import count

import pytest
import torch

from benchmarks.vit_transfer.__main__ import Run, main
from benchmarks.vit_transfer.backbone import Recognizer, Shape, concept_rows, read_out
from benchmarks.vit_transfer.learning import Course, learn
from benchmarks.vit_transfer.methods import BYPASS, METHODS, LayerMix
from benchmarks.vit_transfer.tasks import TASKS, LabeledImages, Task, main_colour, style_task
from benchmarks.vit_transfer.together import Served, compare, together
from restune_diffusion import TunerManager
from tests.unit.hooks.test_attachment import assert_same, everything

SHAPE = Shape(width=16, layers=2, heads=2, image=16, patch=8, steps=3, batch=8)
COURSE = Course(steps=20, batch=16)


@pytest.fixture(scope="module")
def vit():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Recognizer(SHAPE, 5).vit.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def task(icons):
    return style_task(icons, SHAPE.image, seed=0, shots=6)


def red_green_or_blue():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    noise = 0.2 * torch.rand(24, 3, SHAPE.image, SHAPE.image, generator=generator)
    images = LabeledImages(0.8 * torch.eye(3)[labels][:, :, None, None] + noise, labels)
    return Task("colour", 3, images, images, images)


@pytest.mark.parametrize("title", METHODS)
def test_a_method_learns_and_leaves_the_base_as_it_was(vit, title):
    task = red_green_or_blue()
    before, pixels = everything(vit), task.test.pixels[:4]
    plain = read_out(vit, pixels)
    untaught = learn(vit, METHODS[title], task, 1e-2, 0, Course(steps=0))
    learned = learn(vit, METHODS[title], task, 1e-2, 0, COURSE)
    assert untaught.validation_loss == pytest.approx(math.log(task.classes), abs=1e-5)
    assert learned.validation_loss < untaught.validation_loss - 0.1
    assert torch.equal(read_out(vit, pixels), plain)
    assert_same(before, everything(vit))


def test_what_is_trained_and_kept_is_in_the_order_of_the_methods_reach(vit, task):
    cost = {title: learn(vit, method, task, 1e-3, 0, Course(steps=0)) for title, method in METHODS.items()}
    head = 16 * 7 + 7
    assert cost["linear probe"].parameters == head
    assert cost["bypass without tuners"].parameters == head + 2
    assert cost["full fine-tuning"].parameters == head + sum(p.numel() for p in vit.parameters())
    # The probe keeps the features that its head reads, and nothing else.
    assert cost["linear probe"].kept == 32 * 16 * 4
    kept = [cost[title].kept for title in ("linear probe", BYPASS, "dual res, adapter + adapter", "full fine-tuning")]
    assert kept == sorted(set(kept))


def test_a_layer_mix_is_the_chain_of_the_paper():
    states = tuple(torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(seed))[None] for seed in range(3))
    mix = LayerMix(2)
    torch.testing.assert_close(mix(states), states[0] / 4 + states[1] / 4 + states[2] / 2)
    mix.logits.data = torch.tensor([0.0, 50.0])
    torch.testing.assert_close(mix(states), states[2])


def test_one_pass_gives_the_logits_of_every_task(vit, task):
    served = {}
    for seed in range(3):
        learned = learn(vit, METHODS[BYPASS], task, 1e-2, seed, COURSE)
        served[f"task-{seed}"] = Served(learned.tuner, learned.head)
    pixels = task.test.pixels[:8]
    row = compare(vit, served, pixels, repeats=1)
    assert row["equal"]
    assert TunerManager.of(vit) is None
    first, second, _ = together(vit, served, pixels).values()
    assert not torch.equal(first, second)
    other = copy.deepcopy(vit)
    calls = count()
    other.layernorm.register_forward_hook(lambda module, args, output: output + next(calls))
    assert not compare(other, served, pixels, repeats=1)["equal"]


@pytest.mark.parametrize("name", TASKS)
def test_no_image_is_in_two_parts_of_a_task(icons, name):
    parts = {}
    for seed in (0, 1):
        task = TASKS[name](icons, 16, seed, **({} if name == "novel" else {"shots": 4}))
        for part in ("train", "validation", "test"):
            parts[part, seed] = {picture.numpy().tobytes() for picture in getattr(task, part).pixels}
            assert set(getattr(task, part).labels.tolist()) == set(range(task.classes))
        assert not parts["train", seed] & parts["validation", seed]
        assert not (parts["train", seed] | parts["validation", seed]) & parts["test", seed]
    assert parts["test", 0] == parts["test", 1]
    assert parts["train", 0] != parts["train", 1]


def test_pretraining_sees_no_test_concept(icons):
    concepts, rows = concept_rows(icons)
    assert not set(concepts) & set(icons.test)
    assert {concept for concept, _ in rows} == set(concepts)


@pytest.mark.parametrize(
    ("rgb", "colour"),
    [((0.9, 0.1, 0.1), 1), ((0.9, 0.8, 0.1), 2), ((0.1, 0.8, 0.1), 3), ((0.1, 0.2, 0.9), 4), ((0.4, 0.4, 0.4), 0)],
)
def test_the_main_colour_is_that_of_the_ink(rgb, colour):
    picture = torch.ones(3, 8, 8)
    picture[:, 2:5, 2:5] = torch.tensor(rgb)[:, None, None]
    assert main_colour(picture) == colour


def test_the_whole_run_writes_a_report_and_goes_on_where_it_stopped(icons, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.vit_transfer.__main__.IconData", lambda folder: icons)
    kept = {title: METHODS[title] for title in ("linear probe", BYPASS)}
    monkeypatch.setattr("benchmarks.vit_transfer.__main__.METHODS", kept)
    run = Run(icons.folder, tmp_path, tmp_path / "result", SHAPE, Course(steps=2, batch=8), seeds=2, tasks=("style",))
    main(run)
    first = json.loads((tmp_path / "result.json").read_text())
    assert [(row["method"], row["seed"]) for row in first["rows"]] == [(t, s) for t in kept for s in (0, 1)]
    assert [row["tasks"] for row in first["together"]] == [1, 2]
    assert all(row["equal"] for row in first["together"])
    report = tmp_path / "result.md"
    report.write_text(report.read_text() + "\nA finding.\n")
    main(run)
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == first["rows"]
    assert "| linear probe |" in report.read_text()
    assert report.read_text().endswith("A finding.\n")
