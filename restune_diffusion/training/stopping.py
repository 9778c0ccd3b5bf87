"""Stop a training when the system or the user asks, after a whole step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

_NOTICE = b"\nrestune: stopping after this step; press Ctrl-C again to exit at once.\n"


class StopRequest:
    """Whether this process was asked to stop, by SIGTERM or Ctrl-C.

    A second Ctrl-C ends the process at once, by the system's own default.
    """

    def __init__(self) -> None:
        self._asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the two signals meanwhile; a signal that the process ignores stays ignored.

        Only the main thread can do so; in another one nothing happens.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for number, handler in before.items():
                if handler is not signal.SIG_IGN:
                    signal.signal(number, self._ask)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def agreed(self, accelerator: Any) -> bool:
        """Return whether any process was asked to; all processes must call it at the same step."""
        if accelerator.num_processes == 1:
            return self._asked
        asked = torch.tensor(float(self._asked), device=accelerator.device)
        return bool(accelerator.reduce(asked, reduction="sum").item() > 0)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            # Not by `print`, which must not be entered twice, and a progress bar may just be in it.
            os.write(2, _NOTICE)
