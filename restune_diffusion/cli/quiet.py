"""Suppress the log messages and progress bars of libraries."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Set diffusers and transformers to log errors only and disable their progress bars."""
    import warnings

    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # diffusers' own SDXL pipelines call a method that diffusers deprecates.
    warnings.filterwarnings("ignore", ".*upcast_vae.*", FutureWarning)
