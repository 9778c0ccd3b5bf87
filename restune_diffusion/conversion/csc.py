"""Layout of SCEPTER's CSC-Tuner: an encoder of the condition image and a tuner for each skip connection.

Source: scepter 1.4.1, `CSCTuners` in `scepter/modules/model/tuner/sce/scetuning.py`, called by `unet_module.py`.
The factor `SCALE` of its configuration is not stored as a tensor; pass it as the tuner's weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from ..backbones import BaseInfo
from ..tuners.configs import ControlConfig
from ..tuners.tuner import Tuner
from ..utils.errors import TunerFileError
from .foreign import ForeignFile, make_config
from .names import skip_readers
from .scepter import TENSORS
from .skip_layers import fit_ratio, our_width

_KEY = re.compile(
    r"(?:model\.)?(?:control_blocks\.)?(?:(?P<number>\d{1,2})\.)?"
    r"(?:(?P<stem>pre_hint_blocks)\.(?P<layer>\d+)|(?P<level>dense_hint_blocks)\.(?P<depth>\d+)\.1|"
    r"(?P<tuner>lsc_tuner_blocks)\.(?P<site>\d+)\.tuner_op)\.(?P<tensor>(?:ln[12]\.)?(?:weight|bias))"
)
_OURS = dict(zip(TENSORS, ("down.weight", "down.bias", "up.weight", "up.bias"), strict=True))


def recognizes(keys: Iterable[str]) -> bool:
    """Return whether the keys are those of a SCEPTER CSC-Tuner."""
    return any("lsc_tuner_blocks." in key for key in keys)


def read(file: ForeignFile, base: BaseInfo) -> Tuner:
    """Convert a CSC-Tuner to a control tuner.

    Raises:
        TunerFileError: if the file contains other tensors, tunes only some skip connections, or does not fit the base.
    """
    matches = {key: match for key in file.tensors if (match := _KEY.fullmatch(key))}
    file.refuse_others(matches, "a CSC-Tuner of SCEPTER")
    sites = list(skip_readers(base))
    numbers = sorted({int(match["number"] or 0) for match in matches.values()})
    state = {}
    for key, match in matches.items():
        state[_our_key(match, numbers.index(int(match["number"] or 0)), sites, file)] = file.tensors[key]
    try:
        tuner = Tuner.empty((_config(state, base, sites, len(numbers), file),), base)
        expected = {key: tensor.shape for key, tensor in tuner.state_dict().items()}
    except KeyError as missing:
        raise _misfit(file, f"has no tensor for `{missing.args[0]}`") from missing
    for key in [*expected, *state]:
        if key not in state or key not in expected or state[key].shape != expected[key]:
            found = f"shape {tuple(state[key].shape)}" if key in state else "no such tensor"
            wanted = f"shape {tuple(expected[key])}" if key in expected else "no such tensor"
            raise _misfit(file, f"has {found} for `{key}`, but this base needs {wanted}")
    tuner.load_state_dict(state, assign=True)
    return tuner


def _our_key(match: re.Match[str], condition: int, sites: list[str], file: ForeignFile) -> str:
    tensor = match["tensor"]
    if match["stem"]:
        # Activations between the convolutions are numbered too, but have no tensors.
        return f"control.encoders.{condition}.stem.{int(match['layer']) // 2}.{tensor}"
    if match["level"]:
        return f"control.encoders.{condition}.levels.{int(match['depth'])}.{tensor}"
    number = int(match["site"])
    if number >= len(sites) or tensor not in _OURS:
        raise _misfit(file, f"has a tuner at skip connection {number}, but this base has {len(sites)}")
    return f"control.{sites[number]}.{condition}.{_OURS[tensor]}"


def _config(
    state: dict[str, torch.Tensor], base: BaseInfo, sites: list[str], conditions: int, file: ForeignFile
) -> ControlConfig:
    """Infer the config from the shapes of the tensors."""
    kernel = state["control.encoders.0.levels.0.weight"].shape[-1]
    widths = {site: (base.sites[site].channels, state[f"control.{site}.0.down.bias"].numel()) for site in sites}
    return make_config(
        ControlConfig,
        str(file.path),
        conditions=tuple(f"condition{number}" if number else "condition" for number in range(conditions)),
        channels=state["control.encoders.0.stem.0.weight"].shape[1],
        stem_ratio=state["control.encoders.0.stem.0.weight"].shape[0] / 16,
        stem_channels=state["control.encoders.0.stem.6.weight"].shape[0],
        ratio=fit_ratio(widths, our_width, slack=0.5),
        level_kernel=3 if kernel == 3 else 1,
        shortcut=False,
    )


def _misfit(file: ForeignFile, reason: str) -> TunerFileError:
    return TunerFileError(f"{file.path} is a CSC-Tuner that does not fit this base: it {reason}.")
