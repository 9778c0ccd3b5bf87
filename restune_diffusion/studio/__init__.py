"""The studio: a web page where people train, look, mix and compare tuners."""
