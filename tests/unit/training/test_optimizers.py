from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prodigyopt
import pytest
import torch

from restune_diffusion.storage.tuner_file import load_tuner
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.optimization.optimizer_state import flatten_state, unflatten_state
from restune_diffusion.training.optimization.optimizers import effective_learning_rate, make_optimizer
from restune_diffusion.tuners.configs import TextConfig
from restune_diffusion.utils.errors import TrainingError

from .test_train import assert_same

MakeConfig = Callable[..., TrainConfig]
RATES = {"adamw": 1e-3, "adamw8bit": 1e-3, "prodigy": 1.0, "adafactor": 1e-3, "lion": 1e-4}


def weights() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    # bitsandbytes keeps a state of eight bits from 4,096 elements on
    shapes = [(64, 80), (1, 5000), (3,)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def step(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in parameters:
        parameter.grad = parameter.detach() - 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def optimizer_of(name: str, parameters: list[torch.nn.Parameter]) -> Any:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    return make_optimizer(name, parameters, learning_rate=RATES[name], weight_decay=0.01)


@pytest.mark.parametrize("name", RATES)
def test_a_state_that_was_saved_and_loaded_goes_on_exactly(name: str, tmp_path: Path) -> None:
    """Through safetensors and JSON, as in a checkpoint; whatever is lost on the way shows in the next steps."""
    import json

    from safetensors.torch import load, save

    here, names = weights(), ["a", "b.c", "token:d"]
    optimizer = optimizer_of(name, here)
    for number in range(5):
        step(optimizer, here, number)
    state = optimizer.state_dict()
    tensors, values = flatten_state(state["state"], names)
    tensors = load(save(tensors))
    values, groups = json.loads(json.dumps([values, state["param_groups"]]))
    if name == "adamw8bit":
        assert any(tensor.dtype == torch.uint8 for tensor in tensors.values())

    there = [torch.nn.Parameter(parameter.detach().clone()) for parameter in here]
    restored = optimizer_of(name, there)
    restored.load_state_dict({"state": unflatten_state({**tensors, **values}, names), "param_groups": groups})
    for number in range(5, 9):
        step(optimizer, here, number)
        step(restored, there, number)
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))
    fresh = optimizer_of(name, again := [torch.nn.Parameter(parameter.detach().clone()) for parameter in here])
    step(optimizer, here, 9)
    step(fresh, again, 9)
    assert not torch.equal(here[0], again[0]), "a state that is lost would show"


def test_lion_is_the_paper_s_equation() -> None:
    """arXiv 2302.06675, algorithm 2: the sign of an interpolated momentum, with decoupled decay."""
    parameter, start = (torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0])), torch.tensor([1.0, -2.0, 3.0]).double())
    optimizer = make_optimizer("lion", [parameter], learning_rate=0.1, weight_decay=0.5)
    momentum = torch.zeros(3, dtype=torch.float64)
    for gradient in (torch.tensor([1.0, -1.0, 2.0]), torch.tensor([-20.0, 0.5, -0.1])):
        parameter.grad = gradient
        optimizer.step()
        start = start - 0.1 * ((0.9 * momentum + 0.1 * gradient).sign() + 0.5 * start)
        momentum = 0.99 * momentum + 0.01 * gradient
    torch.testing.assert_close(parameter.detach().double(), start, rtol=1e-6, atol=0)


def test_prodigy_finds_a_rate_and_tells_it() -> None:
    parameters = weights()
    optimizer = optimizer_of("prodigy", parameters)
    assert effective_learning_rate(optimizer, 0.5) == pytest.approx(0.5e-6)
    for number in range(30):
        step(optimizer, parameters, number)
    found = effective_learning_rate(optimizer, 0.5)
    assert found == 0.5 * optimizer.param_groups[0]["d"]
    assert found > 2 * 0.5e-6


