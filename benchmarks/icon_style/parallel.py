"""Run commands of this benchmark in parallel, one process each."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

PROGRAM = (sys.executable, "-m", "benchmarks.icon_style")


def run_parallel(commands: Sequence[Sequence[str]], program: Sequence[str] = PROGRAM) -> None:
    """Run commands in parallel and wait for all of them.

    Args:
        commands: the arguments of each process.
        program: program of every process.

    Raises:
        SystemExit: if a command fails; the others are terminated, and their finished results stay in the work folder.
    """
    # Parallel progress bars would overwrite each other; every row is still printed.
    settings = os.environ | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([*program, *command], env=settings) for command in commands]
    try:
        while any(process.poll() is None for process in processes):
            _refuse_failed(processes, commands)
            time.sleep(0.2)
        _refuse_failed(processes, commands)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()


def _refuse_failed(processes: Sequence[subprocess.Popen[bytes]], commands: Sequence[Sequence[str]]) -> None:
    for process, command in zip(processes, commands, strict=True):
        if process.poll():
            raise SystemExit(
                f"`{' '.join(command)}` ended with status {process.returncode}; run the same command again to "
                f"continue from the finished rows."
            )
