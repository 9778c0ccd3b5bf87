import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from restune_diffusion import (
    BypassConfig,
    SkipConfig,
    Tuner,
    TunerFileError,
    load_tuner,
    save_tuner,
)

from ...conftest import make_unet, randomize

SAVE_FOREVER = textwrap.dedent(
    """
    import sys, torch
    from restune_diffusion import load_tuner, save_tuner

    path = sys.argv[1]
    tuner = load_tuner(path)
    for value in range(1, 1_000_000):
        with torch.no_grad():
            for parameter in tuner.parameters():
                parameter.fill_(value)
        save_tuner(tuner, path)
        print(value, flush=True)
    """
)

DIE_WHILE_WRITING = textwrap.dedent(
    """
    import resource, signal, sys
    from restune_diffusion import load_tuner, save_tuner

    tuner = load_tuner(sys.argv[1])
    for parameter in tuner.parameters():
        parameter.data = parameter.data + 1
    # the kernel kills a process that writes beyond this size, if it lets it
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
    save_tuner(tuner, sys.argv[1])
    """
)

REPLACE_FOREVER = textwrap.dedent(
    """
    import os, sys

    folder = sys.argv[1]
    while True:
        for name in ("small", "large"):
            os.link(f"{folder}/{name}", f"{folder}/next")
            os.replace(f"{folder}/next", f"{folder}/tuner.safetensors")
            if name == "small":
                print(flush=True)
    """
)


@pytest.fixture
def path(unet, tmp_path):
    """Path of a saved tuner of two parts."""
    tuner = Tuner.for_base(unet, SkipConfig(ratio=0.5), BypassConfig(ratio=0.25))
    randomize(tuner)
    save_tuner(tuner, tmp_path / "watercolor.safetensors", training={"steps": 12, "prompt": "watercolor"})
    return tmp_path / "watercolor.safetensors"


def test_kill_during_save_leaves_a_whole_file(tmp_path):
    unet = make_unet()
    path = tmp_path / "tuner.safetensors"
    save_tuner(Tuner.for_base(unet, SkipConfig(ratio=8.0), BypassConfig(ratio=2.0)), path)
    for attempt in range(3):
        process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, path], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        written = int(process.stdout.readline())
        time.sleep(0.011 * attempt)  # in a later save, at a different point each time
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait()
        last = int(rest[-1]) if rest else written
        values = {value for parameter in load_tuner(path).parameters() for value in parameter.unique().tolist()}
        assert values in ({last}, {last + 1})


@pytest.mark.parametrize("share", [0.001, 0.7])
def test_death_in_the_middle_of_a_write_leaves_the_old_file(path, share):
    before = path.read_bytes()
    size = int(share * len(before))
    child = subprocess.run([sys.executable, "-c", DIE_WHILE_WRITING, path, str(size)])
    assert child.returncode == -signal.SIGXFSZ
    assert path.read_bytes() == before


def test_a_file_that_is_replaced_while_it_is_read(unet, tmp_path):
    for name, ratio in {"small": 0.25, "large": 0.5}.items():
        tuner = Tuner.for_base(unet, SkipConfig(ratio=ratio))
        for parameter in tuner.parameters():
            torch.nn.init.constant_(parameter, ratio)
        save_tuner(tuner, tmp_path / name, metadata={"filling": "x" * int(1000 * ratio)})
    command = [sys.executable, "-c", REPLACE_FOREVER, tmp_path]
    loaded = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            for _ in range(250):
                # A writer this fast may interfere with every attempt, which gives an error.
                refusal, tuner = None, None
                try:
                    tuner = load_tuner(tmp_path / "tuner.safetensors")
                except TunerFileError as error:
                    refusal = str(error)
                if tuner is None:
                    assert "being replaced repeatedly" in refusal
                    continue
                loaded += 1
                (config,) = tuner.configs
                assert all((parameter == config.ratio).all() for parameter in tuner.parameters())
        finally:
            process.kill()
    assert loaded
