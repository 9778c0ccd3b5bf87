"""Errors of the library as messages on the page."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..utils.errors import RestuneError


def shown_as_message(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a handler of an event: its `RestuneError` is shown as one sentence on the page, without a traceback."""

    @functools.wraps(function)
    def handler(*arguments: Any, **options: Any) -> Any:
        import gradio as gr

        try:
            return function(*arguments, **options)
        except RestuneError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    return handler
