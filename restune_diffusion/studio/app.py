"""The page of the studio, and the application that serves it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .context import StudioContext
from .gate import LocalPagesOnly, check_password
from .generation import tab as generation
from .library import tab as library
from .theme import CSS, make_theme
from .training import tab as training

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

# Read by gradio at import: it would report each start to its makers.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

TABS = (("Train", training.build_tab), ("Generate", generation.build_tab), ("Library", library.build_tab))


def build_page(context: StudioContext) -> gr.Blocks:
    """Return the page with its tabs.

    Args:
        context: state of the studio.
    """
    import gradio as gr

    with gr.Blocks(title="Restune studio", analytics_enabled=False) as page:
        gr.Markdown("# Restune studio")
        with gr.Tabs():
            for name, build_tab in TABS:
                with gr.Tab(name, id=name.lower()):
                    build_tab(context)
    return page


def build_app(context: StudioContext) -> Any:
    """Return the ASGI application that serves the page.

    Args:
        context: state of the studio.
    """
    import gradio as gr
    from fastapi import FastAPI

    app: FastAPI = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    workspace, digest = context.workspace, context.settings.password_digest
    gr.mount_gradio_app(
        app,
        build_page(context).queue(default_concurrency_limit=4),
        path="",
        auth=None if digest is None else check_password(digest),
        auth_message="The user name is `restune`; the password is that of `restune studio`.",
        # Only what the page shows as a file; never the whole home folder.
        allowed_paths=[str(workspace.images), str(workspace.tuners), str(workspace.runs), str(workspace.data)],
        max_file_size=context.settings.max_upload_mib * 2**20,
        ssr_mode=False,
        theme=make_theme(),
        css=CSS,
        footer_links=[],
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
    )
    return LocalPagesOnly(app) if digest is None else app
