"""ComfyUI node that loads a skip tuner."""

from __future__ import annotations

import os
from typing import Any

import folder_paths

from restune_diffusion import load_tuner

from .patch import apply_tuner

_FOLDER = "restune"
folder_paths.add_model_folder_path(_FOLDER, os.path.join(folder_paths.models_dir, _FOLDER))


class LoadRestuneTuner:
    """Node that applies a skip tuner to a model, with a weight and a range of sampling steps."""

    CATEGORY = "loaders"
    DESCRIPTION = "Adds a skip tuner (SCEdit) of restune-diffusion to a Stable Diffusion model; several tuners add up."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs of the node in ComfyUI's format."""
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
        """Return a copy of ComfyUI's model patcher with the tuner applied; the original is not changed.

        Raises:
            RestuneError: if the file is not a skip tuner, or is for a model of another structure.
        """
        tuner = load_tuner(folder_paths.get_full_path_or_raise(_FOLDER, tuner_name))
        return (apply_tuner(model, tuner, weight, start_percent, end_percent),)


NODE_CLASS_MAPPINGS = {"LoadRestuneTuner": LoadRestuneTuner}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadRestuneTuner": "Load Restune Tuner"}
