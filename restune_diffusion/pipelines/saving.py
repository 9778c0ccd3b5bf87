"""Save a pipeline with tuners under the name of diffusers' own class, so that diffusers alone can load it."""

from __future__ import annotations

import json


class PlainConfigMixin:
    """Write the name of the pipeline class that it is mixed into, and not the mixture's, into `model_index.json`.

    `DiffusionPipeline.from_pretrained` looks that name up in diffusers, which knows no class of this package. Tuners
    are not part of what `save_pretrained` writes: they are no component, and each is a file of its own.
    """

    def to_json_string(self) -> str:
        """Return the pipeline's config as JSON, as `save_pretrained` writes it."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = plain_class(type(self)).__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def plain_class(pipeline_class: type) -> type:
    """Return the pipeline class that a class with the mixin extends: the one that it would be without tuners."""
    return next(cls for cls in pipeline_class.__mro__[1:] if not issubclass(cls, PlainConfigMixin))