def test_prodigy_is_that_of_prodigyopt() -> None:
    """With a warm-up that starts at zero, a parameter of zeros, and one that a step does not reach."""
    recommended = {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}
    here, there = ([*weights(), torch.nn.Parameter(torch.zeros(4, 5))] for _ in range(2))
    mine = make_optimizer("prodigy", here, learning_rate=1.0, weight_decay=0.01)
    theirs = prodigyopt.Prodigy(there, lr=1.0, weight_decay=0.01, **recommended)
    for number in range(30):
        for optimizer, parameters in ((mine, here), (theirs, there)):
            optimizer.param_groups[0]["lr"] = min(1.0, number / 5)
            generator = torch.Generator().manual_seed(number)
            for parameter in parameters:
                parameter.grad = parameter.detach() - 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
            if number % 4 == 1:
                parameters[1].grad = None
            optimizer.step()
        mine_d, their_d = (float(optimizer.param_groups[0]["d"]) for optimizer in (mine, theirs))
        assert mine_d == pytest.approx(their_d, rel=1e-4)
    assert mine_d > 5e-6
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    # A checkpoint made with prodigyopt continues.
    continued = make_optimizer("prodigy", there, learning_rate=1.0, weight_decay=0.01)
    continued.load_state_dict(theirs.state_dict())
    step(mine, here, 30)
    step(continued, there, 30)
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_prodigy_takes_learning_rates_by_group() -> None:
    """Factors on one estimate, by the equations of arXiv 2306.06101, algorithm 4, in double precision."""
    first, second = (torch.nn.Parameter(torch.tensor(values).double()) for values in ([1.0, -2.0], [0.5]))
    groups = [{"params": [first], "lr": 1.0}, {"params": [second], "lr": 0.25}]
    optimizer = make_optimizer("prodigy", groups, learning_rate=1.0, weight_decay=0.0)
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    rates = torch.tensor([1.0, 1.0, 0.25], dtype=torch.float64)
    x, d, r = start.clone(), 1e-6, 0.0
    s, m, v = (torch.zeros(3, dtype=torch.float64) for _ in range(3))
    for number in range(1, 41):
        g = x - 3
        first.grad, second.grad = g[:2].clone(), g[2:].clone()
        optimizer.step()
        correction = math.sqrt(1 - 0.999**number) / (1 - 0.9**number)
        r = math.sqrt(0.999) * r + float(d / 1e-6 * d * correction * (rates * g * (start - x)).sum())
        s = math.sqrt(0.999) * s + d / 1e-6 * d * g
        m, v = 0.9 * m + 0.1 * d * g, 0.999 * v + 0.001 * d * d * g * g
        before, d = d, max(d, r / float(s.abs().sum()))
        x = x - before * correction * rates * m / (v.sqrt() + d * 1e-8)
        torch.testing.assert_close(torch.cat([first, second]).detach(), x, rtol=1e-12, atol=0)
    assert float(optimizer.param_groups[0]["d"]) == pytest.approx(d, rel=1e-9)
    assert d > 5e-6


def test_prodigy_changes_nothing_where_loss_scaling_finds_an_overflow() -> None:
    here, there = weights(), weights()
    whole, other = optimizer_of("prodigy", here), optimizer_of("prodigy", there)
    for number in range(6):
        step(other, there, number)
        if number in (0, 3):
            before = [parameter.detach().clone() for parameter in here]
            for parameter in here:
                parameter.grad = torch.full_like(parameter, torch.nan)
            whole.found_inf = torch.tensor(1.0)
            whole.step()
            assert all(torch.equal(one, two) for one, two in zip(before, here, strict=True))
        whole.found_inf = torch.tensor(0.0)
        step(whole, here, number)
    assert all(torch.equal(one, two) for one, two in zip(here, there, strict=True))
    assert whole.state_dict()["param_groups"] == other.state_dict()["param_groups"]


def test_prodigy_trains_a_text_part_at_its_own_rate(config: MakeConfig) -> None:
    text = TextConfig(tokens=("disc",), rank=2)
    settings = {"optimizer": "prodigy", "learning_rate": 1.0, "tuner": ("skip", "text"), "text": text, "steps": 3}
    half, whole = (
        load_tuner(train(config(text_learning_rate=rate, name=str(rate), **settings), verbose=False).path)
        for rate in (0.5, 1.0)
    )
    different = {name for name, value in whole.state_dict().items() if not torch.equal(half.state_dict()[name], value)}
    assert any(name.startswith("text") for name in different), different


