"""Uploads: checked, and stored as data folders."""
