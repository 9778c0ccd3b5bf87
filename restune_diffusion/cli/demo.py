"""`restune demo`: train two small tuners on bundled images."""

from __future__ import annotations

from pathlib import Path

from pydantic import ConfigDict, Field

from ..pipelines.sampling.image_names import free_path
from .options.interruption import stoppable
from .options.outputs import OverwriteOption


class DemoOptions(OverwriteOption):
    """Train two small tuners on bundled images and generate samples before and after; takes minutes on a CPU.

    Example: restune demo --output ./demo
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    output: Path | None = None
    """Output folder for the tuners and the image grid; if not given, restune-demo, or the next free number."""
    steps: int | None = Field(default=None, gt=0)
    """Training steps of each tuner; the demo's default if not given."""
    seed: int = 0
    """Seed of the training and of the images."""

    def run(self) -> None:
        """Run the demo."""
        output = self.output or free_path(Path("restune-demo"))
        files = [output / name for name in ("res.safetensors", "bypass.safetensors", "grid.png")]
        with stoppable(lambda: f"{output} has the files that are finished"):
            self.check_outputs(*files)
            from .quiet import quiet_libraries

            quiet_libraries()
            from .run_demo import run_demo

            options = {} if self.steps is None else {"steps": self.steps}
            run_demo(output, seed=self.seed, **options)
