"""Program of both processes of a group; `test_two_processes.py` starts it as `two_processes.py JOBS.json`.

JOBS.json names the configs to train in turn, and a folder whose cache is built together. Each process writes what it
saw to JOBS-<rank>.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.pipelines.load_base import load_base
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.latents.cache import Cache, build_cache
from restune_diffusion.training.latents.cache_shards import build_together
from restune_diffusion.utils.errors import RestuneError


def values(cache: Cache) -> dict[str, Any]:
    """Return the contents of a cache as plain values."""
    return {
        "latents": [[latent.mean.tolist(), latent.std.tolist()] for latent in cache.latents],
        "captions": cache.captions,
        "geometries": [[*each.original, *each.corner, *each.size] for each in cache.size_conditionings],
        "conditionings": {key: value.states.tolist() for key, value in sorted(cache.conditionings.items())},
        "unconditional": cache.unconditional.states.tolist(),
        "images": [image.tolist() for image in cache.images],
        "hash": cache.data_hash,
    }


def caches(accelerator: Accelerator, base: str, folder: Path) -> dict[str, Any]:
    """Build the cache of a folder with both processes and with one."""
    pipeline = load_base(base, torch.float32)
    encoded = []

    def build(examples: Any) -> Cache:
        encoded.append(len(examples))
        return build_cache(pipeline, load_samples(examples, 16), keep_images=True)

    examples = find_examples(folder)
    together = values(build_together(accelerator, examples, build))
    share = encoded[0]
    alone = values(build(examples))
    return {"share": share, "images": len(alone["captions"]), "equal": together == alone}


def refused(action: Any) -> str | None:
    """Return the error message of an action."""
    try:
        action()
    except RestuneError as error:
        return f"{type(error).__name__}: {error}"
    return None


def wait_for_the_other(path: Path, number: int) -> None:
    """Wait until both processes have left a group; the next one would else connect to the store of the last one."""
    done = [path.with_name(f"done-{number}-{rank}") for rank in ("0", "1")]
    done[int(os.environ["RANK"])].touch()
    while not all(each.exists() for each in done):
        time.sleep(0.05)


def main() -> None:
    """Run the jobs."""
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    jobs = json.loads(path.read_text())
    messages = []
    for config in jobs["configs"]:
        messages.append(refused(lambda config=config: train(TrainConfig.model_validate(config), verbose=False)))
        # A training run ends the process group; the next run must create it again.
        AcceleratorState._reset_state(reset_partial_state=True)
        wait_for_the_other(path, len(messages))
    accelerator = Accelerator(cpu=True)
    results = {
        "messages": messages,
        "caches": caches(accelerator, jobs["base"], Path(jobs["half_broken"])),
        "nothing": refused(lambda: caches(accelerator, jobs["base"], Path(jobs["broken"]))),
    }
    path.with_name(f"{path.stem}-{accelerator.process_index}.json").write_text(json.dumps(results))
    accelerator.end_training()


if __name__ == "__main__":
    main()
