"""Keep the libraries' chatter off the terminal."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Let diffusers and transformers report errors only, and show no progress bars of their own."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
