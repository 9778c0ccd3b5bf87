"""Weight changes of LyCORIS and PEFT as low-rank layers: LoRA, LoHa, LoKr and full differences.

Source: lycoris-lora 4.1.3 (`lycoris/functional/`, `lycoris/modules/`) and PEFT 0.21.2 (`tuners/loha`, `tuners/lokr`).
With `a` and `b` the factors of a matrix and `s = alpha / rank`:

- LoHa: `s (a1 b1) * (a2 b2)`, an elementwise product, has the rank `r1 r2` with columns `a1_i * a2_j`.
- LoKr: `s kron(w1, w2)`, each of them a matrix or a product, has the rank `rank(w1) rank(w2)`, because the Kronecker
  product of two products is the product of two Kronecker products. Without any product, `s = 1`.
- Full difference: a matrix.

Where that rank is not below the layer's smaller width, the matrix itself is kept, with an identity as other factor.

The weight of a convolution, `(outputs, inputs, k, k)`, counts as a matrix `(outputs, inputs k k)`. A factor in Tucker
form, `sum_ij a_io b_jn t_ijkk`, is the product of `a` and the matrix `sum_j t_ijkk b_jn`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from ...utils.errors import TunerFileError
from ..lora_folding import LoraLayer

TENSORS = re.compile(
    r"(?P<module>.+?)\.(?P<tensor>lora_(?:down|up|mid)\.weight|alpha|dora_scale|diff(?:_b)?|"
    r"hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t[12]))"
)
"""Key of a tensor: the module's name, and the tensor's name in it."""

_OTHER_FORMS = {"lora_mid.weight": "LoCon with a middle convolution", "hada_t1": "LoHa of a convolution",
                "hada_t2": "LoHa of a convolution", "lokr_t1": "LoKr of a convolution",
                "lokr_t2": "LoKr of a convolution"}  # fmt: skip
_LORA = {"lora_down.weight", "lora_up.weight"}


def layer_from(
    tensors: Mapping[str, torch.Tensor],
    shape: tuple[int, ...],
    where: str,
    alpha: float | None = None,
    scale: float | None = None,
) -> LoraLayer:
    """Return a weight change in low-rank form; the dtype is fp32 or wider unless it is a LoRA.

    Args:
        tensors: tensors of the module, by their names in `TENSORS`.
        shape: shape of the base's weight.
        where: file and module, for messages.
        alpha: alpha if there is no such tensor; None for the rank.
        scale: factor of LoHa and LoKr, instead of that of alpha and rank.

    Raises:
        TunerFileError: if tensors are missing, do not fit together, or have another form than the base's layer.
    """
    kernel = shape[2:]
    there = f"this base has {f'a convolution of {kernel[0]}x{kernel[1]}' if kernel else 'a linear layer'} there"
    for name, what in _OTHER_FORMS.items():
        if name in tensors and (not kernel or tensors[name].shape[2:] != kernel):
            raise TunerFileError(f"{where} is {what}, but {there}.")
    if "alpha" in tensors:
        if tensors["alpha"].numel() != 1:
            raise TunerFileError(f"{where} is damaged: its alpha has {tensors['alpha'].numel()} values.")
        alpha = float(tensors["alpha"].item())
    if "diff_b" in tensors and tensors["diff_b"].any():
        raise TunerFileError(f"{where} also changes the bias, which no tuner does.")
    # A linear layer may be stored as a convolution with a kernel of one.
    flat = {
        name
        for name, value in tensors.items()
        if value.dim() == 4 and value.shape[2:] in (kernel, (1, 1)) and name not in _OTHER_FORMS
    }
    tensors = {name: value.flatten(1) if name in flat else value for name, value in tensors.items()}
    names = {name for name in tensors if name not in ("alpha", "dora_scale", "diff_b")}
    if names < {"lora_down.weight", "lora_up.weight", "lora_mid.weight"} and names != _LORA:
        raise TunerFileError(f"{where} is damaged: it has only one of its two weights.")
    if any(tensors[name].dim() > 2 for name in names.difference(_OTHER_FORMS)):
        raise TunerFileError(
            f"{where} has {'another kernel' if kernel else 'the form of a convolution'}, but {there}."
        )
    try:
        if names == _LORA:
            down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
            _check_product(up, down)
            return LoraLayer(down, up, float(down.shape[0]) if alpha is None else alpha)
        wide = {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in tensors.items()}
        if names == {*_LORA, "lora_mid.weight"}:
            down, up = wide["lora_down.weight"], wide["lora_up.weight"]
            scale = 1.0 if alpha is None else alpha / down.shape[0]
            down = _through(wide["lora_mid.weight"], down)
            _check_product(up, down)
            return LoraLayer(down, up, scale * down.shape[0])
        if names == {"diff"}:
            return full(wide["diff"])
        if names.difference(("hada_t1", "hada_t2")) == {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}:
            return _loha(wide, alpha, scale)
        if names and all(name.startswith("lokr_") for name in names):
            return _lokr(wide, alpha, scale)
    except (KeyError, IndexError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise TunerFileError(f"{where} is damaged: its tensors {_shapes(tensors)} do not fit together.") from error
    raise TunerFileError(f"{where} is damaged: it has only the tensors {', '.join(sorted(names))}.")


def full(matrix: torch.Tensor) -> LoraLayer:
    """Return a matrix as a layer: the matrix and an identity of its smaller width."""
    outputs, inputs = matrix.shape
    one = torch.eye(min(outputs, inputs), dtype=matrix.dtype)
    return LoraLayer(matrix, one, float(outputs)) if outputs <= inputs else LoraLayer(one, matrix, float(inputs))


def _loha(tensors: Mapping[str, torch.Tensor], alpha: float | None, scale: float | None) -> LoraLayer:
    (a1, b1), (a2, b2) = (_factors(tensors, f"hada_w{half}", f"hada_t{half}") for half in (1, 2))
    if scale is None:
        scale = 1.0 if alpha is None else alpha / b1.shape[0]
    if b1.shape[0] * b2.shape[0] >= min(a1.shape[0], b1.shape[1]):
        return full(scale * (a1 @ b1) * (a2 @ b2))
    up = (a1[:, :, None] * a2[:, None, :]).flatten(1)
    down = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)
    return LoraLayer(down, up, scale * down.shape[0])


def _lokr(tensors: Mapping[str, torch.Tensor], alpha: float | None, scale: float | None) -> LoraLayer:
    left, right = _factors(tensors, "lokr_w1", "lokr_t1"), _factors(tensors, "lokr_w2", "lokr_t2")
    ranks = [tensors[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in tensors]
    if scale is None:
        scale = alpha / ranks[0] if ranks and alpha is not None else 1.0
    outputs, inputs = left[0].shape[0] * right[0].shape[0], left[1].shape[1] * right[1].shape[1]
    if left[0].shape[1] * right[0].shape[1] >= min(outputs, inputs):
        return full(scale * torch.kron(left[0] @ left[1], right[0] @ right[1]))
    up, down = torch.kron(left[0], right[0]), torch.kron(left[1], right[1])
    return LoraLayer(down.contiguous(), up.contiguous(), scale * down.shape[0])


def _factors(tensors: Mapping[str, torch.Tensor], name: str, core: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix of a LoHa or LoKr as a product of two, from a matrix, a product or the Tucker form."""
    if name in tensors:
        layer = full(tensors[name])
        return layer.up, layer.down
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    if core in tensors:
        a, b = a.T.contiguous(), _through(tensors[core], b)
    _check_product(a, b)
    return a, b


def _through(core: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Return the matrix of a convolution with the kernel of `core` after one of 1x1, `(outputs, inputs k k)`."""
    return torch.einsum("pqk,qi->pik", core.flatten(2), down).flatten(1)


def _check_product(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape[1] != b.shape[0]:
        raise RuntimeError("the factors have different ranks")


def _shapes(tensors: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in sorted(tensors.items()))
