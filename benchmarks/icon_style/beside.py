"""Run commands of this benchmark beside each other, one process each."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

PROGRAM = (sys.executable, "-m", "benchmarks.icon_style")


def run_beside(commands: Sequence[Sequence[str]], program: Sequence[str] = PROGRAM) -> None:
    """Run all of the commands at once and wait for them.

    Args:
        commands: the arguments of each process.
        program: what every process runs.

    Raises:
        SystemExit: if one of them fails; the others are ended, and what they have finished stays in the work folder.
    """
    # Two progress bars cannot share a line; every row is still told of.
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
                f"`{' '.join(command)}` ended with status {process.returncode}; run the same command again to go on "
                f"from the rows that are finished."
            )
