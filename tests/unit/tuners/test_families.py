"""A tuner family in one file, outside the package, and what the program then does with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from restune_diffusion import (
    BaseInfo,
    BypassConfig,
    ControlConfig,
    RestuneError,
    SkipConfig,
    Tuner,
    TunerFileError,
    TunerManager,
    attach,
    load_tuner,
    read_info,
    save_tuner,
)
from restune_diffusion.backbones.site_names import match_sites
from restune_diffusion.cli import main
from restune_diffusion.storage.model_card import model_card
from restune_diffusion.training import TrainConfig, read_config, train
from restune_diffusion.training.config.config_file import config_yaml
from restune_diffusion.training.feature_cache.tap_features import predict_from_features, record_features
from restune_diffusion.training.sweeps.grid import parse_sweep
from restune_diffusion.tuners import (
    ConditionedConfig,
    Features,
    Part,
    PartConfig,
    init_zero,
    pointwise,
    register_tuner_family,
    tuner_families,
    tuner_family,
    unregister_tuner_family,
)
from restune_diffusion.tuners.configs import parts_from_json, parts_to_json
from restune_diffusion.utils.errors import SettingsError, UnknownFamilyError

from ...conftest import ROOT, make_inputs, make_unet, randomize
from ...training_fixtures import base, config, images

__all__ = ["base", "config", "images"]

MakeConfig = Callable[..., TrainConfig]


class ScaleConfig(PartConfig):
    """Learned factor for each channel of the skip connections of a U-Net: `O_j = x_j + s_j * x_j`."""

    part: Literal["scale"] = "scale"
    sites: tuple[str, ...] = ("*",)
    """Patterns of the skip connections, for instance `skip.0-3`."""


class ScalePart(Part):
    """One vector of factors for each skip connection."""

    def __init__(self, config: ScaleConfig, base: BaseInfo) -> None:
        super().__init__()
        self.taps = ()
        self.writes = tuple(match_sites(config.sites, base.skips))
        for site in self.writes:
            self.register_site(site, nn.ParameterList([torch.empty(base.sites[site].channels)]))

    def forward(self, site: str, x: torch.Tensor, features: Features) -> torch.Tensor:
        """Return the residual for a skip feature `(batch, channels, height, width)`."""
        (factors,) = self.at_site[site].parameters()
        return factors[:, None, None] * x.to(factors.dtype)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set all factors to zero."""
        for factors in self.parameters():
            nn.init.zeros_(factors)


class HeadConfig(PartConfig):
    """Linear layer at the output head."""

    writes_at_out_alone: ClassVar[bool] = True

    part: Literal["head"] = "head"
    bias: bool = True


class HeadPart(Part):
    """A zero-initialised linear layer on the output head's input."""

    def __init__(self, config: HeadConfig, base: BaseInfo) -> None:
        super().__init__()
        self.taps = ()
        self.writes = ("out",)
        channels = base.sites["out"].channels
        self.linear = nn.Linear(channels, channels, bias=config.bias)

    def forward(self, site: str, x: torch.Tensor, features: Features) -> torch.Tensor:
        return pointwise(x.to(self.linear.weight.dtype), self.linear)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        init_zero(self.linear)


class SeenConfig(ConditionedConfig):
    """Condition images whose mean weighs what is added at the output head's input."""

    part: Literal["seen"] = "seen"


class SeenPart(Part):
    """Adds `strength * mean(image) * x` at `out`, `x` with its channels in reverse order."""

    def __init__(self, config: SeenConfig, base: BaseInfo) -> None:
        super().__init__()
        self.taps = ()
        self.writes = ("out",)
        self.conditions = config.conditions
        self.channels = config.channels
        self.strength = nn.Parameter(torch.empty(()))

    def encode(self, images: Any, size: tuple[int, int]) -> tuple[dict[str, torch.Tensor], ...]:
        return tuple({} if image is None else {"out": image.mean((1, 2, 3))[:, None, None, None]} for image in images)

    def forward(self, site: str, x: torch.Tensor, features: Features) -> torch.Tensor:
        (levels,) = features.conditions
        return self.strength * levels[site] * x.flip(1)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.zeros_(self.strength)


