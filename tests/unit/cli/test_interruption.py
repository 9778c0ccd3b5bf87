"""Ctrl-C ends every long command with one sentence and exit code 130."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

Restune = Callable[..., tuple[int, str, str]]

COMMANDS = [
    ("train --base {base} --data {images} --output {out} --cpu", "restune_diffusion.training.train"),
    ("generate --base {base} --prompt x --output {out}", "restune_diffusion.cli.options.placement.load_placed"),
    ("grid --base {base} --prompt x --output {out}.png", "restune_diffusion.cli.options.placement.load_placed"),
    (
        "evaluate --base {base} --tuner {tuner} --data {images} --output {out}",
        "restune_diffusion.cli.options.placement.load_placed",
    ),
    ("convert {tuner} {out}.safetensors --to restune", "restune_diffusion.conversion.convert"),
    ("merge {tuner} {tuner} --output {out}.safetensors", "restune_diffusion.conversion.arithmetic.merge_tuners"),
    ("data inspect {images}", "restune_diffusion.data.inspection.inspect_data"),
    ("report {images}", "restune_diffusion.training.report.write_report"),
    ("inspect {tuner}", "restune_diffusion.storage.header.read_header"),
    ("demo --output {out}", "restune_diffusion.cli.run_demo.run_demo"),
]


@pytest.mark.parametrize(("line", "worker"), COMMANDS, ids=lambda value: value.split()[0])
def test_ctrl_c_ends_with_130(
    restune: Restune, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, worker: str
) -> None:
    def interrupted(*given: object, **options: object) -> None:
        raise KeyboardInterrupt

    module, _, name = worker.rpartition(".")
    monkeypatch.setattr(importlib.import_module(module), name, interrupted)
    paths = {
        "base": workplace / "base",
        "images": workplace / "images",
        "tuner": workplace / "trained" / "disc.safetensors",
        "out": tmp_path / "out",
    }
    code, _, errors = restune(*(word.format(**paths) for word in line.split()))
    assert code == 130
    assert errors.splitlines()[-1].startswith("restune: stopped")
    assert "Traceback" not in errors
