"""The command line: `restune train | data | generate | grid | evaluate | report | inspect | demo`."""

from .app import main

__all__ = ["main"]
