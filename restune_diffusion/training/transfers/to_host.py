"""Numbers on their way from the device to the host."""

from __future__ import annotations

from typing import Any

import torch


class Reading:
    """Values of a tensor, copied to the host as soon as the device has computed them.

    On CUDA the copy is put in line behind the work so far. Only `result` waits, and only until the copy is done, not
    for the work that was launched since. On other devices the values are read at once.

    Args:
        values: one-dimensional tensor.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._values: list[float] | None = None
        self._event: Any = None
        if values.device.type == "cuda":
            self._buffer = torch.empty_like(values, device="cpu").pin_memory()
            self._buffer.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))
        else:
            self._values = values.tolist()

    @property
    def ready(self) -> bool:
        """Whether the values are on the host, as far as is known without asking the device."""
        return self._values is not None

    def result(self) -> list[float]:
        """Return the values; the first call waits for the copy."""
        if self._values is None:
            self._event.synchronize()
            self._values = self._buffer.tolist()
        return self._values
