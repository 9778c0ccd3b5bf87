"""The benchmark of the serving engine with few requests, from the command to the table."""

from __future__ import annotations

import json

from benchmarks.serving import __main__ as command


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
