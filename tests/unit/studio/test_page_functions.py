"""Events of the page, which reach the studio only by the route of Gradio's queue."""

from __future__ import annotations

import pytest

from restune_diffusion.storage.base_files.location import BUNDLED_BASE
from restune_diffusion.studio.app import build_page
from restune_diffusion.studio.context import StudioContext, StudioSettings
from restune_diffusion.studio.messages import shown_as_message
from restune_diffusion.utils.errors import UsageError

pytest.importorskip("gradio")


def test_no_function_of_the_page_bypasses_the_queue_whose_route_the_gate_knows(tmp_path):
    page = build_page(StudioContext(StudioSettings(tmp_path, str(BUNDLED_BASE))))
    functions = [each for each in page.fns.values() if each.fn is not None]
    assert functions
    # Gradio sends an event with queue=False to `run/predict`, which the gate refuses.
    assert [each.name for each in functions if each.queue is False] == []


def test_a_message_shows_angle_brackets():
    import gradio as gr

    def fail() -> None:
        raise UsageError("The token <cat> is unknown.")

    with pytest.raises(gr.Error) as error:
        shown_as_message(fail)()
    assert error.value.message == "The token &lt;cat&gt; is unknown."