def test_adafactor_moves_weights_that_are_zero() -> None:
    zero = torch.nn.Parameter(torch.zeros(4, 4))
    zero.grad = torch.ones(4, 4)
    make_optimizer("adafactor", [zero], learning_rate=1e-3, weight_decay=0.0).step()
    torch.testing.assert_close(zero.detach(), torch.full((4, 4), -1e-3))


@pytest.mark.parametrize(("name", "module"), [("lion", "lion_pytorch"), ("adamw8bit", "bitsandbytes.optim")])
def test_a_library_that_is_not_installed_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        TrainingError, match=rf"optimizer {name} needs .*pip install 'restune-diffusion\[optimizers\]'"
    ):
        make_optimizer(name, weights(), learning_rate=1.0, weight_decay=0.0)


CASES: dict[str, dict[str, Any]] = {
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0, "lr_scheduler": "cosine"},
    "adafactor": {"optimizer": "adafactor", "ema_decay": 0.9},
    "lion": {
        "optimizer": "lion",
        "learning_rate": 1e-4,
        "lr_scheduler": "cosine_with_restarts",
        "lr_num_cycles": 2,
        "timestep_sampling": "logit_normal",
        "input_perturbation": 0.1,
    },
    "steps": {"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:2,0.5:4,0.1", "debiased_estimation": True},
    "power": {"lr_scheduler": "polynomial", "lr_power": 2.0, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_the_uninterrupted(config: MakeConfig, case: str) -> None:
    settings = config(steps=5, checkpoint_every=2, checkpoints_kept=9, **CASES[case])
    whole = train(settings, verbose=False)
    kept = whole.path.rename(whole.path.with_name("whole.safetensors"))
    for late in ("checkpoint-000004", "checkpoint-000005"):
        for file in (settings.output / late).iterdir():
            file.unlink()
        (settings.output / late).rmdir()
    resumed = train(settings.model_copy(update={"resume": True}), verbose=False)
    assert resumed.losses == whole.losses[2:]
    assert_same(resumed.path, kept)


def test_the_course_of_the_rate_is_the_one_asked_for(config: MakeConfig) -> None:
    rates: dict[str, list[float]] = {}
    for name, settings in {"steps": CASES["steps"], "power": CASES["power"]}.items():
        made = config(name=name, steps=5, **{**settings, "gradient_checkpointing": False})
        seen: list[float] = []
        train(made, verbose=False, on_progress=lambda report, seen=seen: seen.append(report.learning_rate))
        rates[name] = seen
    assert rates["steps"] == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4, 1e-4])
    # to 1e-7 in five steps, by the square of what is left
    assert rates["power"] == pytest.approx([(1e-3 - 1e-7) * (1 - n / 5) ** 2 + 1e-7 for n in range(5)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "prodigy"}, "set it to 1"),
        ({"snr_gamma": 5.0, "debiased_estimation": True}, "choose one loss weighting"),
        ({"min_timestep": 5, "max_timestep": 5}, "min_timestep must be below"),
        ({"lr_step_rules": "1:2,0.5"}, "lr_step_rules and lr_scheduler = piecewise_constant need each other"),
        (
            {"lr_scheduler": "piecewise_constant"},
            "lr_step_rules and lr_scheduler = piecewise_constant need each other",
        ),
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "fast"}, "lr_step_rules"),
        ({"drop_encoders": True, "validation": {"prompts": ["a"]}}, "need the encoders"),
        ({"learnin_rate": 1.0}, "no setting learnin_rate; did you mean learning_rate"),
        ({"validation": {"promts": ["a"]}}, "no setting promts; did you mean prompts"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: MakeConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_what_decides_the_result_is_recorded(config: MakeConfig) -> None:
    recorded = config(optimizer="lion", ema_decay=0.99, noise_offset=0.1, min_timestep=3).recorded()
    chosen = {"optimizer": "lion", "ema_decay": 0.99, "noise_offset": 0.1, "min_timestep": 3}
    assert chosen.items() <= recorded.items()
