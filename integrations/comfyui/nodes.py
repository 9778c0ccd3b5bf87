"""The node that ComfyUI shows."""

from __future__ import annotations

import os
from typing import Any

import folder_paths

from restune_diffusion import load_tuner

from .patch import apply_tuner

_FOLDER = "restune"
folder_paths.add_model_folder_path(_FOLDER, os.path.join(folder_paths.models_dir, _FOLDER))


class LoadRestuneTuner:
    """Let a skip tuner act on a model, by a weight and in a range of the sampling steps."""

    CATEGORY = "loaders"
    DESCRIPTION = "Adds a skip tuner (SCEdit) of restune-diffusion to a Stable Diffusion model; several add up."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Describe the node's inputs to ComfyUI."""
        percent = {"min": 0.0, "max": 1.0, "step": 0.001}
        return {
            "required": {
                "model": ("MODEL",),
                "tuner_name": (folder_paths.get_filename_list(_FOLDER),),
                "weight": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01}),
                "start_percent": ("FLOAT", {"default": 0.0, **percent}),
                "end_percent": ("FLOAT", {"default": 1.0, **percent}),
            }
        }

    def load(self, model: Any, tuner_name: str, weight: float, start_percent: float, end_percent: float) -> tuple[Any]:
        """Return a copy of the model, as ComfyUI wraps it, with the tuner; the model itself is not changed.

        Raises:
            RestuneError: if the file is no skip tuner, or for a model of another structure.
        """
        tuner = load_tuner(folder_paths.get_full_path_or_raise(_FOLDER, tuner_name))
        return (apply_tuner(model, tuner, weight, start_percent, end_percent),)


NODE_CLASS_MAPPINGS = {"LoadRestuneTuner": LoadRestuneTuner}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadRestuneTuner": "Load Restune Tuner"}
