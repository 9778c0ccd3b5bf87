"""Helpers that know nothing of tuners: errors, atomic writes, seeds, settings."""