SUMMARY = "Factor for each channel of the skip connections, for a test."


@contextmanager
def registered(config: type[PartConfig], part: type[Part], summary: str = "Made up for a test.") -> Iterator[None]:
    register_tuner_family(config, summary=summary)(part)
    try:
        yield
    finally:
        unregister_tuner_family(config.model_fields["part"].default)


@pytest.fixture
def scale() -> Iterator[None]:
    """The made-up family, registered while a test runs."""
    before = tuner_families()
    with registered(ScaleConfig, ScalePart, SUMMARY):
        yield
    assert tuner_families() == before
    with pytest.raises(ValidationError, match="there is no setting scale"):
        TrainConfig(base="b", data=Path("d"), output=Path("o"), scale=ScaleConfig())


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exited:
        main([str(argument) for argument in arguments])
    return exited.value.code if isinstance(exited.value.code, int) else 0


def predicted(tuner: Tuner | None) -> torch.Tensor:
    """What a U-Net makes with a tuner."""
    unet = make_unet()
    if tuner is not None:
        attach(unet, tuner)
    with torch.no_grad():
        prediction: torch.Tensor = unet(*make_inputs()).sample
    return prediction


def skips_of(unet: nn.Module) -> list[torch.Tensor]:
    """The skip features that the up blocks of a U-Net get, deep to shallow."""
    got: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        got.extend(reversed(kwargs["res_hidden_states_tuple"]))

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in unet.up_blocks]  # type: ignore[union-attr, operator]
    with torch.no_grad():
        unet(*make_inputs())
    for handle in handles:
        handle.remove()
    return got


# --- what it can do ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("scale")
def test_it_trains(config: MakeConfig) -> None:
    losses: list[float] = []
    settings = config(
        tuner="scale", scale=ScaleConfig(sites=("skip.0-1",)), learning_rate=0.05, steps=30, batch_size=6
    )
    result = train(settings, verbose=False, on_progress=lambda report: losses.append(report.loss))
    assert sum(losses[-8:]) < sum(losses[:8])
    tuner = load_tuner(result.path)
    assert tuner.configs == (ScaleConfig(sites=("skip.0-1",)),)
    factors = dict(tuner.named_parameters())
    assert list(factors) == ["scale.skip.0.0", "scale.skip.1.0"]
    assert all(bool((value != 0).all()) for value in factors.values())
    recorded = read_info(result.path).training["config"]
    assert recorded["scale"] == {"part": "scale", "sites": ["skip.0-1"]}
    assert recorded["tuner"] == "scale"
    assert "skip" not in recorded
    assert f"made with restune-diffusion: scale: {SUMMARY.rstrip('.')}, sites skip.0-1" in model_card(
        read_info(result.path), "user/name"
    )


@pytest.mark.usefixtures("scale")
def test_a_loaded_tuner_predicts_the_same_and_a_fresh_one_as_the_base(tmp_path: Path) -> None:
    tuner = Tuner.for_base(make_unet(), ScaleConfig())
    assert torch.equal(predicted(tuner), predicted(None))
    randomize(tuner)
    save_tuner(tuner, tmp_path / "scale.safetensors")
    prediction = predicted(load_tuner(tmp_path / "scale.safetensors"))
    assert torch.equal(prediction, predicted(tuner))
    assert not torch.allclose(prediction, predicted(None), atol=1e-3)


