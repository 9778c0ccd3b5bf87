"""Torch hooks that several base models share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .site_names import OUT
from .structure import SiteHooks


def tap_output(hooks: SiteHooks, site: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
    """Pass a block's output to the tuners that tap the site; a forward hook."""
    hooks.tap(site, output)


def enter_head(hooks: SiteHooks, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """Add the residuals of the site `out` to the output head's input; a forward pre-hook."""
    return (hooks.tuned(OUT, args[0]), *args[1:]) if hooks.active() else None
