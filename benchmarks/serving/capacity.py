"""Measure the engine's throughput and memory against the rows of a U-Net call; print and write the table.

    python -m benchmarks.serving.capacity --output benchmarks/results/serving_capacity

Each image takes one row, because guidance is off. For each number of rows, the engine serves as many images in one
batch. Needs Linux, which reports the peak of a process's memory.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.results_file import publish
from benchmarks.serving.workload import Workload, make_workload
from restune_diffusion.serving import Engine, ImageRequest, Limits, TunerLibrary
from restune_diffusion.serving.execution.memory import decoding_bytes, row_bytes

ROWS = (1, 2, 4, 8, 16)
STEPS = 20
"""Steps of the image whose rate is calculated."""
_MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """Load of one base.

    Args:
        size: width and height of the images in pixels.
        steps: denoising steps that are measured.
        turns: turns of which the median is taken.
        tuners: whether the images have a skip tuner each; both are measured in turn.
        decode_all: whether all images are decoded; otherwise the first ones, and the others are cancelled.
    """

    size: int
    steps: int
    turns: int
    tuners: tuple[bool, ...]
    decode_all: bool


SETTINGS = {
    "restune-tiny": Setting(64, STEPS, 3, (False, True), True),
    "sd15": Setting(256, 2, 1, (False,), False),
}
DRY = {"restune-tiny": Setting(64, 2, 1, (False, True), True), "sd15": Setting(64, 2, 1, (False,), False)}


class Memory:
    """Resident memory of this process, beyond that at the creation of this object."""

    def __init__(self) -> None:
        gc.collect()
        # What earlier turns have freed must not hide the need of this one.
        ctypes.CDLL(None).malloc_trim(0)
        self.start = self._read("VmRSS")

    def restart(self) -> None:
        """Forget the peak so far."""
        Path("/proc/self/clear_refs").write_text("5")

    @property
    def peak(self) -> int:
        """Bytes of the peak since `restart`, beyond the memory at the start."""
        return self._read("VmHWM") - self.start

    def _read(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, print the table and write it with the command, machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", choices=tuple(SETTINGS), nargs="+", default=tuple(SETTINGS), help="default: both")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="rows of a U-Net call (default: 1 2 4 8 16)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--dry", action="store_true", help="few and small images; the figures mean nothing")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    settings = DRY if arguments.dry else SETTINGS
    found: list[dict[str, Any]] = []
    for base in arguments.base:
        with tempfile.TemporaryDirectory() as folder:
            count = max(arguments.rows) if any(settings[base].tuners) else 0
            workload = make_workload(base, Path(folder), tuners=count, requests=0, steps=STEPS)
            found += measure(workload, base, settings[base], arguments.rows)
            del workload
    table = ["A dry run: the figures mean nothing.", ""] if arguments.dry else []
    facts = ", ".join(
        f"{base} ({settings[base].steps} steps, median of {settings[base].turns} turns)" for base in arguments.base
    )
    publish("benchmarks.serving.capacity", found, [*table, *_table(found)], facts, arguments.output)


def measure(workload: Workload, base: str, setting: Setting, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Return a result for each number of rows, without tuners and with a tuner per image."""
    found: list[dict[str, Any]] = []
    for tuned in setting.tuners:
        # The first call allocates what all later ones share.
        serve(workload, setting, 1, tuned=tuned)
        turns: dict[int, list[dict[str, float]]] = {count: [] for count in rows}
        # Turn by turn, so that a busy time of the machine does not hit one number of rows alone.
        for _ in range(setting.turns):
            for count in rows:
                turns[count].append(serve(workload, setting, count, tuned=tuned))
                print(f"{base}, {count} rows: {turns[count][-1]}", file=sys.stderr, flush=True)
        size = (setting.size // workload.pipeline.vae_scale_factor,) * 2
        for count in rows:
            row: dict[str, Any] = {"base": base, "tuners": tuned, "rows": count, "size": setting.size}
            row |= {key: median(turn[key] for turn in turns[count]) for key in turns[count][0]}
            row["images_per_second"] = 1 / (STEPS / row["rows_per_second"] + row["decoding_seconds"])
            row["estimated_row_bytes"] = row_bytes(workload.pipeline.unet, size)
            row["estimated_decoding_bytes"] = decoding_bytes(
                workload.pipeline.vae, size, workload.pipeline.vae_scale_factor
            )
            found.append(row)
        for row in found[-len(rows) :]:
            for name in ("rows_per_second", "images_per_second"):
                row[f"{name}_relative"] = row[name] / found[-len(rows)][name]
    return found


def serve(workload: Workload, setting: Setting, rows: int, *, tuned: bool) -> dict[str, float]:
    """Serve one batch, and return processor times and memory."""
    memory = Memory()
    limits = Limits(max_rows=rows, max_queue=rows, max_attached=max(1, workload.tuners))
    unet_peak = decoding_peak = 0
    start, wall = time.process_time(), time.perf_counter()
    engine = Engine(workload.pipeline, TunerLibrary(workload.folder), limits, clock=time.process_time)
    tickets = [
        engine.submit(
            ImageRequest(
                "a red apple",
                seed=number,
                width=setting.size,
                height=setting.size,
                steps=setting.steps,
                guidance=1.0,
                tuners=((f"skip-{number}", 1.0),) if tuned else (),
            )
        )
        for number in range(rows)
    ]
    while True:
        memory.restart()
        if not engine.step():
            break
        if engine.stats().done:
            decoding_peak = max(decoding_peak, memory.peak)
            if not setting.decode_all:
                for ticket in tickets:
                    ticket.cancel()
        else:
            unet_peak = max(unet_peak, memory.peak)
    seconds, wall = time.process_time() - start, time.perf_counter() - wall
    stats = engine.stats()
    engine.close()
    result = {
        "unet_call_seconds": stats.unet_seconds / stats.calls,
        "rows_per_call": stats.total_rows / stats.calls,
        "rows_per_second": stats.total_rows / stats.unet_seconds,
        "decoding_seconds": stats.vae_seconds / stats.done,
        "unet_peak_bytes": unet_peak,
        "decoding_peak_bytes": decoding_peak,
    }
    if setting.decode_all:
        result |= {"measured_images_per_second": rows / seconds, "measured_images_per_second_wall": rows / wall}
    return result


def _table(found: Sequence[dict[str, Any]]) -> list[str]:
    table = [
        "| base | tuners | rows | U-Net call, s | rows/s | relative | decoding, s | images/s | relative | "
        "U-Net calls, MiB | with decoding, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        table.append(
            f"| {row['base']}, {row['size']} px | {'one per image' if row['tuners'] else 'none'} | {row['rows']} | "
            f"{row['unet_call_seconds']:.3g} | {row['rows_per_second']:.3g} | {row['rows_per_second_relative']:.2f} | "
            f"{row['decoding_seconds']:.2g} | {row['images_per_second']:.3g} | "
            f"{row['images_per_second_relative']:.2f} | {row['unet_peak_bytes'] / _MIB:.0f} | "
            f"{row['decoding_peak_bytes'] / _MIB:.0f} |"
        )
    estimates = {
        f"{row['base']} {row['estimated_row_bytes'] / _MIB:.1f} MiB per row and "
        f"{row['estimated_decoding_bytes'] / _MIB:.1f} MiB per decoding": None
        for row in found
    }
    return [
        *table,
        "",
        f"All times are processor time. Relative: to one row. Images/s is calculated for {STEPS} steps from rows/s "
        "and the time of a decoding. Memory is the peak of the process beyond its models; the engine's estimate for "
        f"`Limits.memory_bytes` is, for {', and for '.join(estimates)}.",
    ]


if __name__ == "__main__":
    main()
