"""Save a pipeline with tuners under the class name of diffusers, so that it loads without this package."""

from __future__ import annotations

import json


class PlainConfigMixin:
    """Mixin that writes the name of the extended diffusers class to `model_index.json`.

    `DiffusionPipeline.from_pretrained` looks the name up in diffusers, which has no class of this package.
    `save_pretrained` does not save tuners: they are not components, and each has its own file.
    """

    def to_json_string(self) -> str:
        """Return the pipeline's config as JSON, as `save_pretrained` writes it."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = plain_class(type(self)).__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def plain_class(pipeline_class: type) -> type:
    """Return the diffusers class that a class with the mixin extends."""
    return next(cls for cls in pipeline_class.__mro__[1:] if not issubclass(cls, PlainConfigMixin))
