"""Captioner from any image-to-text model of transformers: BLIP, GIT, Florence, encoder-decoders, chat models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from ....storage.base_files.location import is_hub_id
from ....utils.errors import DataError
from ..registry import Captioner, CaptionerSettings

CHAT_PROMPT = "Describe the image in one sentence."
"""Prompt of chat models, which need one."""


def load_vision_language_model(settings: CaptionerSettings) -> Captioner:
    """Return a captioner from a folder or a repository on the Hub; weights are read from safetensors files only.

    Raises:
        DataError: if there is no model, it is of another task, or it has no safetensors weights.
    """
    name = settings.needed_model("transformers")
    folder = Path(name).expanduser()
    if not folder.is_dir() and not is_hub_id(name):
        raise DataError(f"There is no captioning model at {name}; give its folder, or a repository id on the Hub.")
    source = str(folder) if folder.is_dir() else name
    # Code from a repository is never run, and a folder never causes a network call.
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": folder.is_dir()}
    device = _device(settings.device)
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        _check_task(name, config)
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            source,
            torch_dtype=_dtype(settings.dtype, device),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        processor = _processor(source, options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(f"The captioning model {name} cannot be loaded: {_reason(error)}") from error
    # transformers initializes missing weights at random.
    if missing := sorted(report["missing_keys"]):
        raise DataError(
            f"The captioning model {name} lacks {len(missing)} weights, such as `{missing[0]}`; download it again."
        )
    return VisionLanguageModel(model.to(device).eval(), processor, settings)


class VisionLanguageModel:
    """Captioner that generates text from images; the same images and settings give the same captions.

    Args:
        model: a model with `generate`.
        processor: its processor, for images and text.
        settings: prompt, length and beams.
    """

    def __init__(self, model: Any, processor: Any, settings: CaptionerSettings) -> None:
        self._model = model
        self._processor = processor
        self._settings = settings
        tokenizer = processor.tokenizer
        # A decoder continues the text at its end, so shorter prompts are filled at the start.
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """Return a caption of each image."""
        inputs = self._inputs(list(images))
        tokens = self._model.generate(
            **inputs, do_sample=False, num_beams=self._settings.beams, max_new_tokens=self._settings.max_tokens
        )
        prompt = inputs.get("input_ids")
        if prompt is not None and torch.equal(tokens[:, : prompt.shape[1]], prompt):
            tokens = tokens[:, prompt.shape[1] :]
        texts = self._processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _inputs(self, images: list[Image.Image]) -> dict[str, Any]:
        prompt = self._settings.prompt
        given: list[Any] = images
        if getattr(self._processor, "chat_template", None):
            image, text = {"type": "image"}, {"type": "text", "text": prompt or CHAT_PROMPT}
            prompt = self._processor.apply_chat_template(
                [{"role": "user", "content": [image, text]}], add_generation_prompt=True
            )
            # Some processors take a flat list for the images of one conversation.
            given = [[image] for image in images]
        texts = {} if prompt is None else {"text": [prompt] * len(images), "padding": True}
        inputs = self._processor(images=given, return_tensors="pt", **texts)
        # `to` converts floating-point tensors alone to the dtype.
        return dict(inputs.to(self._model.device, self._model.dtype))


class _Processor:
    """Image processor and tokenizer together, for models whose folder has no processor class."""

    chat_template = None

    def __init__(self, images: Any, tokenizer: Any) -> None:
        self._images = images
        self.tokenizer = tokenizer

    def __call__(self, images: list[Image.Image], return_tensors: str, **texts: Any) -> Any:
        inputs = self._images(images=images, return_tensors=return_tensors)
        if texts:
            prompt = self.tokenizer(
                texts["text"], padding=True, return_tensors=return_tensors, add_special_tokens=False
            )
            # An encoder-decoder begins its caption with the prompt.
            inputs["decoder_input_ids"] = prompt["input_ids"]
        return inputs


def _processor(source: str, options: dict[str, Any]) -> Any:
    found = transformers.AutoProcessor.from_pretrained(source, **options)
    if hasattr(found, "tokenizer") and hasattr(found, "image_processor"):
        return found
    images = transformers.AutoImageProcessor.from_pretrained(source, **options)
    return _Processor(images, transformers.AutoTokenizer.from_pretrained(source, **options))


def _check_task(name: str, config: Any) -> None:
    if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise DataError(
            f"{name} is a model of type {config.model_type}, which transformers {transformers.__version__} does not "
            "use to describe images; give an image-to-text model such as BLIP, GIT or a vision-language model."
        )


def _device(asked: str) -> torch.device:
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked == "cuda" and not torch.cuda.is_available():
        raise DataError("No CUDA device is available; use --device cpu.")
    return torch.device(asked)


def _dtype(asked: str, device: torch.device) -> torch.dtype:
    automatic = torch.float32 if device.type == "cpu" else torch.float16
    return {"auto": automatic, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[asked]


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if "safetensors" in text:
        return "it has no safetensors weights, and other formats can run code when they are read; get such a file."
    return text.splitlines()[0][:300] if text else type(error).__name__
