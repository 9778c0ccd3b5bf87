"""HTML report of a training run or a sweep: `write_report("out")`."""

from .write import write_report

__all__ = ["write_report"]
