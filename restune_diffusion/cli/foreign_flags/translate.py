"""Translate a command line of diffusers' or kohya's training scripts into ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ...utils.errors import SettingsError
from .diffusers import DIFFUSERS
from .entry import ForeignFlag, NotTranslated
from .kohya import KOHYA
from .kohya_toml import from_toml

Program: TypeAlias = Literal["diffusers", "kohya"]

TABLES: Mapping[Program, Mapping[str, ForeignFlag]] = {
    "diffusers": {flag.name: flag for flag in DIFFUSERS},
    "kohya": {flag.name: flag for flag in KOHYA},
}
_FILES = ("config_file", "dataset_config")
# A tuner that is given goes before the one that the script's flags stand for.
_COMBINED = {"--tuner", "--res.width", "--res.alpha", "--folder-repeats", "--preservation", "--masked-loss"}


@dataclass(frozen=True)
class Translation:
    """Command line in our flags, and notices about flags that were ignored."""

    program: Program | None
    arguments: list[str]
    notices: list[str]


def translate(arguments: Sequence[str], own: Collection[str]) -> Translation:
    """Return arguments in which another program's flags are ours; a line without any is returned as it is.

    Args:
        arguments: arguments of `restune train`.
        own: names of our settings, with `_`.

    Raises:
        SettingsError: if a flag or its value has no equivalent; the message names the remedy.
    """
    program = _program(arguments, own)
    if program is None:
        return Translation(None, list(arguments), [])
    table = TABLES[program]
    result: list[str] = []
    notices: list[str] = []
    seen: dict[str, list[str]] = {}
    rest = from_toml(arguments, table) if program == "kohya" else list(arguments)
    native = {f"--{name.replace('_', '-')}" for name, _, _ in map(_split, arguments) if name and name not in table}
    while rest:
        argument = rest.pop(0)
        name, equals, value = _split(argument)
        flag = table.get(name)
        if flag is None:
            result.append(argument)
            continue
        values = [value] if equals else []
        if not equals and flag.takes != "nothing":
            while rest and not rest[0].startswith("--") and (flag.takes == "values" or not values):
                values.append(rest.pop(0))
        if name == "resume" and not values:
            result.append(argument)
            continue
        given = argument.partition("=")[0]
        if flag.takes != "nothing" and not values:
            raise SettingsError(f"{given} of {program} needs a value.")
        seen[name] = values
        if flag.verdict == "ignored":
            notices.append(f"{given} is ignored: {flag.note}.")
            continue
        if flag.convert is None:
            raise SettingsError(f"{given} of {program} has no equivalent; {flag.note}.")
        try:
            converted = flag.convert(values)
            twice = native & {each for each in converted if each.startswith("--")} - _COMBINED
            if twice:
                raise SettingsError(f"{given} of {program} and {min(twice)} set the same; give one of them.")
            result += converted
        except NotTranslated as refused:
            shown = " ".join([given, *values])
            raise SettingsError(f"{shown} of {program} has no equivalent; {refused}.") from refused
    return Translation(program, _together(program, result, seen, notices), notices)


def _together(program: Program, ours: list[str], seen: Mapping[str, list[str]], notices: list[str]) -> list[str]:
    """Return our arguments after the rules that concern several flags."""
    if "unet_lr" in seen and "learning_rate" in seen:
        ours = _without(ours, "--learning-rate", 1)
        ours += ["--learning-rate", *seen["unet_lr"]]
    ours = _warmup(_one_length(program, ours, seen, notices), seen, notices)
    if program == "diffusers" and "center_crop" not in seen and "--crop" not in ours:
        notices.append("Images are cropped at the center; the script crops at random: add --crop random.")
    if "text_encoder_lr" in seen and not _trains_text(program, seen, ours):
        ours = _without(ours, "--text-learning-rate", 1)
        notices.append("--text_encoder_lr is ignored: the text encoders are not trained.")
    chosen = any(argument.partition("=")[0] == "--preset" for argument in ours)
    text_only = "network_train_text_encoder_only" in seen
    tuner_given = any(argument.partition("=")[0] == "--tuner" for argument in ours)
    derived = {"train_text_encoder", "network_train_unet_only", "network_train_text_encoder_only"} & seen.keys()
    lora = {"rank", "lora_alpha", "network_module", "network_dim", "network_alpha", *derived} & seen.keys()
    if not lora:
        if not chosen and not tuner_given:
            notices.append("The tuner is that of --tuner, by default `skip`; --rank N trains LoRA.")
        return ours
    if chosen or (tuner_given and not derived):
        return ours
    for flag in ("--res.width", "--res.alpha"):
        ours = _without(ours, flag, 1)
    while "--tuner" in ours:
        start = ours.index("--tuner")
        end = start + 1
        while end < len(ours) and not ours[end].startswith("--"):
            end += 1
        ours = ours[:start] + ours[end:]
    rank = (seen.get("rank") or seen.get("network_dim") or ["4"])[0]
    alpha = (seen.get("lora_alpha") or seen.get("network_alpha") or (["1"] if program == "kohya" else [rank]))[0]
    with_text = "train_text_encoder" in seen or (program == "kohya" and "network_train_unet_only" not in seen)
    parts = ["text"] if text_only else ["res", "text"] if with_text else ["res"]
    ours += ["--tuner", *parts]
    if "res" in parts:
        forward = "lora" if program == "kohya" else "None"
        ours += ["--res.self-attention", "lora", "--res.cross-attention", "lora", "--res.feed-forward", forward]
        ours += ["--res.projections", "lora"] if program == "kohya" else []
        ours += ["--res.width", rank, "--res.alpha", alpha]
    return ours + (["--text.rank", rank, "--text.alpha", alpha] if "text" in parts else [])


def _trains_text(program: Program, seen: Mapping[str, list[str]], ours: Sequence[str]) -> bool:
    """Return whether the text encoders may be trained; a tuner or preset that is given decides for itself."""
    if program == "kohya" and "network_train_unet_only" in seen:
        return False
    lora = program == "kohya" and {"network_module", "network_dim"} & seen.keys()
    own = any(argument.partition("=")[0] in ("--tuner", "--preset") for argument in ours)
    return bool("train_text_encoder" in seen or lora or own)


def _one_length(program: Program, ours: list[str], seen: Mapping[str, list[str]], notices: list[str]) -> list[str]:
    """Return our arguments with one length: steps go before epochs in diffusers, epochs before steps in kohya."""
    epochs = "max_train_epochs" if program == "kohya" else "num_train_epochs"
    if epochs not in seen or "max_train_steps" not in seen:
        return ours
    used, other = (epochs, "max_train_steps") if program == "kohya" else ("max_train_steps", epochs)
    notices.append(f"--{other} is ignored: --{used} takes precedence, as in the script.")
    return _without(ours, "--steps" if program == "kohya" else "--epochs", 1)


def _warmup(ours: list[str], seen: Mapping[str, list[str]], notices: list[str]) -> list[str]:
    if "lr_warmup_steps" not in seen:
        return ours
    (given,) = seen["lr_warmup_steps"]
    if seen.get("lr_scheduler", ["constant"]) == ["constant"]:
        if given not in ("0", "0.0"):
            notices.append("--lr_warmup_steps is ignored: the schedule `constant` has no warm-up.")
        return _without(ours, "--lr-warmup-steps", 1)
    try:
        share = float(given.removesuffix("%")) / (100 if given.endswith("%") else 1)
    except ValueError:
        return ours
    if given.endswith("%") or 0 < share < 1:
        steps = seen.get("max_train_steps")
        if steps is None or not steps[0].isdecimal():
            raise SettingsError(f"--lr_warmup_steps {given} is a share of the steps; give --max_train_steps too.")
        return [*_without(ours, "--lr-warmup-steps", 1), "--lr-warmup-steps", str(int(share * int(steps[0])))]
    return ours


def _without(arguments: list[str], flag: str, values: int) -> list[str]:
    while flag in arguments:
        start = arguments.index(flag)
        arguments = arguments[:start] + arguments[start + 1 + values :]
    return arguments


def _program(arguments: Sequence[str], own: Collection[str]) -> Program | None:
    """Return the program whose flags these are, by those that only it has."""
    names = {_split(argument)[0] for argument in arguments} - set(own)
    counts = {
        program: len(names & {*table, *(_FILES if program == "kohya" else ())}) for program, table in TABLES.items()
    }
    return None if not any(counts.values()) else "kohya" if counts["kohya"] > counts["diffusers"] else "diffusers"


def _split(argument: str) -> tuple[str, str, str]:
    flag, equals, value = argument.partition("=")
    return (flag[2:].replace("-", "_") if flag.startswith("--") else ""), equals, value
