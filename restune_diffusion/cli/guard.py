"""Convert user errors to a one-line message and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ..utils.display import printable
from ..utils.errors import RestuneError, TrainingInterrupted, UsageError


def run_guarded(action: Callable[[], object]) -> int:
    """Call a function and return the exit code of the process; errors are printed to stderr as one line."""
    try:
        action()
        sys.stdout.flush()
    except TrainingInterrupted as stopped:
        # With torchrun and accelerate only the process of rank 0 prints the message.
        if os.environ.get("RANK", "0") == "0":
            print("restune:", printable(str(stopped)), file=sys.stderr)
        # A launcher of several processes takes any other code than 0 for a failure.
        return 130 if stopped.by_ctrl_c and int(os.environ.get("WORLD_SIZE", "1")) == 1 else 0
    except KeyboardInterrupt as stopped:
        # The message of a command in `stoppable` names what is written.
        message = str(stopped) or "stopped."
        print("restune:", printable(message), file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output, such as `head`, closed the pipe; discard the buffered rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RestuneError, OSError) as error:
        # Messages of other libraries can have several lines.
        print("restune:", printable(" ".join(str(error).split())), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        print(
            "restune: out of GPU memory; use a smaller batch size or resolution, --mixed-precision fp16, "
            "or --tuner bypass.",
            file=sys.stderr,
        )
        return 1
    return 0
