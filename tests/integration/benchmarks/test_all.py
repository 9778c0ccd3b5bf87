"""All benchmarks with small models, from the command to the page."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.all import __main__ as command
from benchmarks.all import page


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_benchmark_runs_and_every_target_finds_its_figure(tmp_path, monkeypatch):
    command.main(["--dry", "--output", str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    assert "A dry run with small models: the figures mean nothing." in text
    assert "not measured yet" not in text
    for target in page.TARGETS:
        assert f"| {target.what} | " in text
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {
        "training", "generation", "own-tuners", "swap", "queue", "start-up", "scaling-batch", "scaling-px"
    }  # fmt: skip
    for path in (tmp_path / "plots").iterdir():
        assert f"plots/{path.name}" in text
    kept = json.loads((tmp_path / "all.json").read_text())["groups"]
    (trained,) = [row for row in kept["training"] if row["what"] == "bypass"]
    assert 0 < trained["kept_bytes"] < min(row["kept_bytes"] for row in kept["training"] if "LoRA r=4" in row["what"])
    # A second call finds everything on disk.
    monkeypatch.setattr(command, "groups_of", lambda *_: {name: dict.fromkeys(kept) for name in ("swap",)})
    command.main(["--dry", "--output", str(tmp_path), "--only", "swap"])
