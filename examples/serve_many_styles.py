"""Serve requests for different tuners, prompts, seeds and numbers of steps with one U-Net, through the engine.

    python examples/serve_many_styles.py                       # the bundled base, two minutes on a CPU, then seconds
    python examples/serve_many_styles.py --base BASE --tuners FOLDER --prompt "a fox" "a lighthouse"

`restune serve` offers the same engine over HTTP.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from demo_tuners import demo_tuners

from restune_diffusion.cli.guard import run_guarded
from restune_diffusion.pipelines.load_base import load_placed
from restune_diffusion.serving import Engine, ImageRequest, Limits, TunerLibrary
from restune_diffusion.storage.base_files.location import BUNDLED_BASE


def main() -> None:
    """Submit a request for each prompt and style at once, and save the images as they finish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(BUNDLED_BASE))
    parser.add_argument("--tuners", type=Path, help="folder of tuner files; by default two for the bundled base")
    parser.add_argument("--prompt", nargs="+", default=["red heart", "dog face"])
    parser.add_argument("--output", type=Path, default=Path("outputs/serve-many-styles"))
    parser.add_argument("--steps", type=int, default=150, help="training steps of the default tuners")
    parser.add_argument("--inference-steps", type=int, default=20)
    options = parser.parse_args()

    folder = options.tuners or demo_tuners(options.output / "tuners", options.steps)[0].parent
    library = TunerLibrary(folder)
    pipe = load_placed(options.base, "auto", "auto")
    options.output.mkdir(parents=True, exist_ok=True)
    with Engine(pipe, library, Limits(max_rows=16)) as engine:
        tickets = {}
        for number, prompt in enumerate(options.prompt):
            settings = {"seed": number, "steps": options.inference_steps + 2 * number, "guidance": 4.0}
            tickets[f"{number}-base"] = engine.submit(ImageRequest(prompt, **settings))
            for tuner in library.list():
                text = ", ".join([prompt, *tuner.trigger_words])
                request = ImageRequest(text, tuners=((tuner.name, 1.0),), **settings)
                tickets[f"{number}-{tuner.name}"] = engine.submit(request)
        for name, ticket in tickets.items():
            ticket.result().image.save(options.output / f"{name.replace('/', '-')}.png")
        stats = engine.stats()
    print(f"{options.output}: {stats.done} images in {stats.calls} calls of the U-Net")


if __name__ == "__main__":
    sys.exit(run_guarded(main))
