"""Kinds of keys that no reader uses, by the names that other programs give them.

Source: lycoris-lora 4.1.3 (`lycoris/modules/norms.py`, `ia3.py`, `boft.py`), PEFT 0.21.2 (`tuners/ia3`), OneTrainer
(`bundle_emb`, OneTrainer#485).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_KINDS = {
    "a bundled embedding": re.compile(r"bundle_emb\..+"),
    "a trained normalization": re.compile(r".+\.[wb]_norm"),
    "(IA)^3": re.compile(r".+\.(?:ia3_l(?:\..+)?|on_input)"),
    "OFT": re.compile(r".*\boft_.*|.+\.oft_.*"),
    "a layer of Res-Tuning-Bypass": re.compile(r".*restuning_.*"),
}
_SHOWN = 3


def kind_of(key: str) -> str:
    """Return the kind of a key that no reader uses."""
    return next((kind for kind, form in _KINDS.items() if form.fullmatch(key)), "an unknown tensor")


def described(keys: Iterable[str]) -> str:
    """List the kinds of keys, with their number and a few examples of each."""
    groups: dict[str, list[str]] = {}
    for key in sorted(keys):
        groups.setdefault(kind_of(key), []).append(key)
    return "; ".join(
        f"{kind} ({', '.join(f'`{key:.120}`' for key in found[:_SHOWN])}"
        + (f" and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ")")
        for kind, found in groups.items()
    )
