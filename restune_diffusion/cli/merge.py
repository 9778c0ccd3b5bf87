"""`restune merge`: make one tuner file of several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field


class MergeOptions(BaseModel):
    """Make one tuner of several, or give a tuner of lora a lower rank.

    A sum (`add`, `subtract`) of skip tuners, or of tuners of lora alone, does exactly what they do together: their
    bottlenecks stand side by side, so the file grows. The average of lora is exact in the same way. The average of
    any other part is taken of its weights: it needs the same config, keeps the size, and is a heuristic.

    Example: restune merge watercolor.safetensors:0.5 ink.safetensors:0.5 --output both.safetensors
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tuners: Annotated[tuple[str, ...], tyro.conf.Positional] = Field(min_length=1)
    """Tuner files, each with its weight after a colon where it is not 1."""
    output: Path
    """The file to write."""
    method: Literal["average", "interpolate", "add", "subtract", "stack"] = "average"
    """`average`: the weighted mean. `interpolate`: from the first to the second, as far as the second's weight says.
    `add` or, by another name, `stack`: the weighted sum. `subtract`: the first less the others."""
    rank: int | None = Field(default=None, gt=0)
    """Reduce lora to this rank, by the singular value decomposition of every layer."""

    def run(self) -> None:
        """Merge, and say where the result is."""
        from ..conversion.arithmetic import merge_tuners, reduce_rank
        from ..storage.tuner_file import load_tuner, save_tuner
        from .options.mix import split_weight

        sources = [split_weight(tuner) for tuner in self.tuners]
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
        print(self.output)
