"""Serve a queue over many tuners, and requests that arrive at random; print and write the tables.

    python -m benchmarks.serving --output benchmarks/results/serving

The engine serves 64 requests over 16 tuners, with up to eight images per U-Net call. Beside it: diffusers with LoRAs
that are hot-swapped request by request, diffusers with batches of one LoRA, and our pipeline request by request. The
speed-up of a batch of eight of the plain pipeline is the limit of what batching can gain on the machine. All run in
turn in one process.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.results_file import publish
from benchmarks.serving import latency, throughput
from benchmarks.serving.workload import make_workload


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, print the tables and write them with the command, machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--base", choices=("restune-tiny", "sd15"), default="restune-tiny", help="sd15: random weights"
    )
    parser.add_argument("--requests", type=int, default=64, help="length of the queue (default: 64)")
    parser.add_argument("--tuners", type=int, default=16, help="number of tuners (default: 16)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--only", choices=("throughput", "latency"), help="one of the two parts")
    parser.add_argument("--dry", action="store_true", help="few requests and steps; the figures mean nothing")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    table: list[str] = ["A dry run: the figures mean nothing.", ""] if arguments.dry else []
    rounds, shape = arguments.rounds, {key: getattr(arguments, key) for key in ("tuners", "requests", "steps")}
    if arguments.dry:
        rounds, shape = 1, {"tuners": 2, "requests": 4, "steps": 2}
    with tempfile.TemporaryDirectory() as folder:
        workload = make_workload(arguments.base, Path(folder), **shape)
        if arguments.only != "latency":
            found, gain = throughput.measure(workload, rounds)
            rows += [*found, {"what": "plain pipeline, batch of 8 beside 8 calls", **gain}]
            table += _throughput_table(found, gain)
        if arguments.only != "throughput":
            for steps in (workload.steps[:1], workload.steps):
                found = latency.measure(workload, steps, latency.LOADS[:1] if arguments.dry else latency.LOADS)
                rows += found
                table += ["", *_latency_table(found)]
    how = f"{arguments.base}, {workload.requests} requests over {workload.tuners} tuners, {workload.size} px, "
    publish("benchmarks.serving", rows, table, how + f"medians of {rounds} turns", arguments.output)


def _throughput_table(rows: list[dict[str, Any]], gain: dict[str, float]) -> list[str]:
    table = [
        "| queue served by | processor time, s | speed-up | wall, s | speed-up | first image, s | rows per call | "
        "overhead | largest pixel difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        overhead = f"{100 * row['overhead']:.1f} %" if "overhead" in row else ""
        calls = f"{row['rows_per_call']:.1f}" if "rows_per_call" in row else ""
        table.append(
            f"| {row['what']} | {row['seconds']:.1f} | {row['speedup']:.2f} | {row['wall']:.1f} | "
            f"{row['speedup_wall']:.2f} | {row['first']:.2f} | {calls} | {overhead} | "
            f"{row.get('largest_difference', '')} |"
        )
    limit = f"{gain['processor']:.2f} in processor time, {gain['wall']:.2f} in wall time"
    return [
        *table,
        "",
        f"Limit: the plain pipeline without tuners is faster in a batch of eight than in eight calls by {limit}. "
        "Overhead: the fraction of the engine's time beyond U-Net, VAE and text encoder: reading and attaching "
        "tuners, schedulers, batching.",
    ]


def _latency_table(rows: list[dict[str, Any]]) -> list[str]:
    steps = ", ".join(map(str, rows[0]["steps"]))
    table = [
        f"| load ({steps} steps) | batching at the | p50, s | p95, s |",
        "|---|---|---|---|",
    ]
    for row in rows:
        table.append(f"| {row['load']:.0%} | {row['batching']} | {row['p50']:.2f} | {row['p95']:.2f} |")
    return table


if __name__ == "__main__":
    main()
