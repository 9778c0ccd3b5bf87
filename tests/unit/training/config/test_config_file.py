from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from restune_diffusion.storage.tuner_file import load_tuner, read_info
from restune_diffusion.training import TrainConfig, ValidationConfig, read_config, train
from restune_diffusion.training.config.config_file import config_yaml, given_settings
from restune_diffusion.training.config.presets import PRESETS
from restune_diffusion.training.config.train_config import SETTINGS
from restune_diffusion.training.config.tuner_settings import without_aliases
from restune_diffusion.tuners.configs import TextConfig
from restune_diffusion.utils.errors import SettingsError

MakeConfig = Callable[..., TrainConfig]

NEEDED = "base: b\ndata: d\noutput: o\n"


def refusal(folder: Path, text: str | bytes) -> str:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SettingsError) as caught:
        read_config(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError) as unfinished:
        given_settings(path)
    assert str(unfinished.value) == str(caught.value), "the command line prints the same message"
    return str(caught.value).removeprefix(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps: 3", ", line 4: there is no setting stepps; did you mean steps?"),
        ("skip:\n  ratoi: 3", ", line 5: in skip there is no setting ratoi; did you mean ratio?"),
        ("skip:\n  qqq: 3", ", line 5: in skip there is no setting qqq; valid names are part, ratio, sites"),
        ("steps: many", ", line 4: steps: many is not valid; use a whole number above 0"),
        ("skip:\n  ratio: 30", ", line 5: skip.ratio: 30 is not valid; use a number above 0, up to 8"),
        (
            "validation:\n  prompts:\n  - a fox\n  - 3",
            ", line 7: validation.prompts.1: 3 is not valid; use a list",
        ),
        ("validation:\n  prompts: a fox", ", line 5: validation.prompts: a fox is not valid; use a list of texts"),
        ("skip: 3", ", line 4: skip: 3 is not valid; use a group of named settings"),
        ("tuner: lokr", ", line 4: tuner: lokr is not valid; use bypass, control,"),
        ("preset: speed", ", line 4: preset: speed is not valid; use style, subject,"),
        ("steps: 3\nsteps: 4", ", line 5: duplicate setting steps, first set in line 4; keep one"),
        ("skip:\n  ratio: 1\n  ratio: 2", ", line 6: duplicate setting skip.ratio, first set in line 5"),
        ("steps: 3\n\tseed: 4", ", line 5: this is not valid YAML: tab character; indent with spaces"),
        ("prompt: [a", ", line 4: this is not valid YAML: expected ',' or ']'"),
        ("prompt: 2024-99-99", ": this is not valid YAML: month must be in 1..12"),
        ("prompt: !!python/object/apply:os.getcwd []", ", line 4: this is not valid YAML: could not determine"),
        ("prompt: " + "[" * 1_000, ", line 4: settings are nested deeper than 20 levels"),
        ("prompt: &a [*a]", ", line 4: prompt: [[...]] is not valid; use text in quotes"),
        ("x: &x {steps: many}\n<<: *x", ", line 4: there is no setting x"),
        ("<<: {steps: many}", ": steps: many is not valid; use a whole number above 0"),
        ("? [a, b]\n: 3", ", line 4: this is not valid YAML: found unhashable key"),
        ("1: 2", ", line 4: there is no setting 1; restune train --help lists them all"),
        ("prompt: a\0b", ": this is not valid YAML: unacceptable character #x0000"),
        ("prompt: " + "a" * (1 << 20), " is larger than 1,048,576 bytes"),
    ],
)
def test_what_cannot_be_used_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, NEEDED + text).startswith(message)


def test_files_that_are_no_settings_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, "- base: b\n- steps: 3") == (
        ": the file must contain settings as `name: value`, one per line"
    )
    assert "is not UTF-8 text" in refusal(tmp_path, b"base: b\nprompt: \xff\xfea")
    assert "line 2" in refusal(tmp_path, b"base: b\nprompt: \xff\xfea")
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        read_config(tmp_path / "gone.yaml")
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        read_config(tmp_path)


