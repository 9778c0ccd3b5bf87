"""The tab Generate: prompts, tuners, previews, grids."""
