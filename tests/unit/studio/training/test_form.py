"""The form, the command and the YAML of a run are three views of the same settings."""

from __future__ import annotations

import shlex

import pytest
import yaml

from restune_diffusion.cli.train import read_train_command
from restune_diffusion.storage.base_files.location import BUNDLED_BASE
from restune_diffusion.studio.training.settings.command_line import command_arguments, command_line
from restune_diffusion.studio.training.settings.fields import all_fields
from restune_diffusion.studio.training.settings.form import form_values, other_settings, settings_of
from restune_diffusion.studio.training.settings.pasted import check_places, read_pasted
from restune_diffusion.studio.training.settings.purposes import Device, purpose_of, suggested_steps, suggestion
from restune_diffusion.studio.workspace import Workspace
from restune_diffusion.training import TrainConfig
from restune_diffusion.utils.errors import RestuneError, UsageError
from restune_diffusion.utils.yaml_file import to_yaml

PLACES = {"base": "base", "data": "data", "output": "out"}
RUNS = [
    {"preset": "style", "steps": 100, "trigger_word": "ink style", "validation": {"prompts": ["a fox", "it's -1"]}},
    {"preset": "style", "res": {"grad_depth": None, "width": 8}, "flip": True, "caption_dropout": 0.0},
    {"preset": "subject", "text": {"tokens": ["<miu>"], "initializers": ["cat"]}, "class_prompt": "a cat"},
    {"preset": "low-memory", "mixed_precision": "no", "feature_cache": 4, "bypass": {"ratio": 1.0}},
    {"preset": "lora", "res": {"feed_forward": "lora"}, "optimizer": "prodigy", "learning_rate": 1.0},
    {"preset": "quality", "ema_decay": None},
    {"tuner": "control", "control": {"conditions": ["canny", "palette"]}},
    {"tuner": ["bypass", "skip"], "skip": {"grad_depth": 1}, "validation": {"holdout": 0.1, "loss_every": 5}},
    {"tuner": ["skip", "text"], "text": {"tokens": ["<a>", "<b>"], "initializers": ["x", "y"]}, "snr_gamma": 5.0},
    {"class_prompt": "a dog", "preservation": "prior", "num_class_images": 3, "background": [0, 0, 0], "epochs": 2.0},
]


@pytest.mark.parametrize("settings", RUNS, ids=str)
def test_the_form_gives_back_every_config(settings):
    config = TrainConfig(**PLACES, **settings)
    again = settings_of(form_values(config), other_settings(config), PLACES, config.preset)
    assert TrainConfig(**again) == config


@pytest.mark.parametrize("settings", RUNS, ids=str)
def test_command_and_yaml_give_the_same_config(settings):
    config = TrainConfig(**PLACES, **settings)
    shown = settings_of(form_values(config), other_settings(config), PLACES, config.preset)
    assert read_pasted(command_line(shown), {}, read_train_command) == config
    assert read_pasted(to_yaml(shown), {}, read_train_command) == config
    assert shlex.split(command_line(shown))[2:] == command_arguments(shown)
    assert yaml.safe_load(to_yaml(shown)) == shown


def test_only_what_differs_from_the_preset_is_shown():
    config = TrainConfig(**PLACES, preset="style", steps=100, learning_rate=5e-4)
    shown = settings_of(form_values(config), other_settings(config), PLACES, "style")
    assert command_line(shown) == "restune train --base base --data data --output out --preset style --steps 100"


def test_settings_that_do_not_matter_for_the_tuner_are_left_out():
    values = form_values(TrainConfig(**PLACES, preset="style"))
    values |= {"text.tokens": "<x>", "skip.ratio": 3, "feature_cache": "4"}
    assert settings_of(values, {}, PLACES, "style") == {**PLACES, "preset": "style"}
    matter = {field.name for field in all_fields() if field.matters(["bypass"])}
    assert {"bypass.ratio", "feature_cache", "trigger_word"} <= matter
    assert not {"res.width", "skip.ratio", "text.tokens", "text_learning_rate", "gradient_checkpointing"} & matter


