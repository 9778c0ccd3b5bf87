from ...unit.research.conftest import icons, tokenizer

__all__ = ["icons", "tokenizer"]
