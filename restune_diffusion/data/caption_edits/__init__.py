"""Edit the captions of a data folder in bulk."""
