"""Errors of the library as messages on the page."""

from __future__ import annotations

import contextlib
import functools
import html
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from ..utils.errors import RestuneError


def shown_as_message(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a handler of an event: its `RestuneError` is shown as one sentence on the page, without a traceback.

    A handler that yields stays one, which gradio recognizes by its type.
    """

    @functools.wraps(function)
    def handler(*arguments: Any, **options: Any) -> Any:
        with _messages():
            return function(*arguments, **options)

    @functools.wraps(function)
    def steps(*arguments: Any, **options: Any) -> Iterator[Any]:
        with _messages():
            yield from function(*arguments, **options)

    return steps if inspect.isgeneratorfunction(function) else handler


@contextlib.contextmanager
def _messages() -> Iterator[None]:
    import gradio as gr

    try:
        yield
    except RestuneError as error:
        raise gr.Error(as_html(str(error)), duration=None, print_exception=False) from error


def as_html(text: str) -> str:
    """Return a message as HTML, which Gradio takes messages for: a token such as `<cat>` would not be shown."""
    return html.escape(text, quote=False)
