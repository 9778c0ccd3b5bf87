"""A server process of `restune serve` for tests on real sockets."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from .conftest import ROOT


class ServerProcess:
    """Server that runs `restune serve` on a free port until the end of a `with` statement."""

    def __init__(
        self, *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None, free_port: bool = False
    ) -> None:
        self.cwd = cwd
        self.command = [
            sys.executable,
            "-m",
            "restune_diffusion",
            "serve",
            "--port",
            str(unused_port() if free_port else 0),
            "--device",
            "cpu",
            *arguments,
        ]
        self.env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(env or {})}
        self.env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

    def __enter__(self) -> ServerProcess:
        # A file, because a full pipe would stop the server.
        self._log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            self.command, env=self.env, cwd=self.cwd, stdout=self._log, stderr=subprocess.STDOUT
        )
        while not (found := re.search(r"^Serving .* at http://\S+:(\d+)(?: on Ray)?$", self.output, re.MULTILINE)):
            assert self.process.poll() is None, self.output
            time.sleep(0.05)
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    @property
    def output(self) -> str:
        """All that the server has printed."""
        self._log.seek(0)
        return self._log.read()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()

    @property
    def resident_bytes(self) -> int:
        """Memory of the server in use."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def unused_port() -> int:
    """Return a port that is free now; Ray does not choose one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition, timeout: float = 60.0) -> None:
    """Wait until a condition is true."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.02)
