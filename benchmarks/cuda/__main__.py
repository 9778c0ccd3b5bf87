"""Run the acceptance suite on a GPU, or a dry run of it on the CPU.

    python -m benchmarks.cuda
    python -m benchmarks.cuda --part right training
    python -m benchmarks.cuda --dry

It checks Stable Diffusion 1.5 at 512 px and SDXL at 1024 px with random weights, writes `benchmarks/results/cuda.md`
and `cuda.json`, and exits with 1 if a check on that page has failed. The JSON file is written after each check and
keeps the results of parts that do not run; `--resume` leaves out the checks that it has, so an interrupted run goes
on. A dry run has small bases, measures times without judging them, and lists what needs CUDA as not run.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.logging import set_verbosity_error

from restune_diffusion.utils.atomic_write import atomic_write

from . import compiled, generation, right, training
from .bench import Bench
from .results import CannotRun, Check, Result, Results, holds

PARTS: dict[str, Sequence[Check]] = {
    "right": right.CHECKS,
    "compiled": compiled.CHECKS,
    "training": training.CHECKS,
    "generation": generation.CHECKS,
}
_OUTPUT = Path(__file__).parents[1] / "results" / "cuda"
_LIMIT_SECONDS = 480
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "xformers", "torchao")


def facts(bench: Bench) -> dict[str, Any]:
    """Return machine and versions."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if bench.dry:
        return {"dry run": "CPU", "machine": machine, "versions": versions}
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    driver = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return {"GPU": f"{name}, {memory / 2**30:.0f} GiB, {driver}", "machine": machine, "versions": versions}


def run_check(check: Check, bench: Bench) -> list[Result]:
    """Run one check; an error in it is a failed result after those that it has yielded."""
    if bench.dry and check.needs_cuda:
        return [Result("", "not run", "needs CUDA")]
    results: list[Result] = []
    try:
        for result in check.run(bench):
            results.append(result)
    except CannotRun as reason:
        results.append(Result("", "not run", str(reason)))
    except Exception as error:
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        results.append(holds("the check itself", False, f"{type(error).__name__}: {first[:200]}"))
    return results


def run_parts(parts: Sequence[str], bench: Bench, results: Results, resume: bool) -> None:
    """Run the checks of the parts, keep each one's results, and print them."""
    for part in parts:
        for check in PARTS[part]:
            known = results.parts.get(part, {}).get(check.title)
            if resume and known and not any(row.status == "failed" for row in known):
                continue
            started = time.perf_counter()
            rows = run_check(check, bench)
            results.add(part, check.title, rows, time.perf_counter() - started)
            for row in rows:
                print(f"{part}: {check.title}: {row.what}: {row.value} {row.limit}: {row.status}", flush=True)
        bench.release()


def main(args: Sequence[str] | None = None) -> int:
    """Run the suite and return the exit code: 0, 1 if a check fails, 2 without CUDA."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    parser.add_argument("--dry", action="store_true", help="run on the CPU with small bases; judge no time")
    parser.add_argument("--resume", action="store_true", help="leave out checks whose results are kept already")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md (dry runs: none by default)")
    given = parser.parse_args(args)
    if not given.dry and not torch.cuda.is_available():
        print("CUDA is not available; add --dry to run the suite on the CPU.", file=sys.stderr)
        return 2
    output = given.output or (None if given.dry else _OUTPUT)
    tf32 = torch.backends.cudnn.allow_tf32
    # The limits for fp32 are for full precision.
    torch.backends.cudnn.allow_tf32 = False
    if given.dry:
        # Small models gain nothing from a second thread.
        torch.set_num_threads(1)
    # diffusers warns at each cast of a model, which is what the suite does.
    set_verbosity_error()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(dry=given.dry, folder=Path(folder))
        results = Results(output and output.with_suffix(".json"), facts(bench))
        results.load()
        try:
            run_parts(given.part, bench, results, given.resume)
        finally:
            torch.backends.cudnn.allow_tf32 = tf32
    seconds = time.perf_counter() - started
    if not given.dry and not given.resume and len(given.part) == len(PARTS):
        row = holds("all parts", seconds <= _LIMIT_SECONDS, f"{seconds:.0f} s", f"<= {_LIMIT_SECONDS} s")
        results.add("generation", "The suite takes", [row], 0.0)
    if output is not None:
        command = " ".join(["python -m benchmarks.cuda", *(sys.argv[1:] if args is None else args)])
        with atomic_write(output.with_suffix(".md")) as file:
            file.write(results.page(command).encode())
    counts = ", ".join(f"{results.count(each)} {each}" for each in ("passed", "failed", "measured", "not run"))
    print(f"{counts}; {seconds:.0f} s")
    return 1 if results.count("failed") else 0


if __name__ == "__main__":
    # Before the first matrix product: without it cuBLAS may add in another order in each run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sys.exit(main())
