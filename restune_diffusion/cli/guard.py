"""Turn the errors that a user can mend into one sentence and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ..utils.display import printable
from ..utils.errors import RestuneError, TrainingInterrupted


def run_guarded(action: Callable[[], object]) -> int:
    """Do something; return the process's exit code, with what went wrong said in one sentence on stderr."""
    try:
        action()
        sys.stdout.flush()
    except TrainingInterrupted as stopped:
        # torchrun and accelerate number their processes; one of them is enough to tell.
        if os.environ.get("RANK", "0") == "0":
            print("restune:", printable(str(stopped)), file=sys.stderr)
        return 0
    except KeyboardInterrupt:
        print("restune: stopped; --resume goes on with a training from its newest checkpoint.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has what it wanted; what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RestuneError, OSError) as error:
        # Messages of other libraries run over many lines.
        print("restune:", printable(" ".join(str(error).split())), file=sys.stderr)
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        print(
            "restune: the GPU's memory is full; use a smaller batch or resolution, --mixed-precision fp16, "
            "or --tuner bypass.",
            file=sys.stderr,
        )
        return 1
    return 0
