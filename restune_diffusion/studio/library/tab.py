"""Build the tab Library."""

from __future__ import annotations

from ..context import StudioContext


def build_tab(context: StudioContext) -> None:
    """Add the components and events of the tab to the page that is being built.

    Args:
        context: state of the studio.
    """
    import gradio as gr

    gr.Markdown("Not built yet.")
