"""Short messages below the controls."""

from __future__ import annotations

from typing import Any


def note(html: str) -> Any:
    """Return an update of a message, which takes no space while it is empty."""
    import gradio as gr

    return gr.update(value=html, visible=bool(html))
