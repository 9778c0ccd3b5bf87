"""Res-Tuning: tuners of five types in parallel to operations of transformer blocks (arXiv 2310.19859)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import nn

from ..backbones import BaseInfo, Site
from ..backbones.description import Convolution
from ..backbones.site_names import Kind, SiteName, match_sites, site_of
from ..utils.errors import RestuneError
from .adapter import ResAdapter
from .attention import PlainAttention, ResAttention
from .base import Bottleneck, Features, Operation, Part
from .configs import ResConfig, ResKind
from .gate import most_heads
from .lora import ResLora
from .prefix import AttentionPrefix, PlainPrefix
from .prompt import AttentionPrompt, PlainPrompt

ResTuner: TypeAlias = (
    ResAdapter | AttentionPrefix | PlainPrefix | AttentionPrompt | PlainPrompt | ResAttention | ResLora
)

_ATTENTION = ("self", "cross")
_IN_BLOCK: tuple[Kind, ...] = ("self", "cross", "ff")
_SETTINGS = {"self": "self_attention", "cross": "cross_attention", "ff": "feed_forward", "block": "block",
             "proj": "projections", "conv": "convolutions", "ends": "ends"}  # fmt: skip


class ResPart(Part):
    """Part with a tuner in parallel to each configured operation of each selected transformer block.

    In the paper's figures, the tuner is in parallel to norm and operation together. Here, it has the same input as the
    operation: the normalized tokens for attention and feed-forward, the block's input for the whole block. Its
    residual is added to the operation's output. LoRA is in parallel to layers instead, also to those of the groups of
    layers outside the transformer blocks.
    """

    def __init__(self, config: ResConfig, base: BaseInfo) -> None:
        super().__init__()
        self.taps = ()
        chosen = list(_operations_and_kinds(config))
        places = _places_with(base, {operation for operation, _ in chosen})
        selected = match_sites(
            config.sites,
            places,
            "transformer block" if _only_blocks(chosen) else "transformer block or group of layers",
        )
        if config.grad_depth is not None:
            selected = _late(selected, list(places), config.grad_depth)
        placed = [
            (site_of(place, operation), kind)
            for place in selected
            for operation, kind in chosen
            if operation in places[place]
        ]
        self.needs = tuple(dict.fromkeys(site for site, _ in placed))
        self._tuners: dict[str, ResTuner] = {}
        for site, kind in placed:
            if kind != "lora":
                self._add(site, kind, _build(kind, base.sites[site], config))
        self._add_loras([site for site, kind in placed if kind == "lora"], config, base)
        self.writes = tuple(self._tuners)
        if not self.writes:
            raise RestuneError(
                "The patterns of a `res` part are empty; give at least one pattern for `sites` and for `linears`."
            )

    def forward(self, site: str, x: torch.Tensor, features: Features) -> torch.Tensor:
        """Return the residual for the input of an operation, `(batch, tokens, channels)`, or of a linear layer."""
        tuner = self._tuners[site]
        if isinstance(tuner, ResAdapter | ResLora):
            return tuner(x)
        return tuner(x, features.operation or Operation())

    def bottleneck(self, site: str) -> Bottleneck | None:
        """Return the layer of an adapter or of a LoRA on a linear layer, or None for the others."""
        tuner = self._tuners[site]
        if isinstance(tuner, ResAdapter):
            return Bottleneck(tuner.down, tuner.up, gelu=True, scale=tuner.scale)
        if isinstance(tuner, ResLora) and isinstance(tuner.down, nn.Linear) and isinstance(tuner.up, nn.Linear):
            return Bottleneck(tuner.down, tuner.up, gelu=False, scale=tuner.factor)
        return None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize every tuner."""
        for tuner in self._tuners.values():
            tuner.reset_parameters(generator)

    def loras(self) -> dict[str, ResLora]:
        """Return the LoRA tuners, which can be merged into weights, by site of the linear layer."""
        return {site: tuner for site, tuner in self._tuners.items() if isinstance(tuner, ResLora)}

    def _add(self, site: str, kind: ResKind, tuner: ResTuner) -> None:
        self.register_site(f"{site}.{kind}", tuner)
        self._tuners[site] = tuner

    def _add_loras(self, sites: list[str], config: ResConfig, base: BaseInfo) -> None:
        if not sites:
            return
        paths = dict.fromkeys(path for site in sites for path in base.sites[site].layers)
        selected = set(match_sites(config.linears, paths, "layer"))
        for site in sites:
            for path, shape in base.sites[site].layers.items():
                if path in selected:
                    self._add(f"{site}.{path}", "lora", _lora(shape, config))


