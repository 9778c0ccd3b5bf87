"""Version of the package, the only definition: pyproject.toml and file headers read it from here."""

__version__ = "0.1.0"
