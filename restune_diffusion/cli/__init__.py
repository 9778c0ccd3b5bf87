"""The command line: `restune train | queue | data | generate | grid | evaluate | report | inspect | demo`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        args: command-line arguments; those of the process by default.
    """
    try:
        # Imported here, so that Ctrl-C during the imports gives no traceback.
        from .app import main as run
    except KeyboardInterrupt:
        print("restune: stopped.", file=sys.stderr)
        sys.exit(130)
    run(args)
