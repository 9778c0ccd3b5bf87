"""Message of a command that Ctrl-C stops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stoppable(state: Callable[[], str]) -> Iterator[None]:
    """Context manager that adds the state of the work to a `KeyboardInterrupt`, for the message that ends the process.

    Args:
        state: returns what is already written.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {state()}.") from None
