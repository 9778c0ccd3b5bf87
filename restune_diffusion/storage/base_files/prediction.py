"""What the U-Net of a single-file checkpoint predicts: noise or velocity, and whether the last step is pure noise."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from ...utils.errors import RestuneError
from .contents import UNET, Family
from .tensor_header import TensorHeader

# SD 2.x files carry no mark. ComfyUI tells the two by this tensor (comfy/supported_models.py, class SD20).
_V2_TENSOR = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_V2_DEVIATION = 0.09
_YAML_PREDICTION = re.compile(r"^\s*parameterization:\s*[\"']?(\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Prediction:
    """Prediction type of a base and whether its noise schedule ends in pure noise (arXiv 2305.08891)."""

    v_prediction: bool
    zero_terminal_snr: bool


def read_prediction(header: TensorHeader, family: Family) -> Prediction:
    """Return the prediction type that a checkpoint declares.

    Marks, the first one found counts: the tensors `v_pred` and `ztsnr`, which trainers of v-prediction SDXL write; the
    metadata `modelspec.prediction_type` of sd-scripts; the `parameterization` in a `.yaml` file of the same name
    beside the checkpoint; for SD 2.x, the statistics of one bias.

    Raises:
        RestuneError: if the mark is a prediction type that is not supported.
    """
    zero = "ztsnr" in header.shapes
    if "v_pred" in header.shapes:
        return Prediction(True, zero)
    declared = header.metadata.get("modelspec.prediction_type") or _beside(header.path)
    if declared is not None:
        kinds = {"v": True, "v_prediction": True, "epsilon": False, "eps": False}
        if declared.lower() not in kinds:
            raise RestuneError(
                f"The base {header.path} predicts {declared!r}; supported are epsilon and v-prediction."
            )
        return Prediction(kinds[declared.lower()], zero)
    return Prediction(family == "sd2" and _v2_predicts_velocity(header), zero)


def _beside(path: Path) -> str | None:
    config = path.with_suffix(".yaml")
    if not config.is_file():
        return None
    found = _YAML_PREDICTION.search(config.read_text(encoding="utf-8", errors="replace"))
    return found[1] if found else None


def _v2_predicts_velocity(header: TensorHeader) -> bool:
    if _V2_TENSOR not in header.shapes:
        return False
    with safe_open(header.path, framework="pt") as file:
        bias = file.get_tensor(_V2_TENSOR).float()
    return bool(torch.std(bias, unbiased=False) > _V2_DEVIATION)
