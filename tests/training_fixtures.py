from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from restune_diffusion.training import TrainConfig

from . import tiny_training as tiny


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "tiny-sd"
    tiny.sd_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_images(tmp_path_factory.mktemp("data") / "discs")


@pytest.fixture
def config(base: Path, images: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Factory of configs of short runs; keyword arguments override the defaults."""

    def make(**changes: Any) -> TrainConfig:
        settings = {
            "base": str(base),
            "data": images,
            "output": tmp_path / "out",
            "steps": 4,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "checkpoint_every": 0,
            "cpu": True,
        }
        return TrainConfig(**{**settings, **changes})

    return make


Script = Callable[..., "subprocess.Popen[str]"]


def start_script(*arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
    """Start Python with the given arguments, offline, with captured output and additional environment variables."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # One thread: other load must not slow the tests, and both processes must round identically.
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables},
        cwd=Path(__file__).parents[1],
        # In a shell's background, tests ignore Ctrl-C, and child processes inherit that.
        preexec_fn=heed_ctrl_c,
    )


def heed_ctrl_c() -> None:
    """Restore the default handling of Ctrl-C; give it to `Popen` as `preexec_fn`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def script() -> Script:
    """Function that starts Python with the given arguments."""
    return start_script
