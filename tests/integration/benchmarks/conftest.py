from ...unit.benchmarks.conftest import icons, tiny_base

__all__ = ["icons", "tiny_base"]
