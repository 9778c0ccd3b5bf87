"""The tab Train: images, settings, the queue of runs."""
