"""Captioners that come with the package."""
