"""Vision transformer of transformers, `ViTModel`, the base of the Res-Tuning paper."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..utils.errors import RestuneError
from .description import Site
from .forward_hooks import enter_head, tap_output
from .site_names import OUT, Kind, SiteName
from .structure import Call, SiteHooks, Structure
from .transformer_block import inside, linear_layers

_PATH_OF_OPERATION: dict[Kind, str] = {"self": "attention", "ff": "mlp", "block": ""}


class ViTStructure(Structure):
    """Structure of a vision transformer, with sites at the operations and outputs of its layers and at the last norm.

    Features are a class token followed by patch tokens; there are no timesteps and no text. For a
    `ViTForImageClassification`, attach to its `vit`.
    """

    class_name = "ViTModel"
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "patch_size")

    def sites(self, base: Any) -> Iterator[tuple[str, Site]]:
        """Yield the sites in the order of the forward pass."""
        if not hasattr(base, "layers") or not hasattr(base.layers[0].attention, "q_proj"):
            raise RestuneError(
                "This ViTModel has the module layout of an older transformers; install transformers 5 or newer."
            )
        width, extra = base.config.hidden_size, base.embeddings.cls_token.shape[1]
        tokens = Site(channels=width, stride=1, tokens=True, extra_tokens=extra)
        for number, layer in enumerate(base.layers):
            for operation, path in _PATH_OF_OPERATION.items():
                yield (
                    str(SiteName("block", number, operation=operation)),
                    Site(
                        channels=width,
                        stride=1,
                        operation=operation,
                        extra_tokens=extra,
                        heads=base.config.num_attention_heads,
                        linears=dict(linear_layers(layer.get_submodule(path))) if path else {},
                    ),
                )
            yield _block(number), tokens
        yield OUT, tokens

    def time_channels(self, base: Any) -> int:
        """Return 0: there is no time embedding."""
        return 0

    def module_path(self, site: str) -> str:
        """Return the path of the module at a site, e.g. `block.3.self.q_proj`."""
        name = SiteName.parse(site)
        return inside(f"layers.{name.index}", name, _PATH_OF_OPERATION)

    def install(self, base: Any, hooks: SiteHooks) -> list[RemovableHandle]:
        """Register hooks on the layers and the last norm."""
        return [
            *(
                layer.register_forward_hook(partial(tap_output, hooks, _block(number)))
                for number, layer in enumerate(base.layers)
            ),
            base.layernorm.register_forward_pre_hook(partial(enter_head, hooks)),
        ]

    def run_head(self, base: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the last hidden state `(batch, tokens, channels)` from the output of the last layer."""
        state: torch.Tensor = base.layernorm(x)
        return state

    def call(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return the batch size and the size of the patch grid from `pixel_values`."""
        pixels = args[0] if args else kwargs["pixel_values"]
        height, width = base.embeddings.patch_embeddings.patch_size
        return Call(pixels.shape[0], (pixels.shape[-2] // height, pixels.shape[-1] // width), pixels.device, 0.0)


def _block(number: int) -> str:
    return str(SiteName("block", number))
