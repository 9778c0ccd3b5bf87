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


def described(keys: Iterable[str]) -> str:
    """List a few keys of each kind, with the kind if it is known, and count the rest."""
    groups: dict[str, list[str]] = {}
    for key in sorted(keys):
        kind = next((kind for kind, form in _KINDS.items() if form.fullmatch(key)), "")
        groups.setdefault(kind, []).append(key)
    return "; ".join(f"{kind} ({_some(found)})" if kind else _some(found) for kind, found in groups.items())


def _some(keys: list[str]) -> str:
    listed = ", ".join(f"`{key:.120}`" for key in keys[:_SHOWN])
    return listed + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
