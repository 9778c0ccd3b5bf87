"""Layout of SCEPTER's SC-Tuner: `lsc_identity.<number>`, counted from the deepest skip connection.

Source: scepter 1.4.1, `scepter/modules/model/network/ldm/ldm_sce.py` and `scepter/modules/model/tuner/sce/`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..backbones import BaseInfo
from ..tuners.tuner import Tuner
from ..utils.errors import TunerFileError
from .foreign import ForeignFile
from .names import skip_readers
from .skip_layers import SkipLayer, skip_tuner

_KEY = re.compile(r"(?:model\.)?lsc_identity\.(?P<number>\d{1,3})\.tuner_op\.(?P<tensor>ln[12]\.(?:weight|bias))")
TENSORS = ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias")


def recognizes(keys: Iterable[str]) -> bool:
    """Return whether the keys are those of SCEPTER SC-Tuners."""
    return any(_KEY.fullmatch(key) for key in keys)


def read(file: ForeignFile, base: BaseInfo) -> Tuner:
    """Convert a file of SC-Tuners to a skip tuner.

    Raises:
        TunerFileError: if the file contains other tensors, or is for a base of another structure.
    """
    matches = {key: match for key in file.tensors if (match := _KEY.fullmatch(key))}
    file.refuse_others(matches, "a file of SCEPTER's SC-Tuners")
    prefixes = {int(match["number"]): key[: match.start("tensor")] for key, match in matches.items()}
    sites = list(skip_readers(base))
    if max(prefixes) >= len(sites):
        raise TunerFileError(f"{file.path} tunes skip connection {max(prefixes)}, but this base has {len(sites)}.")
    layers = {sites[number]: layer_at(file, prefix) for number, prefix in prefixes.items()}
    return skip_tuner(layers, base, {}, str(file.path))


def layer_at(file: ForeignFile, prefix: str) -> SkipLayer:
    """Return the SC-Tuner whose keys start with a prefix; raise `TunerFileError` if one of its tensors is missing."""
    missing = [name for name in TENSORS if prefix + name not in file.tensors]
    if missing:
        raise TunerFileError(f"{file.path} is damaged: it has no `{prefix}{missing[0]}`.")
    return SkipLayer(*(file.tensors[prefix + name] for name in TENSORS))
