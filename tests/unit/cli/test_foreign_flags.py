"""Every flag of diffusers' and kohya's training scripts ends in its verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from restune_diffusion.cli.foreign_flags.entry import ForeignFlag
from restune_diffusion.cli.foreign_flags.page import page
from restune_diffusion.cli.foreign_flags.translate import TABLES, translate
from restune_diffusion.cli.train import _translated, parse_train_options
from restune_diffusion.training import TrainConfig
from restune_diffusion.training.config.train_config import SETTINGS
from restune_diffusion.utils.errors import SettingsError

from ...conftest import ROOT

FLAGS = [(program, flag) for program, table in TABLES.items() for flag in table.values()]
# A line that each program's flag is added to, and a flag that only this program has.
LINES = {
    "diffusers": ["--pretrained_model_name_or_path=b", "--instance_data_dir=d", "--output_dir=o", "--hub_token=x"],
    "kohya": ["--pretrained_model_name_or_path=b", "--train_data_dir=d", "--output_dir=o", "--sdpa", "--lowram"],
}
# Flags that our settings accept only together with others.
COMPANIONS = {
    "num_class_images": ["--with_prior_preservation", "--class_prompt=c"],
    "prior_loss_weight": ["--preservation=output", "--class-prompt=c"],
    "class_data_dir": ["--with_prior_preservation", "--class_prompt=c"],
    "with_prior_preservation": ["--class_prompt=c"],
    "reg_data_dir": ["--class-prompt=c"],
    "lr_warmup_steps": ["--lr_scheduler=cosine"],
    "text_encoder_lr": ["--tuner", "skip", "text"],
    "bucket_no_upscale": ["--enable_bucket"],
    "masked_loss": ["--conditioning_data_dir=m"],
}


def config(*arguments: str) -> TrainConfig:
    return parse_train_options("", arguments).settings()


@pytest.mark.parametrize(("program", "flag"), FLAGS, ids=lambda each: getattr(each, "name", each))
def test_a_flag_ends_in_its_verdict(
    program: str, flag: ForeignFlag, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sample = list(flag.sample)
    if flag.name == "sample_prompts":
        (tmp_path / "prompts.txt").write_text("a fox --n bad --w 512\n# a comment\n\na hen\n")
        sample = [str(tmp_path / "prompts.txt")]
    line = [each for each in LINES[program] if each.partition("=")[0] != f"--{flag.name}"]
    line += [*COMPANIONS.get(flag.name, []), f"--{flag.name}", *sample]
    if flag.verdict == "refused":
        with pytest.raises(SettingsError, match=f"^--{flag.name} .*of {program} has no equivalent; "):
            _translated(line)
        return
    translated = _translated(line)
    shown = capsys.readouterr().err
    assert f"flags of {program}, translated: restune train" in shown
    assert (f"--{flag.name} is ignored" in shown) is (flag.verdict == "ignored")
    assert not any(argument.startswith(f"--{flag.name}") for argument in translated if "_" in flag.name)
    if flag.verdict == "translated":
        for ours in (word for word in flag.ours.split() if word.startswith("--") and flag.name != "network_module"):
            assert ours in translated, shown


# Flags that exclude each other or need others, each parsed on a line of its own.
APART = {
    "debiased_estimation_loss", "alpha_mask", "network_train_text_encoder_only", "reg_data_dir", "prior_loss_weight",
    "conditioning_data_dir",
}  # fmt: skip


@pytest.mark.parametrize("program", TABLES)
def test_translated_flags_are_valid_settings(program: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox --n bad --w 512\n# a comment\n\na hen\n")
    flags = [flag for flag in TABLES[program].values() if flag.verdict == "translated"]
    lines = {flag.name: [f"--{flag.name}", *(flag.sample or ())] for flag in flags}
    if program == "kohya":
        lines["sample_prompts"] = ["--sample_prompts", str(prompts)]
    together = [word for name, line in lines.items() if name not in APART for word in line]
    settings = config(*together)
    assert (settings.optimizer.lr_scheduler, settings.optimizer.lr_warmup_steps) == ("cosine", 5)
    assert (settings.noise.noise_offset, settings.loss.snr_gamma) == (0.1, 5.0)
    assert (settings.steps, settings.epochs) == ((None, 5) if program == "kohya" else (5, None))
    if program == "kohya":
        assert settings.validation.prompts == ("a fox", "a hen")
    for name in APART & lines.keys():
        if program == "kohya":
            config(*LINES[program], *COMPANIONS.get(name, []), *lines[name])


def test_a_rate_of_text_encoders_that_are_not_trained_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    line = [*LINES["kohya"], "--network_module=networks.lora", "--text_encoder_lr=5e-5"]
    assert config(*line).optimizer.text_learning_rate == 5e-5
    assert config(*line, "--network_train_unet_only").optimizer.text_learning_rate is None
    assert "--text_encoder_lr is ignored: the text encoders are not trained." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"), [(["conv_dim=4"], (4, 1.0)), (["conv_dim=8", "conv_alpha=2"], (8, 2.0))]
)
def test_convolutions_of_kohya_train_with_their_rank(arguments: list[str], expected: tuple[int, float]) -> None:
    res = config(*LINES["kohya"], "--network_module=networks.lora", "--network_args", *arguments).res
    assert res.operations == dict.fromkeys(("self", "cross", "ff", "proj", "conv"), "lora")
    assert (res.conv_width, res.conv_alpha, res.width, res.alpha) == (*expected, 4, 1.0)


@pytest.mark.parametrize("program", TABLES)
def test_all_our_flags_of_the_table_exist(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_train_options("", ["--help"])
    known = capsys.readouterr().out
    for flag in TABLES[program].values():
        for word in flag.ours.split():
            assert not word.startswith("--") or word in known, f"{flag.name}: {word}"


def test_the_dreambooth_command_of_diffusers_works() -> None:
    # In the form of the commands in diffusers' READMEs; not copied from one.
    settings = config(
        "--pretrained_model_name_or_path=runwayml/sd", "--instance_data_dir=dog", "--output_dir=out",
        "--instance_prompt=a photo of sks dog", "--resolution=512", "--train_batch_size=1",
        "--gradient_accumulation_steps=1", "--checkpointing_steps=100", "--learning_rate=1e-4", "--report_to=wandb",
        "--lr_scheduler=constant", "--lr_warmup_steps=0", "--max_train_steps=500",
        "--validation_prompt=A photo of sks dog in a bucket", "--validation_epochs=50", "--seed=0", "--push_to_hub",
    )  # fmt: skip
    assert (settings.base, settings.data.folder, settings.data.prompt) == (
        "runwayml/sd",
        Path("dog"),
        "a photo of sks dog",
    )
    assert (settings.steps, settings.batch_size, settings.checkpoints.every, settings.log_with) == (
        500,
        1,
        100,
        "wandb",
    )
    assert (settings.kinds, settings.validation.prompts) == (("skip",), ("A photo of sks dog in a bucket",))


def test_a_rank_trains_lora_as_the_scripts_do() -> None:
    line = ["--pretrained_model_name_or_path=b", "--instance_data_dir=d", "--output_dir=o", "--rank=8"]
    settings = config(*line)
    assert (settings.kinds, settings.res.width, settings.res.alpha) == (("res",), 8, 8.0)
    assert settings.res.operations == {"self": "lora", "cross": "lora"}
    both = config(*line, "--train_text_encoder")
    assert (both.kinds, both.text.rank) == (("res", "text"), 8)


def test_a_command_of_kohya_with_both_toml_files_works(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        '[model]\npretrained_model_name_or_path = "sd.safetensors"\noutput_dir = "o"\noutput_name = "ink"\n'
        '[train]\nnetwork_module = "networks.lora"\nnetwork_dim = 16\nnetwork_alpha = 8\nmax_train_steps = 400\n'
        'optimizer_type = "AdamW8bit"\nlr_scheduler = "cosine"\nlr_warmup_steps = 0.1\nunet_lr = 2e-4\n'
        "learning_rate = 1e-4\nnetwork_train_unet_only = true\nsdpa = true\ngradient_checkpointing = false\n"
    )
    (tmp_path / "data.toml").write_text(
        "[general]\nenable_bucket = true\n[[datasets]]\nresolution = [768, 768]\nbatch_size = 2\n"
        '[[datasets.subsets]]\nimage_dir = "cats"\nclass_tokens = "a cat"\ncaption_extension = ".txt"\n'
        "shuffle_caption = true\nkeep_tokens = 2\ncaption_tag_dropout_rate = 0.1\nenable_wildcard = true\n"
    )
    settings = config(
        "--config_file", str(tmp_path / "run"), f"--dataset_config={tmp_path / 'data.toml'}", "--max_train_steps=300"
    )
    assert (settings.base, settings.name, settings.steps) == ("sd.safetensors", "ink", 300)
    assert (settings.kinds, settings.res.width, settings.res.alpha) == (("res",), 16, 8.0)
    assert settings.res.operations == {"self": "lora", "cross": "lora", "ff": "lora", "proj": "lora"}
    assert (settings.optimizer.name, settings.optimizer.learning_rate) == ("adamw8bit", 2e-4)
    assert settings.optimizer.lr_warmup_steps == 30
    assert (settings.data.folder, settings.data.prompt, settings.data.resolution) == (Path("cats"), "a cat", 768)
    assert (settings.data.bucketing, settings.batch_size) == (True, 2)
    assert not settings.memory.gradient_checkpointing
    tags = settings.data
    assert (tags.shuffle_tags, tags.keep_tags, tags.tag_dropout, tags.wildcards) == (True, 2, 0.1, True)
    assert (tags.captions, tags.caption_variants, tags.keep_tags_separator) == ("all", 8, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bogus = 1", "bogus in a TOML file is not a setting of kohya's"),
        ("steps = ", "is not valid TOML"),
        ("[train]\nnetwork_args = ['algo=loha']", "--network_args algo=loha of kohya has no equivalent"),
    ],
)
def test_a_bad_toml_file_is_refused(
    restune: Callable[..., tuple[int, str, str]], tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "run.toml").write_text(text)
    code, _, errors = restune("train", "--config_file", tmp_path / "run.toml")
    assert (code, errors.count("\n")) == (1, 1)
    if "network_args" not in text:
        assert message in errors
    assert "network_args" not in text or errors.startswith("restune: --network_args")


def test_our_own_command_lines_stay_as_they_are() -> None:
    own = ["--base", "b", "--data", "d", "--output=o", "--resume", "--learning_rate", "1e-3", "--masked-loss", "alpha"]
    translation = translate(own, {name.replace("-", "_") for name in SETTINGS})
    assert (translation.program, translation.arguments, translation.notices) == (None, own, [])


def test_the_page_of_flags_is_current() -> None:
    assert (ROOT / "docs" / "flags.md").read_text("utf-8") == page(), "run the command at its top"


@pytest.mark.parametrize(
    ("flags", "length"),
    [
        (("--instance_data_dir=d", "--num_train_epochs=3"), (None, 3)),
        (("--instance_data_dir=d", "--num_train_epochs=3", "--max_train_steps=5"), (5, None)),
        (("--train_data_dir=d", "--output_name=x", "--max_train_epochs=3", "--max_train_steps=5"), (None, 3)),
    ],
)
def test_epochs_are_taken_and_one_length_wins_as_in_the_script(
    flags: tuple[str, ...], length: tuple[int | None, int | None]
) -> None:
    settings = config("--pretrained_model_name_or_path=b", "--output_dir=o", *flags)
    assert (settings.steps, settings.epochs) == length


def test_a_random_crop_that_the_script_makes_by_default_is_mentioned() -> None:
    own = {"base", "data"}
    line = ["--pretrained_model_name_or_path=b", "--instance_data_dir=d"]
    notice = "Images are cropped at the center; the script crops at random: add --crop random."
    assert notice in translate(line, own).notices
    assert notice not in translate([*line, "--center_crop"], own).notices
    assert notice not in translate([*line, "--crop", "random"], own).notices


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--train_data_dir=d", "--max_train_steps=2", "--steps=3"),
            "--max_train_steps of .* and --steps set the same",
        ),
        (("--data=d", "--pretrained_model_name_or_path=b", "--base=c"), "--base set the same"),
    ],
)
def test_a_setting_that_is_given_by_both_names_is_refused(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        translate(["--output_dir=o", *flags], {"base", "data", "steps", "output"})


def test_a_length_that_gives_way_is_mentioned() -> None:
    found = translate(
        ["--train_data_dir=d", "--output_name=x", "--max_train_epochs=3", "--max_train_steps=5"], {"data"}
    )
    assert "--max_train_steps is ignored: --max_train_epochs takes precedence, as in the script." in found.notices
    kept = translate(
        ["--train_data_dir=d", "--output_name=x", "--max_train_epochs=3", "--steps", "5"], {"data", "steps"}
    )
    assert kept.arguments.count("--steps") == 1, "our own check refuses both"
