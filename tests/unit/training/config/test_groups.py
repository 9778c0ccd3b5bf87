"""Settings in groups: `affects` annotations, and compatibility with old names, files and records."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from restune_diffusion.cli.train import parse_train_options
from restune_diffusion.training import TrainConfig, ValidationConfig, read_config
from restune_diffusion.training.checkpoint import _check_same_run
from restune_diffusion.training.config.config_file import config_yaml, given_settings, recorded_yaml
from restune_diffusion.training.config.optimizer import OptimizerConfig
from restune_diffusion.training.config.renamed import RENAMED, RenamedSettingWarning
from restune_diffusion.training.config.shared_settings import OF_THE_OUTPUT, OF_THE_TUNER, SWEPT, batch_settings
from restune_diffusion.training.config.train_config import SETTINGS
from restune_diffusion.utils.errors import SettingsError, TrainingError
from restune_diffusion.utils.setting_groups import SettingGroup, all_settings, group_of, is_annotated, setting
from restune_diffusion.utils.settings import Settings

from ....conftest import ROOT

BEFORE = ROOT / "tests" / "files" / "before_groups"
NEEDED: dict[str, Any] = {"base": "b", "data": Path("d"), "output": Path("o")}
FLAT = """\
base: b
data: ./d
output: ./o
prompt: a fox
optimizer: lion
learning_rate: 3e-5
class_prompt: a dog
preservation: output
noise_offset: 0.1
cpu: true
feature_cache_dtype: bf16
checkpoint_every: 7
snr_gamma: 5
validation: {prompts: [a hen], every: 3}
"""
GROUPED = """\
base: b
data: {folder: ./d, prompt: a fox}
output: ./o
optimizer: {name: lion, learning_rate: 3e-5}
preservation: {method: output, class_prompt: a dog}
noise:
  noise_offset: 0.1
