"""An optimizer's state as named tensors and plain values, which need no pickle, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

_PARAMETER, _INNER = ":", "/"


def flatten_state(
    state: Mapping[int, Mapping[str, Any]], names: Sequence[str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split the `state` of an optimizer's `state_dict` into tensors, on the CPU, and values that JSON can hold.

    Args:
        state: for each parameter, by its number, the entries; an entry may be a mapping again, as bitsandbytes has it.
        names: names of the parameters.

    Returns:
        Both by `parameter:entry`, or `parameter:entry/inner`.
    """
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in state.items():
        for key, value in _leaves(entries):
            name = f"{names[index]}{_PARAMETER}{key}"
            if isinstance(value, torch.Tensor):
                # Copied, because bitsandbytes' tables are one tensor for all, which safetensors would not write twice.
                tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            else:
                values[name] = value
    return tensors, values


def unflatten_state(flat: Mapping[str, Any], names: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Return the `state` that `flatten_state` split; `flat` holds tensors and values alike.

    Raises:
        KeyError: if an entry is of a parameter that is not among the names.
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


def _leaves(entries: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in entries.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}{_INNER}")
        else:
            yield prefix + key, value
