"""Errors of the library as messages on the page."""

from __future__ import annotations

import contextlib
import functools
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
        raise gr.Error(str(error), duration=None, print_exception=False) from error
