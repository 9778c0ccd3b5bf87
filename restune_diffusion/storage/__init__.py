"""The file of a tuner: header, loading, saving, caching, the Hub and the model card."""
