"""Merge a tuner with only LoRA into the weights of a base, and unmerge it exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..backbones import describe_base, is_fused, site_module, structure_of
from ..tuners import ResLora
from ..tuners.tuner import Tuner
from ..utils.errors import RestuneError
from .manager import TunerManager


@dataclass
class _Touched:
    """Merged weight, with its original value and a checksum of the merged value."""

    site: str
    weight: nn.Parameter
    original: torch.Tensor
    checksum: int
    owner: nn.Module
    """Module that calls the layer."""


class MergedLora:
    """Handle of a tuner that is merged into a base; `unmerge` restores the weights bit for bit.

    Until then it keeps a copy of every changed weight in main memory: about 0.5 GB for all linear layers of SD 1.5's
    transformer blocks in fp16. Delete the handle to make the merge permanent.
    """

    def __init__(self, touched: list[_Touched]) -> None:
        self._touched = touched

    def unmerge(self) -> None:
        """Restore the weights.

        Raises:
            RestuneError: if they changed since the merge, or were already restored; nothing is changed then.
        """
        if not self._touched:
            raise RestuneError("This tuner is already unmerged; merge it again first.")
        for touched in self._touched:
            weight = touched.weight
            if weight.dtype != touched.original.dtype or _checksum(weight) != touched.checksum:
                raise RestuneError(
                    f"The weight at {touched.site} was changed after this tuner was merged; undo that change first, "
                    "for example by unmerging the tuner that was merged last."
                )
            _refuse_fused(touched.owner, touched.site)
        with torch.no_grad():
            for touched in self._touched:
                touched.weight.copy_(touched.original)
        self._touched = []


def merge_lora(base: nn.Module, tuner: Tuner, weight: float = 1.0) -> MergedLora:
    """Merge a tuner with only LoRA into the weights of its linear layers.

    The base then generates the same images as with the tuner attached, at no cost per forward pass, up to rounding: a
    weight in half precision stores the sum in half precision. For layers wrapped by PEFT, the base layer is changed.

    Args:
        base: the base; its other weights are not changed.
        tuner: a tuner whose only part is `res` with only lora; not attached to the base.
        weight: factor on the tuner.

    Returns:
        A handle that undoes the merge.

    Raises:
        RestuneError: if the tuner cannot be merged, or a weight is quantized, offloaded or fused with others; nothing
            is changed then.
        BaseMismatchError: if the tuner is for a base of another structure.
    """
    tuner.base.check_fits(describe_base(base))
    if not math.isfinite(weight):
        raise RestuneError(f"A tuner's weight must be a finite number, but is {weight}.")
    loras = _only_loras(tuner)
    manager = TunerManager.of(base)
    if manager is not None and any(manager.tuner(name) is tuner for name in manager.names):
        raise RestuneError("This tuner is attached to the base and would act twice; detach it, then merge it.")
    weights = {site: _mergeable_weight(base, site) for site in loras}
    owners = {site: _owner(base, site) for site in loras}
    return MergedLora([_add(site, weights[site], owners[site], lora, weight) for site, lora in loras.items()])


def _only_loras(tuner: Tuner) -> dict[str, ResLora]:
    loras: dict[str, ResLora] = {}
    for part in tuner.parts():
        found = part.loras()
        others = [site for site in (*part.writes, *part.text_encoders) if site not in found]
        if others:
            raise RestuneError(
                f"Only lora can be merged, but this tuner has another type of tuner at {others[0]}; attach it instead."
            )
        loras.update(found)
    return loras


def _mergeable_weight(base: nn.Module, site: str) -> nn.Parameter:
    weight = site_module(base, site).weight
    assert isinstance(weight, nn.Parameter)
    # torchao's tensors report the dtype that they represent, so the class is checked too.
    name = type(weight.detach()).__name__
    # One-byte floats are a storage format of quantized models without arithmetic.
    if not weight.is_floating_point() or weight.element_size() == 1 or weight.is_meta or name != "Tensor":
        state = "offloaded" if weight.is_meta else f"quantized ({weight.dtype if name == 'Tensor' else name})"
        raise RestuneError(f"The weight at {site} is {state} and cannot be changed; attach the tuner instead.")
    return weight


def _owner(base: nn.Module, site: str) -> nn.Module:
    """Return the module that calls the layer at a site; raise `RestuneError` if it calls a fused copy instead."""
    owner = base.get_submodule(structure_of(base).module_path(site).rpartition(".")[0])
    _refuse_fused(owner, site)
    return owner


def _refuse_fused(owner: nn.Module, site: str) -> None:
    if is_fused(owner, site.rpartition(".")[2]):
        raise RestuneError(
            f"The base computes {site} in a fused projection, which would keep the old weight; call "
            "pipe.unfuse_qkv_projections() first."
        )


@torch.no_grad()
def _add(site: str, parameter: nn.Parameter, owner: nn.Module, lora: ResLora, weight: float) -> _Touched:
    original = parameter.detach().to("cpu", copy=True)
    delta = weight * lora.delta().to(parameter.device)
    parameter.copy_(parameter.to(torch.promote_types(parameter.dtype, delta.dtype)) + delta)
    return _Touched(site, parameter, original, _checksum(parameter), owner)


def _checksum(weight: torch.Tensor) -> int:
    """Sum the bits of a weight as integers, which is independent of device and order of summation."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return int(weight.detach().contiguous().view(bits).sum(dtype=torch.int64))
