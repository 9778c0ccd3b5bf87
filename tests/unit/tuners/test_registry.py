"""Registry of tuner families: names, JSON, installed packages and the documentation's table."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from restune_diffusion import (
    BypassConfig,
    ControlConfig,
    RestuneError,
    SkipConfig,
    Tuner,
    TunerFileError,
    load_tuner,
    read_info,
    save_tuner,
)
from restune_diffusion.tuners import (
    Features,
    PartConfig,
    register_tuner_family,
    tuner_families,
    tuner_family,
    unregister_tuner_family,
)
from restune_diffusion.tuners.configs import parts_from_json, parts_to_json
from restune_diffusion.utils.errors import SettingsError, UnknownFamilyError

from ...conftest import ROOT, make_unet, randomize
from .test_families import MakeConfig, ScaleConfig, ScalePart, registered


def test_the_family_of_the_guide_is_complete(tmp_path: Path) -> None:
    """The code in CONTRIBUTING.md registers a family, and its equation is the one that it states."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Add a tuner family")[2]
    code = re.findall(r"```python\n(.+?)```", text, re.DOTALL)[0]
    (tmp_path / "guided_family.py").write_text(code, encoding="utf-8")
    try:
        config = runpy.run_path(str(tmp_path / "guided_family.py"))["ScaleConfig"]
        tuner = Tuner.for_base(make_unet(), config(sites=("skip.2",)))
        (part,) = tuner.parts()
        x = torch.randn(2, tuner.base.sites["skip.2"].channels, 3, 3)
        assert torch.equal(part("skip.2", x, Features()), torch.zeros_like(x))
        randomize(tuner)
        (factors,) = tuner.parameters()
        assert torch.equal(part("skip.2", x, Features()), factors.view(1, -1, 1, 1) * x)
    finally:
        unregister_tuner_family("scale")


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

    with registered(StepsConfig, ScalePart), pytest.raises(SettingsError, match=r"`steps` of .* has the name of a"):
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
        ("{}", "at the list: it is not a list"),
        ("[3]", "at 0: it is not an object that names its `part`"),
        ('[{"ratio": 1}]', "at 0: it is not an object that names its `part`"),
        (
            '[{"part": "skip"}, {"part": "bypass", "ratio": 9}]',
            "at 1.bypass.ratio: 9 is not valid; use a number above 0, up to 8",
        ),
        ('[{"part": "skip", "width": 9}]', "at 0.skip.width: there is no such setting"),
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
