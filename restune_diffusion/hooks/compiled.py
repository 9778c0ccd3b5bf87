"""Bases that `torch.compile` has compiled."""

from __future__ import annotations

from torch import nn

from ..utils.errors import RestuneError


def uncompiled(base: nn.Module) -> nn.Module:
    """Return the module inside a `torch.compile` wrapper, or the module itself."""
    module: nn.Module = getattr(base, "_orig_mod", base)
    return module


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is compiled, in place or by a wrapper."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def refuse_if(compiled: bool) -> None:
    """Raise `RestuneError` if the model is compiled."""
    # A graph that was compiled without the hooks would silently ignore them.
    if compiled:
        raise RestuneError("This model is already compiled; attach the tuners first, then call torch.compile.")
