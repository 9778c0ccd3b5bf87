"""Rows of the benchmarks, kept on disk when a group of them is finished."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypeAlias

import torch

from restune_diffusion.utils.atomic_write import atomic_write

Row: TypeAlias = dict[str, Any]
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors")


def facts(device: torch.device, dry: bool, pixels: int) -> dict[str, Any]:
    """Return machine, versions and image size, which the rows of a file share."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    versions = {name: version(name) for name in _PACKAGES}
    return {"device": where, "machine": machine, "pixels": pixels, "dry": dry, "versions": versions}


class Rows:
    """Finished rows by group, in a JSON file; a group that the file has is not run again.

    Args:
        path: the file.
        facts: machine and versions; rows of others are dropped.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path = path
        self.facts = dict(facts)
        self.groups: dict[str, list[Row]] = {}
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["facts"] == self.facts:
                self.groups = kept["groups"]

    def finish(self, group: str, run: Callable[[], list[Row]]) -> list[Row]:
        """Return the rows of a group, from the file or by running it."""
        if group not in self.groups:
            print(f"{group} ...", flush=True)
            self.groups[group] = run()
            self.save()
        return self.groups[group]

    def drop(self, prefix: str) -> None:
        """Forget the groups whose name starts with a prefix."""
        self.groups = {name: rows for name, rows in self.groups.items() if not name.startswith(prefix)}

    def save(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as file:
            file.write((json.dumps({"facts": self.facts, "groups": self.groups}, indent=1) + "\n").encode())

    def get(self, group: str) -> dict[str, Row]:
        """Return the rows of a finished group by name; empty if it is not finished."""
        return {row["what"]: row for row in self.groups.get(group, [])}


def timed_rows(times: Mapping[str, Sequence[float]], peer: str, **more: Mapping[str, Any]) -> list[Row]:
    """Return a row for each contestant: median, spread, and the median ratio to a peer in the same round.

    Args:
        times: seconds of each contestant in each round.
        peer: contestant that the others are compared with.
        more: further values by contestant.
    """
    rows = []
    for name, own in times.items():
        low, high = (min(own), max(own)) if len(own) < 4 else (quantiles(own)[0], quantiles(own)[2])
        row: Row = {"what": name, "seconds": median(own), "low": low, "high": high, "rounds": len(own)}
        row["ratio"] = median(mine / other for mine, other in zip(own, times[peer], strict=True))
        rows.append({**row, **{key: values[name] for key, values in more.items() if name in values}})
    return rows
