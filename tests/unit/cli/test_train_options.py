from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from restune_diffusion.cli.train import parse_train_options
from restune_diffusion.storage.tuner_file import load_tuner, save_tuner
from restune_diffusion.training import TrainConfig, read_config
from restune_diffusion.training.config.presets import PRESETS
from restune_diffusion.tuners.configs import ResConfig
from restune_diffusion.utils.errors import SettingsError

Restune = Callable[..., tuple[int, str, str]]

FILE = """\
base: b
data: d
output: o
preset: style
steps: 30
tuner: skip
skip: {ratio: 0.5}
validation:
  prompts: [a fox, a hen]
  every: 10
"""


def parse(*args: str) -> TrainConfig:
    return parse_train_options("", args).settings()


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    config = parse("--config", str(path), "--output", "p", "--validation.every=5", "--skip.sites", "skip.0")
    assert (config.base, config.output, config.steps) == ("b", Path("p"), 30)
    assert (config.skip.ratio, config.skip.sites) == (0.5, ("skip.0",))
    assert (config.validation.prompts, config.validation.every) == (("a fox", "a hen"), 5)
    assert (
        config.batch_size == PRESETS["style"].settings["batch_size"] != TrainConfig.model_fields["batch_size"].default
    )
    other = parse("--output", "p", f"--config={path}", "--preset", "quality")
    assert (other.preset, other.steps) == ("quality", 30)
    assert other.optimizer.ema_decay == PRESETS["quality"].settings["ema_decay"]


def test_flags_and_file_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    flags = ["--base=b", "--data=d", "--output=o", "--preset=style", "--steps=30", "--tuner=skip"]
    flags.append("--skip.ratio=0.5")
    assert parse(*flags, "--validation.every=10", "--validation.prompts", "a fox", "a hen") == read_config(path)


LORA = ("--base=b", "--data=d", "--output=o")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--tuner", "lora"], {}),
        (["--tuner=lora"], {}),
        (["--tuner", "lora", "--res.feed-forward", "lora"], {"feed_forward": "lora"}),
        (["--tuner", "lora", "--res.width", "4", "--res.alpha", "2"], {"width": 4, "alpha": 2.0}),
        (["--preset", "lora"], {}),
        (["--preset", "lora", "--res.width", "8"], {"width": 8}),
        (["--preset", "style", "--tuner", "lora"], {"width": 64, "grad_depth": 3}),
    ],
)
def test_the_tuner_lora_is_a_res_tuner_of_lora(flags: list[str], expected: dict[str, object]) -> None:
    config = parse(*LORA, *flags)
    plain = {"self_attention": "lora", "cross_attention": "lora", "feed_forward": None}
    assert config.parts == (ResConfig(**{**plain, **expected}),)
    # The run records what the alias stands for.
    assert config.tuner == "res"


def test_the_tuner_lora_in_a_file_and_in_python(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("base: b\ndata: d\noutput: o\ntuner: [lora, text]\nres: {cross_attention: prefix}\n")
    expected = ResConfig(self_attention="lora", cross_attention="prefix", feed_forward=None)
    assert parse("--config", str(path)).parts[0] == read_config(path).parts[0] == expected
    assert read_config(path).tuner == ("res", "text")
    settings = {"base": "b", "data": Path("d"), "output": Path("o"), "tuner": "lora"}
    (part,) = TrainConfig(**settings, res=ResConfig(width=3)).parts
    assert part == ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=3)
    with pytest.raises(ValueError, match="name one or more tuner families, each once"):
        TrainConfig(**{**settings, "tuner": ("res", "lora")})


def test_a_scripts_own_default_lies_between_preset_and_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("base: b\ndata: d\noutput: o\npreset: style\n")
    control = {"tuner": "control"}
    assert parse_train_options("", ["--config", str(path)], defaults=control).tuner == "control"
    path.write_text(path.read_text() + "tuner: [skip, control]\n")
    assert parse_train_options("", ["--config", str(path)], defaults=control).tuner == ("skip", "control")
    assert parse_train_options("", ["--config", str(path), "--tuner", "skip"], defaults=control).tuner == "skip"


def test_a_preset_and_another_tuner_fit_together() -> None:
    assert parse("--base=b", "--data=d", "--output=o", "--preset=style", "--tuner=skip").kinds == ("skip",)
    needed = ("--base=b", "--data=d", "--output=o", "--preset=subject")
    assert parse(*needed, "--tuner", "skip").kinds == ("skip",)
    assert parse(*needed).kinds == ("skip", "text")


