"""HTML report of a training run: `write_report("out")`."""

from .page import write_report

__all__ = ["write_report"]