def _lora(shape: Convolution | tuple[int, int], config: ResConfig) -> ResLora:
    if not isinstance(shape, Convolution):
        return ResLora(*shape, config.width, config.alpha)
    width, alpha = config.width, config.alpha
    if shape.kernel > 1 and config.conv_width is not None:
        width, alpha = config.conv_width, config.conv_alpha
    return ResLora(shape.inputs, shape.outputs, width, alpha, (shape.kernel, shape.stride, shape.padding))


def _operations_and_kinds(config: ResConfig) -> Iterator[tuple[Kind, ResKind]]:
    for operation, kind in config.operations.items():
        if operation == "block" and kind == "lora":
            # All linear layers of a block belong to its operations.
            yield from ((inner, kind) for inner in _IN_BLOCK)
        else:
            yield operation, kind


def _only_blocks(chosen: list[tuple[Kind, ResKind]]) -> bool:
    return all(operation in (*_IN_BLOCK, "block") for operation, _ in chosen)


def _places_with(base: BaseInfo, operations: set[Kind]) -> dict[str, set[Kind]]:
    """Return the transformer blocks and groups with any of the operations, each with the operations it has."""
    places: dict[str, set[Kind]] = {}
    for name, site in base.sites.items():
        if site.operation in operations:
            places.setdefault(SiteName.parse(name).place, set()).add(site.operation)
    if not places:
        settings = " or ".join(setting for operation, setting in _SETTINGS.items() if operation in operations)
        raise RestuneError(f"This base has no transformer block with {settings}; choose another operation.")
    return places


def _late(selected: list[str], blocks: list[str], depth: int) -> list[str]:
    """Return the selected transformer blocks that are among the last `depth` blocks of the forward pass."""
    if depth > len(blocks):
        raise RestuneError(
            f"This base has {len(blocks)} transformer blocks, but grad_depth is {depth}; "
            f"set it to {len(blocks)} or less."
        )
    late = blocks[-depth:]
    kept = [block for block in selected if block in late]
    if not kept:
        raise RestuneError(
            f"None of the selected transformer blocks is among the last {depth}, {', '.join(late)}; choose other "
            f"sites or a larger grad_depth."
        )
    return kept


def _build(kind: ResKind, site: Site, config: ResConfig) -> ResTuner:
    """Build a tuner of any type except lora, in parallel to an operation."""
    if kind == "adapter":
        return ResAdapter(site.channels, config.width, config.scale)
    if site.operation in _ATTENTION:
        return _parallel_to_attention(kind, site, config)
    return _parallel_to_other(kind, site, config)


def _parallel_to_attention(kind: ResKind, site: Site, config: ResConfig) -> ResTuner:
    channels, length, scale = site.channels, config.width, config.scale
    context, keys = site.projection("k")
    if kind == "prefix":
        values = site.projection("v")[1]
        if not site.heads or keys % site.heads or values % site.heads:
            raise RestuneError(
                f"Keys of width {keys} and values of width {values} cannot be split into {site.heads} heads; "
                f"choose another type of tuner than prefix."
            )
        return AttentionPrefix(
            channels, site.heads, keys // site.heads, values // site.heads, length, config.gate, scale
        )
    if kind == "prompt":
        return AttentionPrompt(channels, context, length, config.gate, scale)
    return ResAttention(channels, context, config.width, most_heads(config.width, site.heads), scale)


def _parallel_to_other(kind: ResKind, site: Site, config: ResConfig) -> ResTuner:
    channels, length, scale = site.channels, config.width, config.scale
    if kind == "attention":
        return PlainAttention(channels, channels, config.width, most_heads(config.width, site.heads), scale)
    if config.gate == "exact":
        setting = _SETTINGS[str(site.operation)]
        raise RestuneError(
            f'A {kind} in parallel to {setting} does not support gate="exact", which shares the softmax with the keys '
            f'of attention; choose gate="scale", or another type of tuner for {setting}.'
        )
    heads = most_heads(channels, site.heads)
    return (
        PlainPrefix(channels, heads, length, scale)
        if kind == "prefix"
        else PlainPrompt(channels, heads, length, scale)
    )
