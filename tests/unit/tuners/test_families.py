"""A tuner family in one file, outside the package, and what the program then does with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import nn

from restune_diffusion import (
    BaseInfo,
    ControlConfig,
    RestuneError,
    SkipConfig,
    TextConfig,
    Tuner,
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
from restune_diffusion.training.config.config_file import config_yaml, given_settings
from restune_diffusion.training.config.shared_settings import batch_settings
from restune_diffusion.training.feature_cache.tap_features import predict_from_features, record_features
from restune_diffusion.training.sweeps.grid import parse_sweep
from restune_diffusion.tuners import (
    ConditionedConfig,
    Features,
    Part,
    PartConfig,
    TextPart,
    init_zero,
    pointwise,
    register_tuner_family,
    tuner_families,
    unregister_tuner_family,
)
from restune_diffusion.utils.errors import SettingsError

from ... import tiny_training as tiny
from ...conftest import make_inputs, make_unet, randomize

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


class WordsConfig(TextConfig):
    """New words, under the name of another family."""

    part: Literal["words"] = "words"  # type: ignore[assignment]


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
    with pytest.raises(SettingsError, match="there is no setting scale"):
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
    assert f"trained with restune-diffusion: scale: {SUMMARY.rstrip('.')}, sites skip.0-1" in model_card(
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
    assert "{bypass,control,res,skip,text,scale,lora}" in shown
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
    assert given_settings(path)["scale"] == ScaleConfig(sites=("skip.2",))
    swept = parse_sweep(config(tuner="scale", sweep="sites=skip.0,skip.1+skip.2"))
    assert [variant.config.parts[0] for variant in swept] == [
        ScaleConfig(sites=("skip.0",)),
        ScaleConfig(sites=("skip.1", "skip.2")),
    ]
    with pytest.raises(SettingsError, match="settings of the scale tuner are given, but the tuner to train is skip"):
        config(scale=ScaleConfig(sites=("skip.1",)))
    lines = "base: b\ndata: d\noutput: o\ntuner: scale\nscale:\n"
    for line, message in {
        "  sites: skip.1": "line 6: scale.sites: skip.1 is not valid; use a list of texts",
        "  sits: []": "line 6: in scale there is no setting sits; did you mean sites?",
    }.items():
        path.write_text(lines + line)
        with pytest.raises(SettingsError, match=re.escape(message)):
            read_config(path)


def test_a_family_that_writes_at_out_alone_trains_from_a_feature_cache(config: MakeConfig) -> None:
    with registered(HeadConfig, HeadPart):
        settings = {"tuner": "head", "learning_rate": 0.01, "feature_cache_dtype": "fp32", "feature_cache": 2}
        from_cache = load_tuner(train(config(**settings), verbose=False).path)
        swept = parse_sweep(config(**settings, sweep="bias=true,false"))
        assert [variant.config.parts[0] for variant in swept] == [HeadConfig(), HeadConfig(bias=False)]
        assert all(bool(value.abs().sum() > 0) for value in from_cache.parameters())
        with_bias, without = (batch_settings(variant.config) for variant in swept)
        assert with_bias == without, "they can share the base's forward passes"
        unet = make_unet()
        features = record_features(unet, (), *make_inputs())
        tuner = Tuner.for_base(unet, HeadConfig())
        randomize(tuner)
        with torch.no_grad():
            assert torch.equal(predict_from_features(unet, tuner, features), predicted(tuner))
    with registered(ScaleConfig, ScalePart), pytest.raises(SettingsError, match="a feature cache is for"):
        config(tuner="scale", feature_cache=2)


def test_a_family_may_act_on_text_encoders(config: MakeConfig) -> None:
    with registered(WordsConfig, TextPart):
        words = {"tokens": ["<dog>"], "initializers": ["d"], "rank": 0}
        settings = config(
            tuner=("skip", "words"), words=words, caption_template="<dog> {caption}", text_learning_rate=0.5, steps=1
        )
        result = train(settings, verbose=False)
        tuner = load_tuner(result.path)
        start = Tuner.for_pipeline(tiny.sd_pipeline(), *settings.parts).get_parameter("words.text_encoder.token.0")
        moved = (tuner.get_parameter("words.text_encoder.token.0") - start).abs().max().item()
        # AdamW's first step is the learning rate, here that of the text, and not that of the skip tuner.
        assert moved == pytest.approx(0.5, rel=0.02)
        assert read_info(result.path).training["trigger_words"] == ["<dog>"]
        with pytest.raises(SettingsError, match="drop_encoders"):
            config(tuner="words", words=words, drop_encoders=True)
        with pytest.raises(RestuneError, match="acts on text encoders, but got text and words; use one"):
            Tuner.for_pipeline(tiny.sd_pipeline(), TextConfig(), WordsConfig())


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
