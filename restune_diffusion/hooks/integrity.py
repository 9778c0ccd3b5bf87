"""Check that the modules with a tuner's hooks are still the ones that the base calls.

Other libraries change a base while tuners are attached: they replace modules, or fuse projections into one layer. A
hook on a module that is no longer called has no effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..backbones import has_fused, is_fused
from ..utils.errors import RestuneError

# Attributes under which wrappers of torch.compile and PEFT keep the wrapped module.
_WRAPPED = ("_orig_mod", "base_layer")


class _Link(NamedTuple):
    parent: nn.Module
    name: str
    child: nn.Module
    path: str


class HookedModules:
    """Modules of a base with hooks, as found by their paths when the hooks were registered.

    Args:
        base: the base.
        handles: handles of the hooks.
        linears: site of each linear layer with a hook, and the path of its module.
    """

    def __init__(self, base: nn.Module, handles: Iterable[RemovableHandle], linears: Mapping[str, str]) -> None:
        hooked = {id(handle.hooks_dict_ref()) for handle in handles}
        paths = [
            path
            for path, module in base.named_modules()
            if {id(module._forward_hooks), id(module._forward_pre_hooks)} & hooked
        ]
        self._links = list({link[:2]: link for path in paths for link in _links(base, path)}.values())
        by_owner: dict[str, dict[str, str]] = {}
        for site, path in linears.items():
            owner, _, name = path.rpartition(".")
            by_owner.setdefault(owner, {})[site] = name
        self._projections = [(base.get_submodule(owner), names) for owner, names in by_owner.items()]

    def check(self, sites: Iterable[str]) -> None:
        """Check the modules before a forward pass.

        Args:
            sites: sites that the active tuners write to; read only if a projection is fused.

        Raises:
            RestuneError: if a module was replaced, or one of the sites is a projection that is fused with others.
        """
        for parent, name, child, path in self._links:
            current = parent._modules.get(name)
            if current is not child and _unwrapped(current) is not child:
                raise RestuneError(
                    f"The module {path} of the base was replaced after a tuner was loaded, and the tuner would have "
                    "no effect there; load the tuner after the replacement."
                )
        fused = {
            site
            for attention, names in self._projections
            if has_fused(attention)
            for site, name in names.items()
            if is_fused(attention, name)
        }
        for site in sites if fused else ():
            if site in fused:
                raise RestuneError(
                    f"The projections of the base are fused, so a tuner on {site} would have no effect; call "
                    "pipe.unfuse_qkv_projections() to use this tuner."
                )


def _links(base: nn.Module, path: str) -> Iterable[_Link]:
    """Yield the link from each module on a path to the next; wrappers, which can come and go, are left out."""
    parent, so_far = base, ""
    for name in path.split(".") if path else ():
        if name in _WRAPPED:
            continue
        so_far = f"{so_far}.{name}" if so_far else name
        child = _unwrapped(parent._modules[name])
        assert child is not None
        yield _Link(parent, name, child, so_far)
        parent = child


def _unwrapped(module: nn.Module | None) -> nn.Module | None:
    """Return the base's module inside wrappers of torch.compile and PEFT."""
    inner = next((inner for name in _WRAPPED if isinstance(inner := getattr(module, name, None), nn.Module)), None)
    return module if inner is None else _unwrapped(inner)
