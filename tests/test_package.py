import importlib
import subprocess
import sys

import restune_diffusion

from .conftest import ROOT


def test_every_public_name_loads():
    for name in restune_diffusion.__all__:
        assert getattr(restune_diffusion, name).__doc__, name


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, restune_diffusion; print(sorted({'torch', 'diffusers', 'pydantic', 'tyro'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "[]"


def test_no_module_opens_pickles():
    for path in (ROOT / "restune_diffusion").rglob("*.py"):
        text = path.read_text()
        assert "torch.load" not in text, path
        assert "import pickle" not in text, path


def test_the_custom_pipeline_file_shows_one_class():
    source = (ROOT / "pipelines" / "restune_stable_diffusion.py").read_text()
    assert source.count("import ") == 1
    pipelines = importlib.import_module("restune_diffusion.pipelines")
    assert "RestuneStableDiffusionPipeline as RestuneStableDiffusionPipeline" in source
    assert issubclass(pipelines.RestuneStableDiffusionPipeline, restune_diffusion.RestuneLoaderMixin)
