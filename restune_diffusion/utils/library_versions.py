"""Versions of the libraries that affect numerical results."""

from __future__ import annotations

from importlib.metadata import version

from .version import __version__


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that affect the numerical result."""
    return {"restune-diffusion": __version__, **{name: version(name) for name in ("torch", "diffusers")}}
