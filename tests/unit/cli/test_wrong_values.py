"""Every setting refuses wrong values in one sentence: on the command line, in YAML and in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from restune_diffusion import ResConfig
from restune_diffusion.cli.foreign_flags.translate import TABLES
from restune_diffusion.cli.options.flag_check import check_flags, flags_of
from restune_diffusion.cli.options.short_names import _OF_COMMAND, name_here
from restune_diffusion.cli.train import TrainOptions
from restune_diffusion.data.config import DataConfig
from restune_diffusion.training import TrainConfig, read_config
from restune_diffusion.training.config.train_config import current_settings
from restune_diffusion.training.config.tuner_settings import command_line_class
from restune_diffusion.utils.errors import SettingsError, UsageError
from restune_diffusion.utils.expected import expected

Restune = Callable[..., tuple[int, str, str]]
NEEDED = {"base": "b", "data": "d", "output": "o"}
FOREIGN = ("Input should", "input should", "validation error", "type=", "Value error", "pydantic", "Extra inputs")


def leaves() -> Iterator[tuple[str, Any]]:
    """Yield the dotted name of each setting under which flags, YAML and Python take it, and its field."""
    for name, info in current_settings().items():
        inner = info.field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            for own, field in inner.model_fields.items():
                if own != "part":
                    yield f"{name}.{own}", field
        else:
            yield name, info.field


LEAVES = dict(leaves())


def wrong_texts(field: Any) -> list[str]:
    """Return texts that a field of numbers or choices does not allow; other fields take any text."""
    kinds = [each for each in get_args(field.annotation) or (field.annotation,) if each is not type(None)]
    bounds = [(name, getattr(each, name)) for each in field.metadata for name in ("gt", "ge", "lt", "le")
              if getattr(each, name, None) is not None]  # fmt: skip
    outside = [str({"gt": limit, "ge": limit - 1, "lt": limit, "le": limit + 1}[name]) for name, limit in bounds]
    if bool in kinds or Path in kinds:
        return []
    if int in kinds or float in kinds:
        return ["many", *outside, *(["1.5"] if int in kinds else [])]
    if all(isinstance(each, str) for each in kinds) or any(get_origin(each) is Literal for each in kinds):
        return ["nonsense"]
    return []


def assert_sentence(text: str, name: str, value: str, field: Any) -> None:
    assert not [word for word in FOREIGN if word in text], text
    assert "\n" not in text
    assert name in text
    assert value in text
    assert expected(field) in text


def nested(name: str, value: Any) -> dict[str, Any]:
    return reduce(lambda inner, part: {part: inner}, reversed(name.split(".")), value)


NUMBERS_AND_CHOICES = [(name, text) for name, field in LEAVES.items() for text in wrong_texts(field)]


def test_the_sweep_covers_the_settings() -> None:
    assert len(LEAVES) > 90
    assert len({name for name, _ in NUMBERS_AND_CHOICES}) > 50


def test_wrong_flags_are_one_sentence() -> None:
    options = command_line_class(TrainOptions)
    for name, text in NUMBERS_AND_CHOICES:
        flag = f"--{name.replace('_', '-')}"
        for arguments in ([flag, text], [f"{flag}={text}"], [f"--{name}", text]):
            with pytest.raises(UsageError) as refused:
                check_flags("train", options, arguments, present=NEEDED)
            assert_sentence(str(refused.value), arguments[0].partition("=")[0], text, LEAVES[name])
            assert str(refused.value).endswith(".")
    # A flag without its value, and a switch with one.
    for name, field in LEAVES.items():
        flag, switch = f"--{name.replace('_', '-')}", field.annotation is bool
        several = any(get_origin(each) is tuple for each in (field.annotation, *get_args(field.annotation)))
        if not several:
            with pytest.raises(UsageError, match=f"^{flag} {'takes no value' if switch else 'needs a value; use '}"):
                check_flags("train", options, [flag, *(["true"] if switch else [])], present=NEEDED)


def test_wrong_values_of_every_type_in_yaml_and_python_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    found = 0
    for name, field in LEAVES.items():
        for value in (3, 1.5, -1, True, "nonsense", [1], ["x"], {"a": 1}, None):
            settings = {**NEEDED, **nested(name, value)}
            path.write_text(yaml.safe_dump(settings))
            with_groups: dict[str, str] = {}
            for source, make in (("yaml", lambda: read_config(path)), ("python", lambda: TrainConfig(**settings))):  # noqa: B023
                try:
                    make()
                except SettingsError as refused:
                    with_groups[source] = str(refused)
            assert len(with_groups) in (0, 2), (name, value, with_groups)
            for text in with_groups.values():
                found += 1
                assert not [word for word in FOREIGN if word in text], text
                assert "\n" not in text
                assert name.rpartition(".")[2] in text or "not valid" not in text, text
                if "is not valid; use" in text:
                    assert expected(field) in text or name == "tuner" or "[" in text, text
    assert found > 700


def test_python_names_setting_value_and_what_is_allowed() -> None:
    for make, message in (
        (lambda: TrainConfig(**NEEDED, batch_size=0), "batch_size: 0 is not valid; use a whole number above 0"),
        (lambda: TrainConfig(**NEEDED, res={"width": "x"}), "res.width: x is not valid; use a whole number above 0,"),
        (
            lambda: TrainConfig(**NEEDED, lr_step_rules="x"),
            "lr_step_rules: x is not valid; use factors with the steps",
        ),
        (lambda: TrainConfig(base="b", data="d"), "output: this setting is required"),
        (lambda: ResConfig(width=-3), "width: -3 is not valid; use a whole number above 0, up to 4096"),
        (lambda: DataConfig(folder="x", crop="left"), "crop: left is not valid; use center or random"),
        (
            lambda: DataConfig(folder="x", background=(1, 2)),
            "background: (1, 2) is not valid; use three whole numbers",
        ),
    ):
        with pytest.raises(SettingsError) as refused:
            make()
        assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--num-steps", "3"), "--num-steps is not an option of restune generate; give --steps."),
        (("generate", "--neg", "x"), "--neg is not an option of restune generate; give --negative-prompt."),
        (("generate", "--cfg=3"), "--cfg is not an option of restune generate; give --guidance."),
        (("generate", "-n", "3"), "-n is not an option of restune generate; give --images."),
        (("generate", "--model", "x"), "--model is not an option of restune generate; give --base."),
        (("generate", "--guidnce", "3"), "--guidnce is not an option of restune generate; did you mean --guidance?"),
        (("generate", "--prompt", "x"), "restune: --base is required."),
        (("generate", "--base", "x"), "restune: --prompt is required."),
        (("grid", "--batch-size", "3"), "give --columns-at-once."),
        (("evaluate", "--lora", "x"), "--lora is not an option of restune evaluate; give --tuner."),
        (("evaluate", "--n", "3"), "give --limit."),
        (("convert", "a", "b", "--format", "kohya"), "--format is not an option of restune convert; give --to."),
        (("convert", "--in", "a"), "--in is not an option of restune convert; give the input as the first argument."),
        (("convert", "a", "--to", "kohya"), "The arguments SOURCE and OUTPUT are required."),
        (("convert", "a", "b"), "restune: --to is required."),
        (
            ("convert", "a", "b", "--to", "lycoris"),
            "--to lycoris is not valid; use restune, diffusers, kohya or swift.",
        ),
        (("merge", "a", "--ratios", "1"), "give a weight after a colon, as in FILE:0.8."),
        (("merge", "a", "-o", "x"), "-o is not an option of restune merge; give --output."),
        (("demo", "--steps", "0"), "--steps 0 is not valid; use a whole number above 0."),
        (("generate", "--device", "cuda:0"), "--device cuda:0 is not valid; use auto, cpu, cuda or mps."),
        (("data", "inspect", "x", "--resolution", "0"), "--resolution 0 is not valid; use a whole number above 0."),
        (("data", "inspect", "x", "--crop-variants", "5"), "crop_variants is for random crops; set crop to random."),
        (("train", "--lr", "1"), "--lr is not an option of restune train; give --learning-rate."),
        (("train", "--epochs-num", "1"), "--epochs-num is not an option of restune train; give --epochs."),
        (("train", "--base", "x"), "--data and --output are required."),
        (("trian",), "there is no command trian; did you mean train?"),
    ],
)
def test_mistakes_of_other_commands_are_one_sentence(
    restune: Restune, arguments: tuple[str, ...], message: str
) -> None:
    code, _, errors = restune(*arguments)
    assert (code, errors.count("\n")) == (2, 1), errors
    assert errors.rstrip("\n").endswith(message), errors


def test_no_name_of_another_program_is_one_of_ours_or_translated() -> None:
    from restune_diffusion.cli.app import _COMMANDS

    commands = {**_COMMANDS, "train": TrainOptions}
    for command, names in _OF_COMMAND.items():
        own = {name[2:] for name, _ in flags_of(commands[command])}
        for ours, theirs in names.items():
            assert not own & set(theirs.split()) or ours.startswith("the "), (command, ours)
            assert len(set(theirs.split())) == len(theirs.split())
            if ours.startswith("--"):
                flags = {part.lstrip("-") for part in ours.split() if part.startswith("--")}
                assert flags <= own, (command, ours)
    translated = {name.replace("_", "-") for table in TABLES.values() for name in table}
    assert not translated & {name for theirs in _OF_COMMAND["train"].values() for name in theirs.split()}
    assert name_here("generate", "steps") is None


@pytest.mark.parametrize("share", ["1.0", "2.0"])
def test_a_share_of_all_images_is_refused_with_what_is_allowed(restune: Restune, share: str) -> None:
    """A float without a fractional part is a valid number of its field, so the field's own rule refuses it."""
    code, _, errors = restune("train", "--base=b", "--data=d", "--output=o", f"--validation.holdout={share}")
    assert code == 2
    assert f"validation.holdout = {share} is not valid; use a fraction between 0 and 1" in errors
