"""Write benchmark results with the command, machine and versions."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def publish(
    module: str, rows: Sequence[Mapping[str, Any]], table: Sequence[str], how: str, output: Path | None
) -> None:
    """Print a Markdown table, and write it to OUTPUT.md and its rows to OUTPUT.json if an output is given.

    Args:
        module: name of the benchmark's module, in the form of `python -m`.
        rows: result rows for the JSON file.
        table: lines of the Markdown table.
        how: method of measurement, for the note below the table.
        output: path without extension; None writes no file.
    """
    print("\n".join(table))
    if output is None:
        return
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"
    versions = {name: version(name) for name in ("torch", "safetensors", "diffusers")}
    command = " ".join([f"python -m {module}", *sys.argv[1:]])
    load = os.getloadavg()[0]
    facts = {"command": command, "machine": machine, "load_average": load, "versions": versions, "rows": list(rows)}
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    note = f"`{command}` on {machine}, {how}, load average {load:.1f}; {named}."
    output.with_suffix(".md").write_text("\n".join(table) + f"\n\n{note}\n")
