import ast
import re
import runpy
import subprocess
import sys
import tomllib

import pytest

import restune_diffusion

from ..conftest import ROOT


def test_every_public_name_loads():
    for name in restune_diffusion.__all__:
        assert getattr(restune_diffusion, name).__doc__, name


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, restune_diffusion; print(sorted({'torch', 'diffusers', 'pydantic', 'tyro'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "[]"


def test_the_version_has_one_source():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    source = (ROOT / project["tool"]["hatch"]["version"]["path"]).read_text()
    assert project["project"]["dynamic"] == ["version"]
    assert f'__version__ = "{restune_diffusion.__version__}"' in source
    # Citations and changelogs would go stale beside it.
    assert "\nversion:" not in (ROOT / "CITATION.cff").read_text()


def test_python_m_runs_the_command_line():
    command = [sys.executable, "-m", "restune_diffusion", "--version"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert out == f"restune-diffusion {restune_diffusion.__version__}\n"


def test_no_module_opens_pickles():
    for path in (ROOT / "restune_diffusion").rglob("*.py"):
        text = path.read_text()
        # A sentence may say how to convert a pickle elsewhere; the code may not open one.
        code = [ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
        assert "torch.load" not in code, path
        assert "import pickle" not in text, path


@pytest.mark.parametrize("name", [name for name in restune_diffusion.__all__ if name.endswith("Pipeline")])
def test_each_pipeline_has_a_custom_pipeline_file_with_nothing_else_in_it(name):
    words = re.findall("StableDiffusion|XL|Img2Img|Inpaint|ControlNet", name)
    stem = "_".join(["restune", *words]).replace("StableDiffusion", "stable_diffusion").lower()
    path = ROOT / "pipelines" / f"{stem}.py"
    shown = {key: value for key, value in runpy.run_path(str(path)).items() if not key.startswith("__")}
    assert shown == {name: getattr(restune_diffusion, name)}
    assert issubclass(shown[name], restune_diffusion.RestuneLoaderMixin)
