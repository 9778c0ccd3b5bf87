"""Count how often the host waits for the GPU in a training step, on a stand-in for CUDA that needs no GPU.

    python -m benchmarks.training_waits --output benchmarks/results/training_waits

A wait is a read of a value, a copy to the host, or a copy from pageable memory to the device, of the package or of a
library. The counts are those between the reports of the first step and of the second. They do not depend on the size
of the model.
"""

from __future__ import annotations

# isort: off
from tests.integration.cuda.standin import compiled_guard, load_guard

if __name__ == "__main__":
    # Before torch is imported.
    load_guard(compiled_guard())
# isort: on

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from benchmarks.results_file import publish
from restune_diffusion.training import StepReport, TrainConfig, train
from restune_diffusion.tuners.configs import ResConfig, TextConfig
from tests.integration.cuda.standin.device import cuda_device
from tests.tiny_training import sd_pipeline, sdxl_pipeline, write_images

LORA = ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=2)
TEXT = {"tuner": ("skip", "text"), "text": TextConfig(tokens=("disc",), rank=2)}
KINDS: dict[str, dict[str, Any]] = {
    "`skip`": {},
    "`skip`, SDXL": {"base": "sdxl"},
    "`skip`, two batches a step": {"gradient_accumulation_steps": 2},
    "`skip`, class preservation": {"class_prompt": "a disc", "preservation": "output", "validation": {"steps": 1}},
    "`res`": {"tuner": "res"},
    "LoRA": {"tuner": "res", "res": LORA},
    "`control`": {"tuner": "control", "control": {"conditions": ("canny",)}},
    "`skip` and `text`": TEXT,
    "`bypass`": {"tuner": "bypass"},
    "`bypass`, feature cache": {"tuner": "bypass", "feature_cache": 2},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {"AdamW": {}, "Prodigy": {"optimizer": "prodigy", "learning_rate": 1.0}}
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def waits_of_a_step(folder: Path, settings: dict[str, Any]) -> Counter[str]:
    """Return the waits of one training step by their kind and place."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with tempfile.TemporaryDirectory(dir=folder) as output, cuda_device() as log:
        common = {
            "base": str(folder / settings.get("base", "sd")),
            "data": folder / "data",
            "output": output,
            "steps": 3,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "checkpoint_every": 0,
            "log_with": "none",
        }
        changes = {name: value for name, value in settings.items() if name != "base"}

        def name_phase(report: StepReport) -> None:
            log.current = f"after step {report.step}"

        train(TrainConfig(**{**common, **changes}), verbose=False, on_progress=name_phase)
        return Counter(log.waits("after step 1", ours=False))


def main() -> None:
    """Count, print the table and write it with the command and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of the kinds to count")
    parser.add_argument("--verbose", action="store_true", help="print each wait with its place")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        sd_pipeline().save_pretrained(folder / "sd")
        sdxl_pipeline().save_pretrained(folder / "sdxl")
        write_images(folder / "data")
        for kind, settings in KINDS.items():
            if not any(part in kind for part in arguments.only):
                continue
            row: dict[str, Any] = {"kind": kind}
            for optimizer, changes in OPTIMIZERS.items():
                for precision, name in PRECISIONS.items():
                    waits = waits_of_a_step(folder, {**settings, **changes, "mixed_precision": name})
                    row[f"{optimizer}, {precision}"] = sum(waits.values())
                    if arguments.verbose:
                        print(kind, optimizer, precision, *(f"\n    {n} {w}" for w, n in waits.items()), flush=True)
            rows.append(row)
    columns = list(rows[0])
    table = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    table += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    publish("benchmarks.training_waits", rows, table, "counted on a stand-in for CUDA", arguments.output)


if __name__ == "__main__":
    main()