def test_missing_and_unfitting_settings_are_told(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("base: b\ndata: d\n")
    with pytest.raises(SettingsError, match="output: this setting is required"):
        read_config(path)
    path.write_text(NEEDED + "lr_warmup_steps: 3\n")
    with pytest.raises(SettingsError, match="a constant learning rate has no warm-up"):
        read_config(path)
    with pytest.raises(SettingsError, match=r"^steps: 0 is not valid; use a whole number above 0$"):
        read_config(path, steps=0)


def test_later_layers_win_name_by_name(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        NEEDED
        + "preset: low-memory\nlearning_rate: 5e-4\nbypass: {ratio: 0.5}\nvalidation: {prompts: [a], every: 3}\n"
    )
    config = read_config(path, steps=7, validation={"every": 4})
    preset = PRESETS["low-memory"].settings
    assert (config.tuner, config.gradient_accumulation_steps) == ("bypass", preset["gradient_accumulation_steps"])
    assert config.optimizer.learning_rate == 5e-4 != preset["learning_rate"]
    assert config.steps == 7 != PRESETS["low-memory"].length
    assert config.bypass.ratio == 0.5
    assert config.validation == ValidationConfig(prompts=("a",), every=4)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_same_from_python_file_and_layers(name: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(NEEDED + f"preset: {name}\n")
    here = TrainConfig(base="b", data=Path("d"), output=Path("o"), preset=name)
    assert read_config(path) == here
    assert TrainConfig(**given_settings(None, name, {"base": "b", "data": "d", "output": "o"})) == here
    assert TrainConfig(**here.model_dump()) == here, "applied twice it does nothing more"
    for key, value in without_aliases({}, PRESETS[name].settings).items():
        own = SETTINGS[key].of(here)
        assert (own.model_dump(include=set(value)) if isinstance(value, dict) else own) == value, key


def test_settings_of_a_preset_for_a_part_that_is_not_trained_mean_nothing() -> None:
    config = TrainConfig(base="b", data=Path("d"), output=Path("o"), preset="subject", tuner="skip")
    assert config.optimizer.text_learning_rate == PRESETS["subject"].settings["text_learning_rate"]
    with pytest.raises(ValueError, match="no text part"):
        TrainConfig(base="b", data=Path("d"), output=Path("o"), preset="subject", tuner="skip", text_learning_rate=1)


def test_python_suggests_the_nearest_name_too() -> None:
    needed = {"base": "b", "data": "d", "output": "o"}
    with pytest.raises(ValueError, match=r"there is no setting stepps; did you mean steps\?"):
        TrainConfig(**needed, stepps=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"in skip there is no setting ratoi; did you mean ratio\?"):
        TrainConfig(**needed, skip={"ratoi": 3})  # type: ignore[arg-type]


def test_yaml_keeps_every_setting(tmp_path: Path) -> None:
    control = tmp_path / "über.png"
    config = TrainConfig(
        base="user/base",
        data=tmp_path / "d",
        output=tmp_path / "o",
        prompt="a: 'dog' # not a comment\n- \u200bno list ☃ yes",
        tuner=("control", "text"),
        text=TextConfig(tokens=("<dog>",), initializers=("on",), alpha=0.1 + 0.2),
        learning_rate=1e-5,
        lr_scheduler="piecewise_constant",
        lr_step_rules="1:30,0.1",
        max_timestep=900,
        validation=ValidationConfig(prompts=("yes",), control_images=(control,)),
    )
    path = tmp_path / "run.yaml"
    path.write_text(config_yaml(config), encoding="utf-8")
    assert read_config(path) == config
    assert "part" not in yaml.safe_load(path.read_text(encoding="utf-8"))["text"]


def test_the_written_config_repeats_the_run(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = config(output=Path("one"), steps=2, preset="quality", batch_size=2, seed=5)
    one = train(settings, verbose=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    two = train(read_config(tmp_path / "one" / "config.yaml", output=tmp_path / "two"), verbose=False)
    assert one.losses == two.losses
    first, second = (load_tuner(tmp_path / name / "tuner.safetensors").state_dict() for name in ("one", "two"))
    assert all(first[key].equal(second[key]) for key in first)
    recorded = [read_info(tmp_path / name / "tuner.safetensors").training["config"] for name in ("one", "two")]
    assert recorded[0] == recorded[1]
