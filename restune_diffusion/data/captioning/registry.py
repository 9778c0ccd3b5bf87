"""Captioners by name, and functions of other modules as captioners."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ...utils.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

Captioner: TypeAlias = "Callable[[Sequence[Image.Image]], Sequence[str]]"
"""Function from RGB images to one caption for each."""


@dataclass(frozen=True)
class CaptionerSettings:
    """Settings of a captioner; each reads those that concern it.

    Attributes:
        model: folder of the model, or its id on the Hub.
        prompt: question, instruction or beginning of the caption for a language model.
        max_tokens: largest number of tokens of a generated caption.
        beams: number of beams of the search; 1 for greedy decoding.
        general_threshold: smallest score of a tag.
        character_threshold: smallest score of a tag that names a character.
        device: compute device; `auto` uses a GPU if there is one.
        dtype: precision of the weights; `auto` is fp16 on a GPU and fp32 on the CPU.
    """

    model: str | None = None
    prompt: str | None = None
    max_tokens: int = 75
    beams: int = 1
    general_threshold: float = 0.35
    character_threshold: float = 0.85
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"

    def needed_model(self, captioner: str) -> str:
        """Return the model; raise `DataError` if there is none."""
        if self.model is None:
            raise DataError(f"The captioner {captioner} needs a model; give its folder or hub id with --model.")
        return self.model


CaptionerFactory: TypeAlias = Callable[[CaptionerSettings], Captioner]

_FACTORIES: dict[str, CaptionerFactory | str] = {
    "transformers": "restune_diffusion.data.captioning.builtin.vision_language:load_vision_language_model",
    "onnx": "restune_diffusion.data.captioning.builtin.onnx_tagger:load_onnx_tagger",
}
"""Functions that load a captioner, or the place of one that is imported on first use."""


def register_captioner(name: str, factory: CaptionerFactory) -> None:
    """Register a captioner under a name.

    Args:
        name: name for `--captioner`, without a colon.
        factory: function from settings to a captioner.

    Raises:
        DataError: if the name is taken or has a colon.
    """
    if name in _FACTORIES or ":" in name:
        raise DataError(f"The captioner name {name} is taken or has a colon; choose another.")
    _FACTORIES[name] = factory


def captioner_names() -> list[str]:
    """Return the names of the registered captioners."""
    return list(_FACTORIES)


def load_captioner(name: str, settings: CaptionerSettings) -> Captioner:
    """Return a captioner.

    Args:
        name: a registered name, or `module:function` for a function from a list of PIL images to strings.
        settings: settings of a registered captioner; a function gets the images alone.

    Raises:
        DataError: if there is no such captioner, or it cannot be loaded.
    """
    factory = _FACTORIES.get(name)
    if factory is not None:
        load: CaptionerFactory = _imported(factory) if isinstance(factory, str) else factory
        return load(settings)
    check_captioner_name(name)
    captioner: Captioner = _imported(name)
    return captioner


def check_captioner_name(name: str) -> None:
    """Raise `DataError` if a name is neither registered nor of the form `module:function`."""
    if name not in _FACTORIES and not all(name.partition(":")):
        raise DataError(
            f"There is no captioner {name}; use {', '.join(_FACTORIES)}, or module:function for a function from a "
            "list of PIL images to strings."
        )


def _imported(place: str) -> Any:
    module, _, attribute = place.partition(":")
    folder = str(Path.cwd())
    # A command that is installed as a script does not look for modules in the current folder.
    added = [] if folder in sys.path or "" in sys.path else [folder]
    sys.path[:0] = added
    try:
        found = getattr(import_module(module), attribute)
    except ImportError as error:
        raise DataError(f"The captioner {place} cannot be imported: {error}.") from error
    except AttributeError as error:
        raise DataError(f"The captioner {place} cannot be used: the module {module} has no {attribute}.") from error
    finally:
        for each in added:
            sys.path.remove(each)
    if not callable(found):
        raise DataError(f"The captioner {place} is not a function; give a function from PIL images to strings.")
    return found
