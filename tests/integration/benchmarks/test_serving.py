"""The benchmarks of the serving engine with few requests, from the command to the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.serving import __main__ as command
from benchmarks.serving import capacity


def test_all_contestants_generate_the_same_images(tmp_path):
    command.main(["--dry", "--output", str(tmp_path / "serving")])
    rows = json.loads((tmp_path / "serving.json").read_text())["rows"]
    differences = {row["what"]: row["largest_difference"] for row in rows if "largest_difference" in row}
    assert "engine, the same LoRAs" in differences
    assert max(differences.values()) <= 2
    assert [row["batching"] for row in rows if "batching" in row] == ["step", "request"] * 2
    table = (tmp_path / "serving.md").read_text()
    assert "A dry run: the figures mean nothing." in table
    assert "| engine, skip tuners | " in table


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone reports the peak of the memory")
def test_capacity_counts_full_calls_with_and_without_tuners(tmp_path):
    output = tmp_path / "capacity"
    capacity.main(["--dry", "--base", "restune-tiny", "--rows", "1", "8", "--output", str(output)])
    rows = json.loads(output.with_suffix(".json").read_text())["rows"]
    assert [(row["tuners"], row["rows"], row["rows_per_call"]) for row in rows] == [
        (False, 1, 1.0), (False, 8, 8.0), (True, 1, 1.0), (True, 8, 8.0),
    ]  # fmt: skip
    for one, eight in (rows[:2], rows[2:]):
        assert eight["rows_per_second"] == pytest.approx(8 / eight["unet_call_seconds"])
        assert eight["rows_per_second_relative"] == eight["rows_per_second"] / one["rows_per_second"]
        assert eight["unet_peak_bytes"] > one["unet_peak_bytes"] > 0
        assert eight["estimated_row_bytes"] == one["estimated_row_bytes"]
    table = output.with_suffix(".md").read_text()
    assert "A dry run: the figures mean nothing." in table
    assert "| restune-tiny, 64 px | one per image | 8 | " in table
