from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from restune_diffusion.cli import main
from restune_diffusion.training import TrainConfig, train

from ... import tiny_training as tiny


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a small base, images, and a tuner that visibly changes the base's samples."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.sd_pipeline().save_pretrained(folder / "base")
    tiny.write_images(folder / "images")
    config = TrainConfig(
        base=str(folder / "base"),
        data=folder / "images",
        output=folder / "trained",
        name="disc",
        steps=3,
        learning_rate=0.1,
        checkpoint_every=0,
        cpu=True,
    )
    train(config, verbose=False)
    control = {"tuner": ("skip", "control"), "control": {"conditions": ("canny", "palette")}}
    train(TrainConfig(**{**config.model_dump(), **control, "name": "steered"}), verbose=False)
    return folder


@pytest.fixture
def restune(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Function that runs a command and returns its exit code, stdout and stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        code = exited.value.code
        return code if isinstance(code, int) else 0, shown.out, shown.err

    return run
