"""Command and environment of a run, and the start and interruption of its process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from socket import gethostname

from ..utils.errors import RestuneError, UsageError
from .locks import acquire
from .records import CONFIG_FILE, LOCK_FILE, LOG_FILE, PROCESS_FILE, ProcessRecord, Record, read_of_attempt

_DEVICE = re.compile(r"auto|cpu|cuda:\d+")
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def check_devices(devices: Sequence[str]) -> tuple[str, ...]:
    """Return the devices of a supervisor.

    Raises:
        UsageError: if there is none, or a name is not valid.
    """
    if not devices:
        raise UsageError("The supervisor of a queue needs a device; name auto, cpu, or GPUs such as cuda:0.")
    for device in devices:
        if not _DEVICE.fullmatch(device):
            raise UsageError(f"The device {device} is not valid; use auto, cpu, or a GPU such as cuda:0.")
    return tuple(devices)


def command_of(record: Record, folder: Path) -> list[str]:
    """Return the command that trains a run.

    Args:
        record: record of the run.
        folder: folder of the run in the queue.
    """
    command = [sys.executable, "-m", "restune_diffusion", "train", "--config", str(folder / CONFIG_FILE)]
    command += ["--resume"] if record.resume else []
    return [*command, "--cpu"] if record.device == "cpu" else command


def environment_of(device: str | None) -> dict[str, str]:
    """Return the environment of a training process on a device."""
    # Progress bars write to a file here, where few lines are enough.
    environment = {"TQDM_MININTERVAL": "5", **os.environ, "PYTHONUNBUFFERED": "1"}
    if device is not None and device.startswith("cuda:"):
        number = device.removeprefix("cuda:")
        visible = [each.strip() for each in os.environ.get(_VISIBLE, "").split(",") if each.strip()]
        environment[_VISIBLE] = visible[int(number)] if int(number) < len(visible) else number
    return environment


def lock_run(folder: Path) -> int:
    """Lock the file that the processes of a run hold, and return its descriptor.

    Raises:
        RestuneError: if another process holds it.
    """
    # A reader holds the lock for the moment in which it asks whether the run lives.
    lock = acquire(folder / LOCK_FILE, 10)
    if lock is None:
        raise RestuneError(f"{folder / LOCK_FILE} is held by another process; end that process and resume the run.")
    return lock


def launch(record: Record, folder: Path, lock: int) -> subprocess.Popen[bytes]:
    """Start the process of a run in a session of its own; it lives on when this process ends.

    Args:
        record: record of the run.
        folder: folder of the run in the queue.
        lock: descriptor from `lock_run`, which the process takes over; it is closed here.

    Raises:
        RestuneError: if the process cannot be started.
    """
    wrapper = [
        sys.executable,
        "-m",
        "restune_diffusion.run_queue.process",
        str(folder),
        str(record.attempt),
        str(lock),
    ]
    try:
        with (folder / LOG_FILE).open("ab") as log:
            return subprocess.Popen(
                [*wrapper, *command_of(record, folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment_of(record.device),
                start_new_session=True,
                pass_fds=(lock,),
            )
    except OSError as error:
        raise RestuneError(f"The process of the run cannot be started ({error.strerror}); resume it later.") from error
    finally:
        os.close(lock)


def process_of(record: Record, folder: Path) -> ProcessRecord | None:
    """Return the process of a running run, or None if it has not been written yet."""
    if record.state != "running":
        return None
    return read_of_attempt(folder / PROCESS_FILE, ProcessRecord, record.attempt)


def send(record: Record, folder: Path, number: signal.Signals) -> bool:
    """Send a signal to the training process of a living run, and return whether it was sent.

    The run's lock is held, so a process of its session lives, and the system has given its number to no other. Where
    machines share the folder, only that of the process sends.

    Args:
        record: record of the run, with its present state.
        folder: folder of the run in the queue.
        number: the signal.
    """
    process = process_of(record, folder)
    if process is None or process.host != gethostname():
        return False
    try:
        os.killpg(process.group, number)
    except ProcessLookupError:
        return False
    return True
