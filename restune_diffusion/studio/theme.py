"""Colors, fonts and style sheet of the page; system fonts, so that no font is loaded from elsewhere."""

from __future__ import annotations

from html import escape
from typing import Any

from ..storage.base_files.location import public_name

CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto; }
.studio-head { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; align-items: baseline; }
.studio-head h1 { margin: 0; font-size: 1.6rem; font-weight: 700; letter-spacing: -.02em; }
.studio-head p { margin: 0; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.studio-head form { margin-left: auto; }
.studio-head button { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .25rem .75rem;
  color: var(--body-text-color); background: var(--background-fill-primary); cursor: pointer; }
:focus-visible { outline: 3px solid var(--primary-500); outline-offset: 2px; }
@media (max-width: 640px) { .gradio-container main { padding: .75rem !important; } }
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
"""


def header_html(base: str, *, has_password: bool) -> str:
    """Return the head of the page: its title, the base, and a button to log out.

    Args:
        base: path or id of the base at the start.
        has_password: whether there is something to log out of.
    """
    log_out = '<form method="post" action="/logout"><button type="submit">Log out</button></form>'
    return (
        '<header class="studio-head"><h1>Restune studio</h1>'
        f"<p>Base: {escape(public_name(base))}</p>{log_out if has_password else ''}</header>"
    )


def make_theme() -> Any:
    """Return the theme of the page."""
    import gradio as gr

    return gr.themes.Soft(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
