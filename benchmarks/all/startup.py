"""Benchmark of start-up: processor time of commands in new processes."""

from __future__ import annotations

import resource
import subprocess
import sys

import torch

from benchmarks.cuda.bench import Bench
from restune_diffusion import SkipConfig, save_tuner

from .rows import Row, timed_rows

IMPORT, HELP, INSPECT = "import restune_diffusion", "restune --help", "restune inspect FILE"


def processor_seconds(command: list[str]) -> float:
    """Return the processor time of a command, user and system, with that of its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def start_up(bench: Bench) -> list[Row]:
    """Measure commands that should not wait for torch, beside Python itself and the import of torch."""
    path = bench.folder / "tuner.safetensors"
    save_tuner(bench.tuner(bench.unet(bench.bases[0], torch.float32), SkipConfig()), path)
    python = sys.executable
    commands = {
        "python alone": [python, "-c", "pass"],
        IMPORT: [python, "-c", "import restune_diffusion"],
        HELP: [python, "-m", "restune_diffusion", "--help"],
        "restune train --help": [python, "-m", "restune_diffusion", "train", "--help"],
        INSPECT: [python, "-m", "restune_diffusion", "inspect", str(path)],
        "import torch": [python, "-c", "import torch"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(2 if bench.dry else 6):
        for name, command in commands.items():
            seconds = processor_seconds(command)
            if number:  # files are in the page cache
                times[name].append(seconds)
    return timed_rows(times, "python alone")
