"""What becomes of each caption before it is trained on."""

from __future__ import annotations

import re

from ..hooks.placeholder_tokens import holds_word
from .data_config import DataConfig


def apply_rule(caption: str, config: DataConfig) -> str:
    """Put the trigger word and the template of a config around a caption.

    Without a template the trigger word comes first, where the caption does not have it already; with one, the template
    alone decides.
    """
    trigger = config.trigger_word or ""
    if config.caption_template is not None:
        values = {"trigger": trigger, "caption": caption}
        # At once, so that braces in a caption are not read as names.
        return re.sub(r"\{(trigger|caption)\}", lambda name: values[name[1]], config.caption_template)
    if not trigger or holds_word(caption, [trigger]):
        return caption
    return f"{trigger}, {caption}" if caption else trigger