@pytest.mark.usefixtures("scale")
def test_it_mixes_with_a_skip_tuner() -> None:
    unet = make_unet()
    as_made = skips_of(unet)
    scale, skip = (Tuner.for_base(unet, each) for each in (ScaleConfig(), SkipConfig(ratio=0.5)))
    randomize(scale, 1)
    randomize(skip, 2)
    attach(unet, scale, "scale", 0.5)
    attach(unet, skip, "skip", 2.0)
    mixed = skips_of(unet)
    assert len(mixed) == len(as_made) == 12
    (scale_part,), (skip_part,) = scale.parts(), skip.parts()
    for number, (got, x) in enumerate(zip(reversed(mixed), reversed(as_made), strict=True)):
        site = f"skip.{number}"
        expected = x + 0.5 * scale_part(site, x, Features()) + 2.0 * skip_part(site, x, Features())
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(got, x, atol=1e-3)


@pytest.mark.usefixtures("scale")
def test_the_command_line_shows_and_trains_it(base: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("train", "--help") == 0
    shown = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert f"`scale`: {SUMMARY}" in shown
    assert "{bypass,control,res,skip,text,scale}" in shown
    assert "--scale.sites" in shown
    assert "Patterns of the skip connections, for instance `skip.0-3`." in shown
    wanted = ["train", "--base", base, "--data", images, "--output", tmp_path, "--steps=2", "--cpu"]
    assert run(*wanted, "--tuner", "scale", "--scale.sites", "skip.0", "skip.4", "--checkpoint-every=0") == 0
    capsys.readouterr()
    assert run("inspect", tmp_path / "tuner.safetensors") == 0
    assert "scale       sites skip.0 skip.4\n" in capsys.readouterr().out
    assert run(*wanted, "--tuner", "scael") != 0
    assert "scale" in capsys.readouterr().err
    assert run(*wanted, "--tuner", "skip", "--scale.sites", "skip.1") != 0
    assert "settings of the scale tuner are given, but the tuner to train is skip" in " ".join(
        re.sub(r"[│\s]+", " ", capsys.readouterr().err).split()
    )


@pytest.mark.usefixtures("scale")
def test_it_is_a_group_of_a_configs_settings(config: MakeConfig, tmp_path: Path) -> None:
    both = config(tuner=("skip", "scale"), scale={"sites": ["skip.2"]})
    assert both.parts == (SkipConfig(), ScaleConfig(sites=("skip.2",)))
    assert both.untrained == ("bypass", "control", "res", "text")
    assert config(tuner="scale").parts == (ScaleConfig(),)
    assert config(tuner="scale", preset="quality").ema_decay == 0.999
    path = tmp_path / "run.yaml"
    path.write_text(config_yaml(both))
    assert "scale:\n  sites:\n  - skip.2\n" in path.read_text()
    assert read_config(path) == both
    swept = parse_sweep(config(tuner="scale", sweep="sites=skip.0,skip.1+skip.2"))
    assert [variant.config.parts[0] for variant in swept] == [
        ScaleConfig(sites=("skip.0",)),
        ScaleConfig(sites=("skip.1", "skip.2")),
    ]
    with pytest.raises(ValidationError, match="settings of the scale tuner are given, but the tuner to train is skip"):
        config(scale=ScaleConfig(sites=("skip.1",)))
    lines = "base: b\ndata: d\noutput: o\ntuner: scale\nscale:\n"
    for line, message in {
        "  sites: skip.1": "line 6: scale.sites: it should be a list",
        "  sits: []": "line 6: in scale there is no setting sits; did you mean sites?",
    }.items():
        path.write_text(lines + line)
        with pytest.raises(SettingsError, match=re.escape(message)):
            read_config(path)


def test_a_family_that_writes_at_out_alone_trains_from_a_feature_bank(config: MakeConfig) -> None:
    with registered(HeadConfig, HeadPart):
        settings = {"tuner": "head", "learning_rate": 0.01, "feature_bank_dtype": "fp32", "feature_bank": 2}
        from_bank = load_tuner(train(config(**settings), verbose=False).path)
        swept = parse_sweep(config(**settings, sweep="bias=true,false"))
        assert [variant.config.parts[0] for variant in swept] == [HeadConfig(), HeadConfig(bias=False)]
        assert all(bool(value.abs().sum() > 0) for value in from_bank.parameters())
        unet = make_unet()
        features = record_features(unet, (), *make_inputs())
        tuner = Tuner.for_base(unet, HeadConfig())
        randomize(tuner)
        with torch.no_grad():
            assert torch.equal(predict_from_features(unet, tuner, features), predicted(tuner))
    with registered(ScaleConfig, ScalePart), pytest.raises(ValidationError, match="a feature bank is for"):
        config(tuner="scale", feature_bank=2)


def test_a_family_may_take_condition_images(config: MakeConfig) -> None:
    with registered(SeenConfig, SeenPart):
        trained = load_tuner(train(config(tuner="seen", seen={"conditions": ["canny"]}), verbose=False).path)
        (part,) = trained.parts()
        assert part.strength.item() != 0  # type: ignore[operator, union-attr]
        unet = make_unet()
        tuner = Tuner.for_base(unet, SeenConfig())
        randomize(tuner, std=1.0)
        alone = predicted(None)
        attach(unet, tuner, "seen")
        TunerManager.of(unet).set_conditions("seen", [torch.zeros(1, 3, 8, 8)])  # type: ignore[union-attr]
        with torch.no_grad():
            assert torch.equal(unet(*make_inputs()).sample, alone)
            TunerManager.of(unet).set_conditions("seen", [torch.ones(1, 3, 8, 8)])  # type: ignore[union-attr]
            assert not torch.allclose(unet(*make_inputs()).sample, alone, atol=1e-3)
        with pytest.raises(RestuneError, match="takes condition images, but got control and seen; use one"):
            Tuner.for_base(make_unet(), ControlConfig(), SeenConfig())


# --- what is refused --------------------------------------------------------------------------------------------


def test_a_file_with_an_unknown_part_names_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "scale.safetensors"
    with registered(ScaleConfig, ScalePart):
        save_tuner(Tuner.for_base(make_unet(), ScaleConfig()), path)
        assert read_info(path).configs == (ScaleConfig(),)
    for read in (read_info, load_tuner):
        with pytest.raises(TunerFileError) as caught:
            read(path)  # type: ignore[operator]
        assert str(caught.value) == (
            f"{path} cannot be read: There is no tuner family `scale`, only bypass, control, res, skip, text; install "
            f"the package that provides it, or upgrade restune-diffusion."
        )


def test_names_and_settings_that_cannot_be_used_are_refused() -> None:
    def refusal(config: Any, summary: str = "A summary.") -> str:
        with pytest.raises(RestuneError) as caught:
            register_tuner_family(config, summary=summary)(ScalePart)
        return str(caught.value)

    class Nameless(PartConfig):
        pass

    class Dotted(PartConfig):
        part: Literal["a.b"] = "a.b"

    class Again(PartConfig):
        part: Literal["skip"] = "skip"

    class Needy(PartConfig):
        part: Literal["needy"] = "needy"
        width: int

    before = tuner_families()
    assert 'declare `part: Literal["name"] = "name"`' in refusal(Nameless)
    assert "has the part name 'a.b'; declare" in refusal(Dotted)
    assert refusal(Again) == (
        "The tuner family `skip` is registered already, with SkipConfig of restune_diffusion.tuners.configs.skip; "
        "choose another name."
    )
    assert refusal(Needy) == "The settings of the tuner family `needy` need defaults, but width has none."
    assert "is a subclass of PartConfig, but got <class 'int'>" in refusal(int)
    assert "is one line of text, but got 'two\\nlines'" in refusal(ScaleConfig, "two\nlines")
    assert tuner_families() == before


def test_a_family_cannot_have_the_name_of_a_training_setting_or_of_an_attribute(config: MakeConfig) -> None:
    class StepsConfig(PartConfig):
        part: Literal["steps"] = "steps"

    class SharedConfig(PartConfig):
        part: Literal["shared"] = "shared"

    with registered(StepsConfig, ScalePart), pytest.raises(ValidationError, match=r"`steps` of .* has the name of a"):
        config()
    with registered(SharedConfig, ScalePart), pytest.raises(RestuneError, match="cannot have the name `shared`"):
        Tuner.for_base(make_unet(), SharedConfig())


def test_a_config_of_another_family_is_refused() -> None:
    class SkipToo(PartConfig):
        part: Literal["skip"] = "skip"

    with pytest.raises(RestuneError, match=r"The part `skip` takes a SkipConfig of .*, but got a .*SkipToo of"):
        Tuner.for_base(make_unet(), SkipToo())
    with pytest.raises(UnknownFamilyError, match="no tuner family `scale`, only bypass, control"):
        tuner_family("scale")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "at the list: Invalid JSON: EOF"),
        ("{}", "at the list: Input should be a valid array"),
        ("[3]", "at 0: Input should be an object that names its `part`"),
        ('[{"ratio": 1}]', "at 0: Input should be an object that names its `part`"),
        (
            '[{"part": "skip"}, {"part": "bypass", "ratio": 9}]',
            "at 1.bypass.ratio: Input should be less",
        ),
        ('[{"part": "skip", "width": 9}]', "at 0.skip.width: Extra inputs are not permitted"),
    ],
)
def test_json_that_is_no_list_of_configs_is_refused(text: str, message: str) -> None:
    with pytest.raises(RestuneError, match=re.escape(message)):
        parts_from_json(text)