def test_bad_files_and_flags_end_in_one_sentence(restune: Restune, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 3\nvalidation:\n  evry: 3\n")
    code, _, errors = restune("train", "--config", path, "--base=b", "--data=d", "--output=o")
    assert code == 1
    assert errors == f"restune: {path}, line 3: in validation there is no setting evry; did you mean every?\n"
    path.write_text("lr_warmup_steps: 3\n")
    for arguments, message in [
        (("--config", path, "--base=b", "--data=d", "--output=o"), "a constant learning rate has no warm-up"),
        (("--config", path), "--data, --base and --output are required."),
        (("--config",), "--config needs a value; use a path."),
        (("--preset", "styel"), "--preset styel is not valid; use style, subject,"),
        (
            ("--base=b", "--data=d", "--output=o", "--stepps=3"),
            "--stepps is not an option of restune train; did",
        ),
    ]:
        code, _, errors = restune("train", *arguments)
        shown = " ".join(errors.replace("│", " ").split())
        assert (code, message in shown, "Traceback" in errors) == (2, True, False), errors
    with pytest.raises(SettingsError, match="cannot be read"):
        parse("--config", str(tmp_path / "gone.yaml"))


def test_help_lists_what_presets_set(restune: Restune) -> None:
    _, output, _ = restune("train", "--help")
    shown = " ".join(output.split())
    for name, preset in PRESETS.items():
        assert f"{name}: {preset.describe()}" in shown
    assert "--config PATH" in output


def test_help_begins_with_the_most_used_flags_and_shows_each_flag_once(restune: Restune) -> None:
    _, output, _ = restune("train", "--help")
    flags = re.findall(r"^    --([\w.-]+)", output, re.MULTILINE)
    used = "base data output preset tuner steps epochs resolution batch-size learning-rate prompt trigger-word"
    assert flags[:16] == [*used.split(), "validation.prompts", "seed", "resume", "config"]
    assert len(set(flags)) == len(flags) > 90
    titles = re.findall(r"^(\w.*)\n-+$", output, re.MULTILINE)
    assert [title for title in titles if not title.startswith("Tuner `")] == [
        *("Most used", "Presets", "Base and data", "Tuner", "Optimization", "Loss and noise"),
        *("Distillation", "Preservation of the class", "Precision and memory", "Validation"),
        "Output, checkpoints and logging",
    ]
    assert output.startswith("usage: restune train [--help] --base BASE --data FOLDER --output FOLDER [OPTIONS]\n")
    # A preset changes the defaults that the page shows.
    assert "    --batch-size N\n        Images per forward pass and process. (default: 1)" in output
    with_preset = restune("train", "--preset", "style", "--help")[1]
    assert "process. (default: 4)" in with_preset
    assert "(default: 64)" in with_preset
    for words in ("{None}", "Annotated", "typing.", "default: None", "default: False"):
        assert words not in output


def test_help_texts_wrap_at_the_width_of_the_terminal(restune: Restune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    lines = [line.strip("│ ") for line in restune("train", "--help")[1].splitlines()]
    for flag in ("--control-data", "--bucketing", "--skip.grad-depth", "--class-data"):
        (start,) = [number for number, line in enumerate(lines) if line.startswith(flag)]
        after = range(start + 1, len(lines))
        end = next(number for number in after if not lines[number] or lines[number].startswith("--")) - 1
        assert end > start + 1, "several lines"
        for line, following in zip(lines[start + 1 : end], lines[start + 2 : end + 1], strict=True):
            assert len(f"{line} {following.split()[0]}") > 95, "a line is filled before the next one begins"


def test_a_tuners_recorded_settings_train_it_again(restune: Restune, workplace: Path, tmp_path: Path) -> None:
    tuner = workplace / "trained" / "disc.safetensors"
    code, text, errors = restune("inspect", tuner, "--config")
    assert code == 0, errors
    path = tmp_path / "run.yaml"
    path.write_text(text)
    config = read_config(path, base=str(workplace / "base"), data=workplace / "images", output=tmp_path / "out")
    assert (config.name, config.steps, config.optimizer.learning_rate) == ("disc", 3, 0.1)
    code, _, errors = restune(
        "train", "--config", path, "--base", workplace / "base", "--data", workplace / "images",
        "--output", tmp_path / "out", "--cpu",
    )  # fmt: skip
    assert code == 0, errors
    assert (tmp_path / "out" / "disc.safetensors").stat().st_size == tuner.stat().st_size


def test_a_file_without_recorded_settings_is_reported(restune: Restune, workplace: Path, tmp_path: Path) -> None:
    save_tuner(load_tuner(workplace / "trained" / "disc.safetensors"), tmp_path / "bare.safetensors", training={})
    code, _, errors = restune("inspect", tmp_path / "bare.safetensors", "--config")
    assert (code, errors.count("\n")) == (1, 1)
    assert "records no training settings" in errors


def test_scripts_take_files(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"base: {workplace / 'base'}\ndata: {workplace / 'images'}\noutput: {tmp_path / 'out'}\n"
        "steps: 1\ncpu: true\ncheckpoint_every: 0\ncontrol: {conditions: [canny]}\n"
    )
    script = Path(__file__).parents[3] / "train" / "train_control.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--config", str(path), "--name=edges"])
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(script), run_name="__main__")
    assert exited.value.code == 0
    assert (tmp_path / "out" / "edges.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--text-learning-rate=1",), "a text learning rate is given, but the tuner to train has no text part"),
        (("--steps=0",), "--steps 0 is not valid; use a whole number above 0."),
        (("--lr-warmup-steps=3",), "a constant learning rate has no warm-up"),
        (("--name=../x",), "--name ../x is not valid; use letters, digits,"),
    ],
)
def test_no_message_of_a_flag_has_the_wording_of_pydantic(
    restune: Restune, flags: tuple[str, ...], message: str
) -> None:
    code, _, errors = restune("train", "--base=b", "--data=d", "--output=o", *flags)
    shown = " ".join(errors.replace("│", " ").split())
    assert (code, message in shown, errors.count("\n")) == (2, True, 1), errors
    assert not [word for word in ("validation error", "type=", "input_value", "Value error, ") if word in shown], (
        errors
    )


@pytest.mark.parametrize(
    ("data", "output", "message"),
    [
        ("missing", "out", "The image folder missing does not exist; give the path of a folder of images."),
        (
            ".",
            "file/out",
            "The output folder file/out cannot be created, because {folder}/file is a file; choose another.",
        ),
    ],
)
def test_wrong_folders_are_refused_before_torch_is_imported(
    tmp_path: Path, data: str, output: str, message: str
) -> None:
    (tmp_path / "file").touch()
    code = (
        "import sys\nfrom restune_diffusion.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
        "    print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    arguments = ["train", "--base=b", f"--data={data}", f"--output={output}"]
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 1
    assert process.stderr == f"restune: {message.format(folder=tmp_path)}\n"
    assert process.stdout == "[]\n"
