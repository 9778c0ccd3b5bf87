"""Conventions of data folders: suffixes, caption files, masks beside images, partner files."""
