"""Version of the package, the only definition, and versions of the libraries that affect numerical results."""

__version__ = "0.1.0"


def library_versions() -> dict[str, str]:
    """Return the versions of the package and of the libraries that affect the numerical result."""
    from importlib.metadata import version

    return {"restune-diffusion": __version__, **{name: version(name) for name in ("torch", "diffusers")}}
