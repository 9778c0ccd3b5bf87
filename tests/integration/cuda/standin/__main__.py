"""Run pytest in a process with the stand-in: `python -m tests.integration.cuda.standin <arguments of pytest>`."""

import sys

from .guard import compiled_guard, load_guard

if __name__ == "__main__":
    load_guard(compiled_guard())
    import pytest

    sys.exit(pytest.main(["-p", "no:xdist", "-p", "no:cacheprovider", *sys.argv[1:]]))
