"""Log of what a CUDA device would copy or wait for."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

import restune_diffusion

Kind = Literal["to device", "to device, no wait", "to host", "to host, no wait", "wait"]

_OURS = str(Path(restune_diffusion.__file__).parent)
# Frames that pass a call on: the dispatch of torch, and this stand-in.
_PASSING = (str(Path(__file__).parent), "/torch/", "/contextlib.py", "/concurrent/", "/threading.py")
# Parts of torch whose calls are worth a name of their own.
_NAMED = ("/torch/optim/", "/torch/amp/", "/torch/nn/utils/")


@dataclass(frozen=True)
class Event:
    """A copy between host and device, or a wait of the host for the device."""

    kind: Kind
    op: str
    num_bytes: int
    place: str
    """Nearest function of the package or of a library: `hooks/mixing.py:mask_at`, `diffusers/.../x.py:step`."""
    phase: str

    @property
    def waits(self) -> bool:
        """Whether the host waits; a copy from or to pageable memory does."""
        return not self.kind.endswith("no wait")

    @property
    def ours(self) -> bool:
        """Whether the nearest function is one of the package."""
        return not self.place.startswith("~")

    def __str__(self) -> str:
        return f"{self.kind}: {self.op} in {self.place}"


@dataclass
class TransferLog:
    """Events since the start or the last `clear`, in phases that a test names."""

    events: list[Event] = field(default_factory=list)
    current: str = ""
    """Name of the current phase."""

    def clear(self) -> None:
        """Remove all events."""
        self.events.clear()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context manager whose events get the name of a phase."""
        before, self.current = self.current, name
        try:
            yield
        finally:
            self.current = before

    def of(self, phase: str | None = None, *, ours: bool = True) -> list[Event]:
        """Return the events of a phase (None: of all), by default only those of the package's own code."""
        return [event for event in self.events if phase in (None, event.phase) and (event.ours or not ours)]

    def waits(self, phase: str | None = None, *, ours: bool = True) -> list[str]:
        """Return the events for which the host waits, as text."""
        return [str(event) for event in self.of(phase, ours=ours) if event.waits]

    def counts(self, phase: str | None = None, *, ours: bool = True) -> dict[Kind, int]:
        """Return the number of events of each kind."""
        return dict(Counter(event.kind for event in self.of(phase, ours=ours)))

    def note(self, kind: Kind, op: str, num_bytes: int = 0) -> None:
        """Add an event of the calling code."""
        self.events.append(Event(kind, op, num_bytes, _place(sys._getframe(1)), self.current))


def _place(frame: FrameType | None) -> str:
    while frame is not None:
        code = frame.f_code
        path, name = code.co_filename, code.co_qualname
        if path.startswith(_OURS):
            return f"{path[len(_OURS) + 1 :]}:{name}"
        if not any(part in path for part in _PASSING) or any(part in path for part in _NAMED):
            return f"~{path.rpartition('site-packages/')[2]}:{name}"
        frame = frame.f_back
    return "~"
