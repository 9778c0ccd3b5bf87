"""Stop training after the current step on SIGTERM or Ctrl-C."""

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
    """Request to stop training, set by SIGTERM or Ctrl-C.

    A second Ctrl-C ends the process at once, with the default handler of the system.
    """

    def __init__(self) -> None:
        self._requested = False
        self.by_ctrl_c = False
        """Whether this process received a Ctrl-C."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Context manager that handles both signals; a signal that the process ignores stays ignored.

        Python allows signal handlers only in the main thread; in other threads this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for number, handler in before.items():
                if handler is not signal.SIG_IGN:
                    signal.signal(number, self._request)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def agreed(self, accelerator: Any) -> bool:
        """Return whether any process received a request; all processes must call it at the same step."""
        if accelerator.num_processes == 1:
            return self._requested
        requested = torch.tensor(float(self._requested), device=accelerator.device)
        return bool(accelerator.reduce(requested, reduction="sum").item() > 0)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        if number == signal.SIGINT:
            self.by_ctrl_c = True
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            # os.write instead of print, which is not reentrant: the signal may interrupt a progress bar's print.
            os.write(2, _NOTICE)
