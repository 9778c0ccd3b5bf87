"""The page of the studio, and the application that serves it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .context import StudioContext
from .generation import tab as generation
from .library import tab as library
from .safety.gate import StudioGate
from .safety.rules import PageRules
from .theme import CSS, header_html, make_theme
from .training import tab as training

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

# Read by gradio at import: it would report each start to its makers.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

TABS = (("Train", training.build_tab), ("Generate", generation.build_tab), ("Library", library.build_tab))


_HOUR, _DAY = 3600, 24 * 3600


def build_page(context: StudioContext) -> gr.Blocks:
    """Return the page with its tabs.

    Args:
        context: state of the studio.
    """
    import gradio as gr

    has_password = context.settings.password_digest is not None
    with gr.Blocks(title="Restune studio", analytics_enabled=False, delete_cache=(_HOUR, _DAY)) as page:
        gr.HTML(header_html(context.base, has_password=has_password), elem_id="studio-header")
        with gr.Tabs(elem_id="studio-tabs"):
            for name, build_tab in TABS:
                with gr.Tab(name, id=name.lower()) as tab:
                    build_tab(context, tab)
    # No function of the page is part of an API, and none is described.
    for function in page.fns.values():
        function.api_visibility = "private"
    return page


def build_app(context: StudioContext) -> Any:
    """Return the ASGI application that serves the page.

    Args:
        context: state of the studio.
    """
    workspace, settings = context.workspace, context.settings
    # By default Gradio would serve a folder that all its programs on this machine share.
    os.environ["GRADIO_TEMP_DIR"] = str(workspace.cache)
    workspace.cache.chmod(0o700)
    import gradio as gr
    from fastapi import FastAPI

    app: FastAPI = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    shown = [workspace.images, workspace.runs, workspace.data, *settings.data_folders]
    page = build_page(context)
    gr.mount_gradio_app(
        app,
        page.queue(default_concurrency_limit=4),
        path="",
        # Only what the page shows as a file; never the whole home folder.
        allowed_paths=[str(folder) for folder in (*shown, workspace.tuners)],
        max_file_size=settings.max_upload_mib * 2**20,
        show_error=False,
        ssr_mode=False,
        run_history=False,
        mcp_server=False,
        theme=make_theme(),
        css=CSS,
        footer_links=[],
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
    )
    # A mounted page counts as not launched, and Gradio then does not check the paths of its inputs. The gate does too.
    page.has_launched = True
    return StudioGate(app, settings.password_digest, PageRules(workspace.cache, shown))
