"""General helpers, independent of tuners: errors, atomic writes, seeds, settings."""