def test_configs_survive_json() -> None:
    configs = (SkipConfig(ratio=0.25), BypassConfig(taps=("mid",)), ControlConfig(conditions=("canny",)))
    text = parts_to_json(configs)
    assert parts_from_json(text) == configs
    assert json.loads(text)[0] == {"part": "skip", "ratio": 0.25, "sites": ["skip.*"], "grad_depth": None}


# --- families of other packages ---------------------------------------------------------------------------------

FAMILY = """
from typing import Literal
from restune_diffusion.tuners import Part, PartConfig, register_tuner_family

class GlowConfig(PartConfig):
    part: Literal["glow"] = "glow"

@register_tuner_family(GlowConfig, summary="Made up for a test.")
class GlowPart(Part):
    pass
"""


def installed(folder: Path, package: str, source: str) -> None:
    """Lay out a package as pip installs it, with an entry point for a tuner family."""
    (folder / f"{package}.py").write_text(source)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[restune_diffusion.tuner_families]\nfamily = {package}\n")


def test_families_of_installed_packages_are_found_and_broken_ones_told(tmp_path: Path) -> None:
    installed(tmp_path, "glowing", FAMILY)
    installed(tmp_path, "broken", "import a_module_that_is_not_there")
    installed(tmp_path, "taking", FAMILY.replace("glow", "skip").replace("Glow", "Skip"))
    code = """
        import sys
        from restune_diffusion.tuners import tuner_families, tuner_family
        assert "glowing" not in sys.modules, "loaded before the first lookup"
        print(*(family.name for family in tuner_families()))
        print(tuner_family("glow").part.__name__, len(tuner_families()))
        from restune_diffusion.training import TrainConfig
        print(TrainConfig(base="b", data="d", output="o", tuner="glow").parts)
    """
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", textwrap.dedent(code)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "bypass control res skip text glow",
        "GlowPart 6",
        "(GlowConfig(part='glow'),)",
    ]
    assert done.stderr.count("UserWarning") == 2
    assert (
        "The package broken provides the tuner family `family`, but it cannot be loaded (ModuleNotFoundError: No "
        "module named 'a_module_that_is_not_there'); upgrade or uninstall the package."
    ) in done.stderr
    assert "The package taking provides" in done.stderr
    assert "The tuner family `skip` is registered already" in done.stderr


def test_the_documentation_has_a_row_for_each_family() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", (ROOT / "docs" / "architecture.md").read_text(), re.M)
    told = {name: (file, summary) for name, file, summary in rows}
    for family in tuner_families():
        module = family.part.__module__.rpartition(".")[2]
        assert told.get(family.name) == (f"`tuners/{module}.py`", family.summary.rstrip("."))
