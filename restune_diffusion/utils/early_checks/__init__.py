"""Checks before the libraries are imported, which takes seconds."""
