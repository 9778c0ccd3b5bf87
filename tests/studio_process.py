"""A process of `restune studio` for tests in a real browser."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from .conftest import ROOT


class StudioProcess:
    """Studio that runs on a free port until the end of a `with` statement.

    Args:
        home: folder of the studio; also has its log.
        arguments: further arguments of `restune studio`.
        env: further environment variables.
    """

    def __init__(self, home: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.home = home
        self.log = home.parent / f"{home.name}.log"
        self.command = [sys.executable, "-m", "restune_diffusion", "studio", str(home), "--port", "0"]
        self.command += ["--device", "cpu", *arguments]
        self.env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(env or {})}
        self.env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

    def __enter__(self) -> StudioProcess:
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.command, env=self.env, stdout=log, stderr=subprocess.STDOUT)
        while not (found := re.search(r"open at (http://\S+)", self.output)):
            assert self.process.poll() is None, self.output
            time.sleep(0.05)
        self.url = found[1]
        return self

    @property
    def output(self) -> str:
        """All that the studio has printed."""
        return self.log.read_text()

    def kill(self) -> None:
        """Kill the process as `kill -9` does."""
        self.process.kill()
        self.process.wait()

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
