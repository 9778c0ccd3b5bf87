"""Copies between host and device that do not make the host wait."""
