from ...training_fixtures import base, images

__all__ = ["base", "images"]
