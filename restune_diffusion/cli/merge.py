"""`restune merge`: merge tuner files into one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import ConfigDict, Field

from .options.early_checks import check_tuners
from .options.interruption import stoppable
from .options.outputs import OverwriteOption


class MergeOptions(OverwriteOption):
    """Merge several tuners into one, or reduce the rank of a lora tuner.

    A sum (`add`, `subtract`) of skip tuners, or of tuners with only lora parts, is exact: it equals the tuners active
    together. Their bottlenecks are concatenated, so the file grows. The average of lora parts is exact in the same
    way. The average of any other part averages the weights: it requires equal configs, keeps the size, and is a
    heuristic.

    Example: restune merge watercolor.safetensors:0.5 ink.safetensors:0.5 --output both.safetensors
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tuners: Annotated[tuple[str, ...], tyro.conf.Positional] = Field(min_length=1)
    """Tuner files, each optionally with its weight after a colon: `ink.safetensors:0.5`; the default weight is 1."""
    output: Path
    """Output file."""
    method: Literal["average", "interpolate", "add", "subtract", "stack"] = "average"
    """`average`: weighted mean. `interpolate`: from the first tuner to the second, by the second's weight. `add`, also
    called `stack`: weighted sum. `subtract`: the first tuner minus the others."""
    rank: int | None = Field(default=None, gt=0)
    """Reduce lora parts to this rank by singular value decomposition of every layer."""

    def run(self) -> None:
        """Merge the tuners and print the output path."""
        from ..utils.weighted_path import split_weight

        sources = [split_weight(tuner) for tuner in self.tuners]
        with stoppable(lambda: f"{self.output} is not written"):
            check_tuners(path for path, _ in sources)
            self.check_outputs(self.output, inputs=[path for path, _ in sources])
            self._merge(sources)
        print(self.output)

    def _merge(self, sources: list[tuple[str, float]]) -> None:
        from ..conversion.arithmetic import merge_tuners, reduce_rank
        from ..storage.tuner_file import load_tuner, save_tuner

        weights = [weight for _, weight in sources]
        merged = merge_tuners([load_tuner(path) for path, _ in sources], weights, self.method)
        if self.rank is not None:
            merged, kept = reduce_rank(merged, self.rank)
            print(f"Rank {self.rank} keeps {kept:.2%} of the layers' squared norm.")
        names = [Path(path).name for path, _ in sources]
        facts = {"method": self.method, "tuners": names, "weights": weights, "rank": self.rank}
        save_tuner(
            merged,
            self.output,
            metadata={"modelspec.merged_from": ", ".join(names), "restune.merge": json.dumps(facts)},
        )
