"""PixArt, a diffusion transformer: `PixArtTransformer2DModel`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .description import Site
from .forward_hooks import enter_head, tap_output
from .site_names import OUT, SiteName
from .structure import Call, SiteHooks, Structure
from .transformer_block import PATH_OF_OPERATION, block_sites, inside


class PixArtStructure(Structure):
    """Structure of PixArt, with sites at the operations and outputs of the transformer blocks and at the head."""

    class_name = "PixArtTransformer2DModel"
    keys = (
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
        "cross_attention_dim",
        "caption_channels",
        "patch_size",
        "norm_type",
    )

    def sites(self, base: Any) -> Iterator[tuple[str, Site]]:
        """Yield the sites in the order of the forward pass."""
        width, stride = base.inner_dim, base.config.patch_size
        for number, block in enumerate(base.transformer_blocks):
            yield from block_sites(_block(number), block, stride)
            yield _block(number), Site(channels=width, stride=stride, tokens=True)
        yield OUT, Site(channels=width, stride=stride, tokens=True)

    def time_channels(self, base: Any) -> int:
        """Return the width of the time embedding."""
        return int(base.inner_dim)

    def module_path(self, site: str) -> str:
        """Return the path of the module at a site, e.g. `block.3.cross.to_k`."""
        name = SiteName.parse(site)
        return inside(f"transformer_blocks.{name.index}", name, PATH_OF_OPERATION)

    def install(self, base: Any, hooks: SiteHooks) -> list[RemovableHandle]:
        """Register hooks on the time embedding, the blocks and the output norm."""
        return [
            base.adaln_single.register_forward_hook(partial(_see_time, hooks)),
            *(
                block.register_forward_hook(partial(tap_output, hooks, _block(number)))
                for number, block in enumerate(base.transformer_blocks)
            ),
            base.norm_out.register_forward_pre_hook(partial(enter_head, hooks)),
        ]

    def call(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return batch size, latent size and timestep from `hidden_states` and `timestep`."""
        sample = args[0] if args else kwargs["hidden_states"]
        timestep = args[2] if len(args) > 2 else kwargs["timestep"]
        return Call(sample.shape[0], (sample.shape[-2], sample.shape[-1]), sample.device, timestep)


def _see_time(hooks: SiteHooks, module: nn.Module, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    # The first output is for the modulation in the blocks; the second is the embedding.
    hooks.see(time=output[1])


def _block(number: int) -> str:
    return str(SiteName("block", number))
