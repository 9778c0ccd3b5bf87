"""`restune data caption` in real processes, with a model of transformers, an ONNX tagger and a function."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ....conftest import ROOT
from ....training_fixtures import heed_ctrl_c
from ...data.captioning.models import write_encoder_decoder, write_tagger
from ...data.captioning.test_captioners import captioner, noise

Restune = Callable[..., tuple[int, str, str]]

SLOW = """
import time
from pathlib import Path

def describe(images):
    if Path("slow").exists():
        time.sleep(60)
    Path("slow").touch()
    return [f"{image.width} wide" for image in images]
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(noise(4)[1:]):
        image.save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "restune_diffusion", "data", "caption", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(folder: Path, *arguments: str | Path) -> tuple[int, str, str]:
    done = subprocess.run(
        command(*arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def test_a_model_of_transformers_captions_a_folder(tmp_path: Path, images: Path) -> None:
    model = write_encoder_decoder(tmp_path / "model")
    (images / "1.txt").write_text("mine")
    arguments = ("images", "--captioner", "transformers", "--model", "model", "--max-tokens=6", "--device=cpu",
                 "--trigger-word", "ink style", "--batch-size=2")  # fmt: skip
    code, output, errors = run(tmp_path, *arguments)
    assert code == 0, errors
    assert output == (
        "broken.png is not an image of a known format.\n2 captions written, 1 unchanged, 1 refused, of 4 images.\n"
    )
    assert not errors
    expected = captioner("transformers", model)(noise(4)[1:])
    written = {path.name: path.read_text() for path in images.glob("*.txt")}
    assert written == {
        "0.txt": f"ink style, {expected[0]}\n", "1.txt": "mine", "2.txt": f"ink style, {expected[2]}\n",
    }  # fmt: skip


def test_a_tagger_captions_a_folder(tmp_path: Path) -> None:
    write_tagger(tmp_path / "tagger")
    for name, color in {"blue": (0, 0, 255), "red": (255, 0, 0)}.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9), color).save(tmp_path / "images" / name / "a.png")
    code, output, errors = run(tmp_path, "images", "--captioner=onnx", "--model=tagger", "--character-threshold=1")
    assert code == 0, errors
    assert output == "2 captions written, 0 unchanged, 0 refused, of 2 images.\n"
    assert (tmp_path / "images/blue/a.txt").read_text() == "much blue\n"
    assert (tmp_path / "images/red/a.txt").read_text() == "o_o\n"


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_command_leaves_whole_files_and_continues(tmp_path: Path, images: Path, stop: int) -> None:
    (tmp_path / "slow_captioner.py").write_text(SLOW)
    arguments = ("images", "--captioner", "slow_captioner:describe", "--batch-size=1")
    process = subprocess.Popen(
        command(*arguments),
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )
    deadline = time.monotonic() + 120
    while not (images / "0.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(stop)
    errors = process.communicate(timeout=300)[1]
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert "restune: stopped; 1 caption written; the same command continues." in errors
    assert {path.name for path in images.iterdir()} == {"0.png", "0.txt", "1.png", "2.png", "broken.png"}
    (tmp_path / "slow").unlink()
    (tmp_path / "slow_captioner.py").write_text(SLOW.replace("60", "0"))
    code, output, errors = run(tmp_path, *arguments)
    assert code == 0, errors
    assert output.endswith("2 captions written, 1 unchanged, 1 refused, of 4 images.\n")
    assert {path.read_text() for path in images.glob("*.txt")} == {"20 wide\n"}


def test_mistakes_are_one_sentence(restune: Restune, images: Path) -> None:
    def refused(*arguments: str) -> str:
        code, _, errors = restune("data", "caption", images, *arguments)
        assert code != 0
        assert errors.count("\n") == 1
        return errors

    assert "There is no captioner blip" in refused("--captioner=blip")
    assert "The captioner onnx needs a model" in refused("--captioner=onnx")
    assert "--prompt is not a setting of the captioner onnx" in refused("--captioner=onnx", "--prompt=x")
    assert "--model is not a setting of the captioner a:b" in refused("--captioner=a:b", "--model=x")
    assert "contradict each other" in refused("--captioner=onnx", "--overwrite", "--existing=append")
    assert "--general-threshold 2 is not valid" in refused("--captioner=onnx", "--general-threshold=2")
    assert "give --general-threshold" in refused("--captioner=onnx", "--thresh=0.3")
    assert "There is no action tag of `restune data`" in restune("data", "tag")[2]
    assert "needs an action" in restune("data")[2]


def test_help_has_examples_and_loads_no_torch(restune: Restune) -> None:
    for action in ("inspect", "caption", "edit"):
        code, output, _ = restune("data", action, "--help")
        assert code == 0
        assert f"Example: restune data {action}" in output
    code = (
        "import sys; from restune_diffusion.cli.app import parse; parse(['data', 'caption', '.', '--captioner=onnx']);"
    )
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0
