"""Record of a run's measurements by name and step, which checkpoints save."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

VALIDATION_LOSS = "validation_loss"
"""Name of the mean loss of the held-out images."""


@dataclass(frozen=True)
class Measurement:
    """Value of a named measurement of the tuner after a step, for example `validation_loss`."""

    name: str
    step: int
    value: float
    lower_is_better: bool = True


class Measurements:
    """Measurements of a run.

    Every process must add the same ones, because all of them decide from the record when to stop. A callback that
    measures in the main process alone distributes its results with `gather_objects`. It adds the measurements of a
    step in `on_step` of that step, declares the step in `reads_state`, and stands before `BestFile` in the list of
    callbacks.

    Args:
        entries: the first measurements.
    """

    def __init__(self, entries: Iterable[Measurement] = ()) -> None:
        self._entries: dict[tuple[str, int], Measurement] = {}
        for entry in entries:
            self.add(entry)

    def add(self, measurement: Measurement) -> None:
        """Add a measurement; it replaces one with the same name and step."""
        self._entries[measurement.name, measurement.step] = measurement

    def named(self, name: str) -> list[Measurement]:
        """Return the measurements of a name in the order of their steps."""
        found = [entry for entry in self._entries.values() if entry.name == name]
        return sorted(found, key=lambda entry: entry.step)

    def best(self, name: str) -> Measurement | None:
        """Return the best measurement of a name, the earliest of equal ones, or None if there is no finite one."""
        finite = [entry for entry in self.named(name) if math.isfinite(entry.value)]
        return min(finite, key=lambda entry: entry.value if entry.lower_is_better else -entry.value, default=None)

    def since_best(self, name: str) -> int:
        """Return the number of measurements of a name after its best one."""
        best = self.best(name)
        return sum(best is None or entry.step > best.step for entry in self.named(name))

    def as_json(self) -> list[dict[str, Any]]:
        """Return the record as plain JSON values."""
        return [asdict(entry) for entry in self._entries.values()]

    @classmethod
    def from_json(cls, entries: Sequence[Mapping[str, Any]]) -> Measurements:
        """Return the record of `as_json`."""
        return cls(Measurement(**entry) for entry in entries)
