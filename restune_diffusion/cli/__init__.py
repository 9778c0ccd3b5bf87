"""The command line: `restune train | generate | inspect | demo`."""

from .app import main

__all__ = ["main"]