memory: {cpu: true}
feature_cache: {dtype: bf16}
checkpoints: {every: 7}
loss: {snr_gamma: 5}
validation: {prompts: [a hen], every: 3}
"""
FLAGS = [
    *("--base=b", "--data=./d", "--output=./o", "--prompt", "a fox", "--optimizer", "lion", "--learning-rate", "3e-5"),
    *("--class-prompt", "a dog", "--preservation", "output", "--noise-offset", "0.1", "--cpu", "--snr-gamma", "5"),
    *("--feature-cache-dtype", "bf16", "--checkpoint-every", "7", "--validation.every", "3"),
    *("--validation.prompts", "a hen"),
]


class Inner(SettingGroup):
    rate: float = 1.0


class Speed(SettingGroup):
    value: float = setting(1.0, affects="tuner", flat="rate")


def read(folder: Path, text: str) -> TrainConfig:
    path = folder / "run.yaml"
    path.write_text(text)
    return read_config(path)


def test_the_annotations_give_the_lists_that_were_kept_by_hand() -> None:
    assert {
        "bypass", "optimizer", "learning_rate", "text_learning_rate", "weight_decay", "lr_scheduler",
        "lr_warmup_steps", "lr_num_cycles", "lr_power", "lr_step_rules", "ema_decay", "max_grad_norm", "snr_gamma",
        "debiased_estimation", "consistency", "consistency_sigma", "steps",
    } == OF_THE_TUNER  # fmt: skip
    # Both what no batch depends on and what a resumed run may change.
    assert {
        "name", "preset", "validation", "checkpoint_every", "checkpoints_kept", "log_with", "drop_encoders",
        "gradient_checkpointing",
    } == OF_THE_OUTPUT  # fmt: skip
    assert (OF_THE_TUNER - {"bypass"}) | {
        "epochs", "seed", "batch_size", "caption_dropout", "noise_offset", "input_perturbation", "timestep_sampling",
        "logit_mean", "logit_std", "min_timestep", "max_timestep",
    } == SWEPT  # fmt: skip
    assert {name for name, info in SETTINGS.items() if info.record is None} == {
        "data", "mask_data", "output", "control_data", "class_data", "feature_cache_dir", "sweep", "resume", "cpu",
        "class_batch_size", "epochs", "init_tuner", "save_every", "keep_last", "keep", "best_by",
        "patience",
        "teacher", "teacher_prompts", "prompts_file", "teacher_loss_weight", "teacher_latents", "teacher_steps",
        "teacher_guidance", "teacher_batch_size", "teacher_latents_dir",
    }  # fmt: skip
    assert {name for name, info in SETTINGS.items() if info.affects in ("order", "content")} == {
        "base", "vae", "prompt", "batch_size", "gradient_accumulation_steps", "captions", "shuffle_tags", "keep_tags",
        "keep_tags_separator", "tag_dropout", "wildcards", "caption_variants",
    }  # fmt: skip
    validation = all_settings(ValidationConfig)
    assert {name for name, info in validation.items() if info.record is None} == {
        "control_images", "holdout", "holdout_seed", "loss_every", "metrics", "metric_images",
    }  # fmt: skip
    assert {info.affects for info in validation.values()} == {"output"}


def test_every_field_says_what_it_affects() -> None:
    families = {"tuner", "skip", "control", "res", "bypass", "text"}
    for name, field in TrainConfig.model_fields.items():
        group = group_of(field)
        fields = group.model_fields if group is not None else {name: field}
        assert all(is_annotated(each) for inner, each in fields.items() if inner not in families), name

    class Unsaid(Settings):
        inner: Inner = Inner()

    with pytest.raises(TypeError, match=r"inner\.rate does not declare what it affects"):
        all_settings(Unsaid)

    class Twice(Settings):
        rate: float = setting(1.0, affects="tuner")
        speed: Speed = Speed()

    with pytest.raises(TypeError, match="two settings with the flat name rate"):
        all_settings(Twice)


def test_flat_files_groups_flags_and_python_give_the_same(tmp_path: Path) -> None:
    flat = read(tmp_path, FLAT)
    assert flat.optimizer == OptimizerConfig(name="lion", learning_rate=3e-5)
    assert (flat.data.folder, flat.data.prompt, flat.memory.cpu) == (Path("d"), "a fox", True)
    assert (flat.preservation.method, flat.checkpoints.every, flat.feature_cache.dtype) == ("output", 7, "bf16")
    assert (flat.loss.snr_gamma, flat.noise.noise_offset) == (5, 0.1)
    assert read(tmp_path, GROUPED) == flat
    assert parse_train_options("", FLAGS).settings() == flat
    assert TrainConfig(**yaml.safe_load(FLAT)) == TrainConfig(**yaml.safe_load(GROUPED)) == flat
    changed = flat.model_copy(update={"learning_rate": 2e-5})
    assert TrainConfig(**{**flat.model_dump(), "learning_rate": 2e-5}) == changed != flat
    assert TrainConfig(**{"learning_rate": 2e-5, **flat.model_dump()}) == flat


def test_instances_of_groups_are_taken_and_leave_the_presets_other_settings() -> None:
    config = TrainConfig(**NEEDED, preset="style", optimizer=OptimizerConfig(ema_decay=0.5))
    assert (config.optimizer.ema_decay, config.optimizer.learning_rate) == (0.5, 5e-4)
    assert config.optimizer.lr_scheduler == "cosine"


@pytest.mark.parametrize("text", [FLAT, GROUPED])
def test_flags_win_over_files_of_either_form(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    config = parse_train_options("", ["--config", str(path), "--learning-rate", "1", "--data=e"]).settings()
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("lion", 1)
    assert (config.data.folder, config.data.prompt) == (Path("e"), "a fox")
    assert read_config(path, learning_rate=1.0, data={"folder": "e"}) == config


def test_the_written_config_is_in_groups(tmp_path: Path) -> None:
    config = read(tmp_path, FLAT)
    written = yaml.safe_load(config_yaml(config))
    assert written["optimizer"]["name"] == "lion"
    assert written["data"]["folder"] == str(Path("d").absolute())
    assert "learning_rate" not in written
    assert "resume" not in written["checkpoints"]
    (tmp_path / "again.yaml").write_text(config_yaml(config))
    again = read_config(tmp_path / "again.yaml")
    assert again == config.model_copy(update={"data": Path("d").absolute(), "output": Path("o").absolute()})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer:\n  learning_rte: 3", "line 5: in optimizer there is no setting learning_rte; did you mean learn"),
        ("learning_rte: 3", "line 4: there is no setting learning_rte; did you mean learning_rate?"),
        (
            "loss:\n  learning_rate: 3",
            "line 5: in loss there is no setting learning_rate; did you mean optimizer.lear",
        ),
        ("optimizer:\n  learning_rate: -3", "line 5: optimizer.learning_rate: -3 is not valid; use a number above 0"),
        ("learning_rate: -3", "line 4: learning_rate: -3 is not valid; use a number above 0"),
        ("learning_rate: 1\noptimizer: {learning_rate: 2}", "learning_rate is given twice, as learning_rate and opt"),
        ("noise: 3", "line 4: noise: expected a group of named settings"),
        ("optimizer: sgd", "line 4: optimizer: sgd is not valid; use adamw, adamw8bit,"),
        ("feature_bank: many", "line 4: feature_bank: many is not valid; use a whole number above 0"),
        ("validation:\n  leak_prompts: 3", "line 5: validation.leak_prompts: 3 is not valid; use a list of texts"),
        ("feature_bank: 3\nfeature_cache: 4", "line 4: feature_bank is the old name of feature_cache, which is"),
    ],
)
@pytest.mark.filterwarnings("ignore::restune_diffusion.training.config.renamed.RenamedSettingWarning")
def test_what_cannot_be_used_is_told_as_it_was_written(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"base: b\ndata: d\noutput: o\n{text}\n")
    with pytest.raises(SettingsError) as read_error:
        read_config(path)
    assert message in str(read_error.value)
    with pytest.raises(SettingsError) as given_error:
        given_settings(path)
    assert str(given_error.value) == str(read_error.value)


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_works_and_tells_the_new_one(old: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value: Any = {
        "feature_bank": 4, "feature_bank_dtype": "bf16", "feature_bank_dir": "c", "validation.leak_prompts": ["a hen"],
    }[old]  # fmt: skip
    new = RENAMED[old]

    def nested(name: str) -> dict[str, Any]:
        *groups, last = name.split(".")
        return {groups[0]: {last: value}} if groups else {last: value}

    needed = {**NEEDED, "tuner": "bypass"}
    expected = TrainConfig(**needed, **nested(new))
    assert expected != TrainConfig(**needed)
    with pytest.warns(RenamedSettingWarning) as warned:
        assert TrainConfig(**needed, **nested(old)) == expected
    assert [str(each.message) for each in warned] == [
        f"{old} is now called {new}; the old name will be removed in the next release"
    ]
    assert warned[0].filename == __file__, "it points at the caller"

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"base": "b", "data": "d", "output": "o", "tuner": "bypass", **nested(old)}))
    with pytest.warns(RenamedSettingWarning, match=rf"run.yaml, line \d: {old} is now called {new};"):
        assert read_config(path) == expected

    assert parse_train_options("", ["--config", str(path)]).settings() == expected
    assert capsys.readouterr().err.count(f"{old} is now called {new};") == 1
    given = value if isinstance(value, list) else [str(value)]
    flag, new_flag = (f"--{name.replace('_', '-')}" for name in (old, new))
    flags = ["--base=b", "--data=d", "--output=o", "--tuner=bypass"]
    for arguments in ([flag, *given], [f"--{old}", *given], [f"{flag}={given[0]}"]):
        assert parse_train_options("", [*flags, *arguments]).settings() == expected
        shown = capsys.readouterr().err
        assert (shown.count("\n"), f"is now called {new_flag};" in shown) == (1, True)


def test_an_old_name_of_a_group_works_alone_too() -> None:
    with pytest.warns(RenamedSettingWarning, match="validation.drift_prompts"):
        assert ValidationConfig(leak_prompts=("a",)) == ValidationConfig(drift_prompts=("a",))  # type: ignore[call-arg]


def test_a_setting_is_read_and_copied_under_its_flat_name() -> None:
    config = TrainConfig(**NEEDED, tuner="bypass", feature_cache=3)
    with pytest.warns(RenamedSettingWarning, match=r"config\.learning_rate is now called config\.optimizer\.learning"):
        assert config.learning_rate == config.optimizer.learning_rate  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        _ = config.learning_rat  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy = config.model_copy(update={"resume": True, "steps": 3, "feature_cache": None, "data": Path("e")})
    assert (copy.checkpoints.resume, copy.steps, copy.feature_cache.draws, copy.data.folder) == (
        True, 3, None, Path("e"),
    )  # fmt: skip
    assert config.feature_cache.draws == 3
    with pytest.raises(ValueError, match="did you mean resume"):
        config.model_copy(update={"resum": True})


@pytest.mark.filterwarnings("ignore::restune_diffusion.training.config.renamed.RenamedSettingWarning")
def test_a_config_and_a_record_of_before_hold() -> None:
    config = read_config(BEFORE / "config.yaml")
    assert (config.feature_cache.draws, config.feature_cache.dtype) == (4, "bf16")
    assert config.feature_cache.folder == Path("/banks")
    assert (config.optimizer.name, config.optimizer.learning_rate, config.optimizer.ema_decay) == ("lion", 3e-5, 0.9)
    assert (config.data.folder, config.data.mask_data) == (Path("/images"), Path("/masks"))
    assert config.validation.drift_prompts == ("a hen", "a cow")
    assert (config.memory.cpu, config.checkpoints.every, config.checkpoints.kept) == (True, 11, 4)
    before = yaml.safe_load((BEFORE / "config.yaml").read_text())
    for name, value in before.items():
        if name not in {"validation", "bypass"}:
            now = SETTINGS[RENAMED.get(name, name)].of(config)
            assert now == (Path(value) if isinstance(now, Path) else type(now)(value) if now is not None else value)
    assert json.dumps(config.recorded()) + "\n" == (BEFORE / "recorded.json").read_text()
    batches = json.loads((BEFORE / "batches.json").read_text())
    assert json.dumps(batch_settings(config)) == json.dumps(batches)
    for name in ("base", "prompt", "batch_size", "gradient_accumulation_steps"):
        del batches[name]
    assert json.dumps(batch_settings(config, order=False)) == json.dumps(batches), "the folder's key is the same"


def test_a_record_is_read_under_either_name() -> None:
    record = json.loads((BEFORE / "recorded.json").read_text())
    shown = yaml.safe_load(recorded_yaml(record))
    assert (shown["feature_cache"], shown["feature_cache_dtype"]) == (4, "bf16")
    assert shown["validation"]["drift_prompts"] == ["a hen", "a cow"]
    assert recorded_yaml(shown) == recorded_yaml(record)
    config = TrainConfig(**{**shown, **NEEDED, "masked_loss": None, "unmasked_weight": 0.1})
    assert config.feature_cache.draws == 4
    _check_same_run(Path("c"), {"feature_bank": 4, "seed": 0}, {"feature_cache": 4, "seed": 0})
    _check_same_run(Path("c"), {"feature_cache": 4, "seed": 0}, {"feature_bank": 4, "seed": 0})
    with pytest.raises(TrainingError, match="cannot be resumed with feature_cache = 5, because it was made with 4"):
        _check_same_run(Path("c"), {"feature_bank": 4}, {"feature_bank": 5})


def test_an_existing_folder_of_features_is_still_used(tmp_path: Path) -> None:
    config = TrainConfig(**{**NEEDED, "output": tmp_path})
    assert config.feature_cache_folder == tmp_path / "feature-cache"
    (tmp_path / "feature-bank").mkdir()
    assert config.feature_cache_folder == tmp_path / "feature-bank"
    assert config.model_copy(update={"feature_cache_dir": Path("x")}).feature_cache_folder == Path("x")


def test_help_has_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_train_options("", ["--help"])
    shown = capsys.readouterr().out
    for name in SETTINGS:
        if name not in {"validation", "skip", "control", "res", "bypass", "text"}:
            assert re.search(rf"^\W+--{name.replace('_', '-')}\b(?!-)", shown, re.MULTILINE), name
