"""Colors, fonts and style sheet of the page; system fonts, so that no font is loaded from elsewhere."""

from __future__ import annotations

from typing import Any

CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto; }
"""


def make_theme() -> Any:
    """Return the theme of the page."""
    import gradio as gr

    return gr.themes.Soft(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
