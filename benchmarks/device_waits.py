"""Count what a denoising step copies to a CUDA device and waits for, by form of weight.

    python -m benchmarks.device_waits --output benchmarks/results/device_waits

The device is the stand-in for CUDA of the tests, which needs a C++ compiler instead of a GPU. Only copies and waits
in the code of this package are counted: those of diffusers' schedulers are the same without a tuner.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from tests.integration.cuda.standin import compiled_guard, load_guard


def measure() -> list[dict[str, Any]]:
    """Return the copies and waits of the second denoising step, and of the call up to it, of each case."""
    import torch

    from restune_diffusion import Tuner, save_tuner
    from tests.conftest import randomize
    from tests.integration.cuda.standin.device import cuda_device
    from tests.integration.cuda.steps import CASES, CONFIGS, WEIGHTS, generate, small_pipeline

    rows = []
    pipe = small_pipeline()
    with tempfile.TemporaryDirectory() as folder, cuda_device() as log, torch.no_grad():
        files = {kind: Path(folder) / f"{kind}.safetensors" for kind in CONFIGS}
        for seed, (kind, parts) in enumerate(CONFIGS.items()):
            tuner = Tuner.for_pipeline(pipe, *parts)
            randomize(tuner, seed)
            save_tuner(tuner, files[kind])
        pipe.to("cuda")
        for kind, weight in CASES:
            pipe.load_tuner_weights(files[kind], "t", weight=WEIGHTS[weight])
            generate(pipe, kind)
            log.clear()
            generate(pipe, kind, log)
            row: dict[str, Any] = {"tuner": kind, "weight": weight}
            for name, phase in (("first", "step 0"), ("step", "step 1")):
                row[f"{name} waits"] = len(log.waits(phase))
                row[f"{name} copies"] = log.counts(phase).get("to device, no wait", 0)
            log.clear()
            with log.phase("swap"):
                pipe.load_tuner_weights(files[kind], "t", hotswap=True)
            row["swap waits"] = len(log.waits("swap"))
            row["swap copies"] = log.counts("swap").get("to device, no wait", 0)
            rows.append(row)
            pipe.unload_tuner_weights()
    return rows


def main() -> None:
    """Run the benchmark, print the table and write it with the command, machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    # Before anything imports torch.
    load_guard(compiled_guard())
    from benchmarks.results_file import publish

    rows = measure()
    table = [
        "| tuner | weight | waits in a step | copies without wait | waits in the first step | waits in a swap |",
        "|---|---|---|---|---|---|",
    ]
    table += [
        f"| {r['tuner']} | {r['weight']} | {r['step waits']} | {r['step copies']} | {r['first waits']} | "
        f"{r['swap waits']} |"
        for r in rows
    ]
    publish("benchmarks.device_waits", rows, table, "counted on the stand-in for CUDA", arguments.output)


if __name__ == "__main__":
    main()
