"""Run all benchmarks, or some, and write one page with tables and plots.

    python -m benchmarks.all
    python -m benchmarks.all --only training startup

Models have Stable Diffusion 1.5's size and random weights. On a CPU all times are processor times of one thread,
because other programs disturb them less than wall-clock times; on CUDA they are times between events. Contestants run
in turn in one process. Finished groups of rows are kept in OUTPUT/all.json, so an interrupted run goes on; `--again`
measures the chosen benchmarks again. A dry run has small models and two rounds, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers.utils.logging import set_verbosity_error

from benchmarks.cuda.bench import Bench

from . import generation, startup, training
from .page import write_page
from .rows import Row, Rows, facts

RESULTS = Path(__file__).parents[1] / "results"
Groups = dict[str, Callable[[], list[Row]]]


def groups_of(bench: Bench, pixels: int) -> dict[str, Groups]:
    """Return the groups of rows of each benchmark, for images of `pixels`."""
    side, small = (8, 8) if bench.dry else (pixels // 8, 16)
    return {
        "startup": {"start-up": partial(startup.start_up, bench)},
        "swap": {"swap": partial(generation.swaps, bench)},
        "training": {"training": partial(training.training_step, bench, 1, side)},
        "generation": {
            "generation": partial(generation.one_pass, bench, 1, side),
            "own tuners": partial(generation.own_tuners, bench, small),
        },
        "queue": {"queue": partial(generation.queue_of_styles, bench, small)},
        "scaling": {
            "scaling, tuners": partial(generation.scaling_in_tuners, bench, small),
            **{f"scaling, batch {n}": partial(training.scaling_step, bench, n, small) for n in (1, 2, 4)},
            **{
                f"scaling, {8 * n} px": partial(training.scaling_step, bench, 1, n)
                for n in ((8, 16) if bench.dry else (32, 16, 48))
            },
            **{f"scaling, {n} steps": partial(generation.scaling_in_steps, bench, small, n) for n in (1, 2, 4, 8)},
        },
    }


def main(args: Sequence[str] | None = None) -> None:
    """Run the benchmarks that have no rows yet, and write the page after each group."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all", description=(__doc__ or "").splitlines()[0])
    names = ("startup", "swap", "training", "generation", "queue", "scaling")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=list(names), help="benchmarks to run (default: all)"
    )
    parser.add_argument("--again", action="store_true", help="measure again what has been measured")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each contestant (default: 5)")
    parser.add_argument("--pixels", type=int, default=256, help="side of the images (default: 256)")
    parser.add_argument("--dry", action="store_true", help="run with small models, only to see that it runs")
    parser.add_argument("--output", type=Path, help=f"folder of the page (default: {RESULTS.name}; a dry run: none)")
    given = parser.parse_args(args)
    if given.dry and given.output is None:
        parser.error("--dry needs --output, because its figures must not replace measured ones.")
    output: Path = given.output or RESULTS
    torch.set_num_threads(1)
    set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() and not given.dry else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(dry=given.dry, folder=Path(folder), device=device)
        bench.rounds = 2 if given.dry else given.rounds
        rows = Rows(output / "all.json", facts(device, given.dry, given.pixels))
        every = groups_of(bench, given.pixels)
        for name in given.only:
            for group, run in every[name].items():
                if given.again:
                    rows.drop(group)
                rows.finish(group, run)
                bench.release()
                write_page(rows, output)
    print(output / "README.md")


if __name__ == "__main__":
    main()
