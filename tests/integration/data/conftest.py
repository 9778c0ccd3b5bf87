from ...training_fixtures import base, config, images, script

__all__ = ["base", "config", "images", "script"]
