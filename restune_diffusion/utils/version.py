"""Version of the package; pyproject.toml and the files that record it read it here."""

__version__ = "0.1.0"