@pytest.mark.parametrize(("text", "value"), [("", None), (" 0.5 ", 0.5), ("4", 4), ("many", "many"), ("0", 0)])
def test_a_number_that_may_be_missing_is_read_from_text(text, value):
    field = next(field for field in all_fields() if field.name == "ema_decay")
    assert field.parsed(text) == value
    assert field.of(TrainConfig(**PLACES)) == ""
    assert field.of(TrainConfig(**PLACES, ema_decay=0.999)) == "0.999"


def test_a_command_on_several_lines_with_foreign_flags_is_translated():
    text = """accelerate launch train_text_to_image_lora.py \\
        --pretrained_model_name_or_path base --train_data_dir data \\
        --max_train_steps 7 --rank 8 --output_dir "my out" """
    config = read_pasted(text, PLACES, read_train_command)
    assert (config.steps, config.res.width, config.kinds) == (7, 8, ("res",))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("restune train --stepz 3", "--stepz is not an option"),
        ("restune train --steps none", "--steps"),
        ("restune train --name 'a", "quotation marks"),
        ("restune train --config /etc/passwd", "reads a file"),
        ("restune train --config_file=/etc/passwd", "reads a file"),
        ("restune train --help", "asks for help"),
        ("restune train --sweep 'lr=1,2'", "sweep"),
        ("stepz: 3", "line 1.*did you mean steps"),
        ("steps: [", "not valid YAML"),
        ("steps: 3\nsteps: 4", "line 2.*duplicate"),
        ("", "no text"),
        ("x" * 200_000, "longer than"),
        ("$(touch /tmp/x)", "settings as `name: value`"),
    ],
)
def test_a_mistake_in_pasted_text_is_one_sentence(text, reason):
    with pytest.raises(RestuneError, match=reason):
        read_pasted(text, PLACES, read_train_command)


def test_pasted_paths_stay_in_the_folders_of_the_studio(tmp_path):
    workspace = Workspace(tmp_path / "home", [tmp_path / "mine"])
    workspace.create()
    (tmp_path / "mine").mkdir()
    inside = {**PLACES, "data": str(workspace.data / "cats")}

    def check(**settings):
        return check_places(TrainConfig(**{**inside, **settings}), workspace, ["base"])

    assert check().data.folder == workspace.data / "cats"
    assert check(data=str(tmp_path / "mine")).data.folder == tmp_path / "mine"
    assert check(base="owner/name").base == "owner/name"
    for settings in (
        {"data": "/etc"},
        {"data": str(workspace.data / ".." / "runs")},
        {"base": "/etc/passwd"},
        {"vae": "/etc"},
        {"init_tuner": "/etc/passwd"},
        {"validation": {"holdout": "/etc"}},
        {"teacher": "/etc/x.safetensors"},
        {"masked_loss": "files", "mask_data": str(tmp_path / "other")},
    ):
        with pytest.raises(UsageError):
            check(**settings)


def test_suggestions_follow_base_data_and_device():
    bundled, other = str(BUNDLED_BASE), "owner/name"
    assert suggested_steps("style", other, 40, 4) == 1000
    assert suggested_steps("style", other, 5, 4) == 250
    assert suggested_steps("subject", other, 5, 1) == 800
    assert suggested_steps("style", bundled, 40, 4) == 240
    on_gpu = suggestion("style", other, 40, Device(gpu=True, bf16=True))
    assert (on_gpu["mixed_precision"], on_gpu["learning_rate"], on_gpu["checkpoint_every"]) == ("bf16", 5e-4, 250)
    assert suggestion("low-memory", other, 40, Device())["mixed_precision"] == "no"
    for purpose in ("style", "subject", "control", "low-memory", "lora", "quality", "custom"):
        preset = None if purpose in ("control", "custom") else purpose
        values = suggestion(purpose, bundled, 24, Device())
        config = TrainConfig(**settings_of({**values, "name": "t"}, {}, {**PLACES, "base": bundled}, preset))
        assert purpose_of(config.preset, config.kinds) == purpose
        assert config.steps == 240
