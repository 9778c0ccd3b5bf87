"""Colors, fonts and style sheet of the page; system fonts, so that no font is loaded from elsewhere."""

from __future__ import annotations

from html import escape
from typing import Any

from ..storage.base_files.location import public_name

CSS = """
.gradio-container .tab-container button { font-weight: 600; }
.gradio-container button[role=tab].selected { color: var(--link-text-color); }
.gradio-container .wrap span.or { color: var(--body-text-color-subdued); }
.gradio-container button.lg { font-weight: 600; font-size: var(--text-md); padding: .5rem 1rem; }
.gradio-container { box-sizing: border-box; width: 100%; max-width: 1280px !important; margin: 0 auto; }
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
        f"<p>Base at the start: {escape(public_name(base))}</p>{log_out if has_password else ''}</header>"
    )


def make_theme() -> Any:
    """Return the theme of the page; text has at least the contrast of WCAG AA on its background."""
    import gradio as gr

    return gr.themes.Soft(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
        block_border_width="1px",
        block_border_width_dark="1px",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_700",
        block_shadow="none",
        block_shadow_dark="none",
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        block_title_text_weight="600",
        block_title_padding="0",
        block_label_background_fill="*neutral_100",
        block_label_background_fill_dark="*neutral_700",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_100",
        input_border_width="1px",
        input_border_width_dark="1px",
        input_border_color="*neutral_400",
        input_border_color_dark="*neutral_500",
        input_shadow="none",
        input_background_fill_dark="*neutral_900",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_secondary_background_fill="white",
        button_secondary_background_fill_dark="*neutral_700",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_600",
        button_border_width="1px",
        button_border_width_dark="1px",
        button_primary_shadow="none",
        button_secondary_shadow="none",
        button_secondary_shadow_hover="none",
        button_cancel_background_fill="white",
        button_cancel_background_fill_dark="*neutral_800",
        button_cancel_text_color="#b91c1c",
        button_cancel_text_color_dark="#fca5a5",
        button_cancel_border_color="#b91c1c",
        button_cancel_border_color_dark="#fca5a5",
        checkbox_label_background_fill_selected="*primary_700",
        checkbox_label_background_fill_selected_dark="*primary_700",
        checkbox_label_text_color_selected="white",
        checkbox_border_color="*neutral_500",
        checkbox_border_color_dark="*neutral_400",
        slider_color="*primary_600",
        slider_color_dark="*primary_500",
    )
