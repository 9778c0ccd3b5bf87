"""Convert an optimizer's state to named tensors and plain values, which need no pickle, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

_PARAMETER, _INNER = ":", "/"
# Settings of parameter groups that choose among implementations of the same equations.
_KERNELS = ("foreach", "fused", "capturable")


def flatten_state(
    state: Mapping[int, Mapping[str, Any]], names: Sequence[str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split the `state` of an optimizer's `state_dict` into tensors, on the CPU, and JSON-serializable values.

    Args:
        state: entries of each parameter, by its index; an entry may be a nested mapping, as in bitsandbytes.
        names: names of the parameters, by index.

    Returns:
        Tensors and values, both with keys `parameter:entry` or `parameter:entry/inner`.
    """
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in state.items():
        for key, value in _leaves(entries):
            name = f"{names[index]}{_PARAMETER}{key}"
            if isinstance(value, torch.Tensor):
                # Copied, because bitsandbytes shares a table among parameters and safetensors rejects shared tensors.
                tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            else:
                values[name] = value
    return tensors, values


def unflatten_state(flat: Mapping[str, Any], names: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Return the inverse of `flatten_state`; `flat` contains the tensors and the values.

    Raises:
        KeyError: if an entry belongs to a parameter that is not in `names`.
    """
    indices = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    for name_and_key, value in flat.items():
        name, key = name_and_key.rsplit(_PARAMETER, 1)
        *outer, last = key.split(_INNER)
        entries = state.setdefault(indices[name], {})
        for each in outer:
            entries = entries.setdefault(each, {})
        entries[last] = value
    return state


def with_own_kernels(saved: Sequence[Mapping[str, Any]], present: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the saved parameter groups with the implementation of the present optimizer.

    A checkpoint may come from another device or version, whose implementation this device may not have.
    """
    return [
        {**group, **{name: own[name] for name in _KERNELS if name in own}}
        for group, own in zip(saved, present, strict=True)
    ]


def _leaves(entries: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in entries.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}{_INNER}")
        else:
            yield prefix + key, value
