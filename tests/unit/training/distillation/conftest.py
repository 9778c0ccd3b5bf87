from ....training_fixtures import base, config, images

__all__ = ["base", "config", "images"]
