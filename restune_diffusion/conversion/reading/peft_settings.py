"""PEFT's settings of an adapter: each key is understood, harmless or refused.

Source: PEFT 0.21.2 (`tuners/lora/config.py`, `tuners/loha/config.py`, `tuners/lokr/config.py`, `utils/other.py`:
`get_pattern_key`) and ms-swift 4.6.0 (`swift/tuners/lora.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

import regex

from ...utils.errors import TunerFileError

UNDERSTOOD = frozenset({"r", "lora_alpha", "alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"})
"""Settings that the readers compute with."""
HARMLESS = frozenset({
    # Description of the file, the base and the training.
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "rank_dropout", "rank_dropout_scale", "module_dropout", "runtime_config", "model_key_mapping",
    "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",
    # Choice of the modules, which the file's keys state.
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    # Options of others that are refused unless they are off, and PEFT's settings for layers other than linear ones.
    "qalora_group_size", "megatron_core", "loftq_config", "eva_config", "fan_in_fan_out", "use_effective_conv2d",
    "enable_lora",
    # Shape of the factors of a LoKr, which the tensors state.
    "decompose_both", "decompose_factor",
})  # fmt: skip
"""Settings that do not change the product of a linear layer."""
LIMITED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", "LOHA", "LOKR"),
    "swift_type": ("LORA",),
    "bias": ("none",),
    # The others (pissa, olora, loftq, corda, lora_ga) change the base's weights.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "init_weights": (True, False, "lycoris"),
    "modules_to_save": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    **dict.fromkeys(("use_qalora", "use_qa_lora", "use_merged_linear", "lora_bias", "use_bdlora",
                     "ensure_weight_tying"), (False,)),
    **dict.fromkeys(("megatron_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config",
                     "alora_invocation_tokens", "layer_replication", "arrow_config", "kasa_config"), ()),
}  # fmt: skip
"""Settings with the values that leave an adapter a plain product; null is one for each."""

_LONGEST_PATTERN = 1000
_SECONDS = 1.0


def check_settings(
    settings: Mapping[str, Any],
    source: str,
    plain: Set[str] = UNDERSTOOD | HARMLESS,
    limited: Mapping[str, tuple[Any, ...]] = LIMITED,
) -> None:
    """Raise `TunerFileError` for the first setting that is unknown or that no tuner family computes.

    Args:
        settings: settings of the file.
        source: the file, for the message.
        plain: settings of which every value is computed, or changes nothing.
        limited: settings with the values that are supported.
    """
    for key, value in settings.items():
        if value is None or key in plain:
            continue
        if key not in limited:
            raise TunerFileError(
                f"{source} has the unknown setting {key[:80]} = {repr(value)[:40]}, which may change what the adapter "
                "computes."
            )
        # In Python, 1 == True.
        if not any(type(value) is type(one) and value == one for one in limited[key]):
            raise TunerFileError(
                f"{source} was trained with {key} = {repr(value)[:40]}, which no tuner family supports."
                + _remedy(key, value)
            )


def pattern_key(patterns: Iterable[str], path: str, source: str) -> str | None:
    """Return the first regular expression that matches a module as in PEFT, or None.

    Raises:
        TunerFileError: if an expression is not valid, or takes too long.
    """
    for key in patterns:
        try:
            if len(key) > _LONGEST_PATTERN:
                raise ValueError("it is too long")
            if regex.match(rf"(.*\.)?({key})$", path, timeout=_SECONDS):
                return key
        except (regex.error, ValueError, TimeoutError, RecursionError) as error:
            raise TunerFileError(
                f"{source} has the pattern {key[:80]!r}, which cannot be used as a regular expression ({error})."
            ) from error
    return None


def _remedy(key: str, value: object) -> str:
    if key != "init_lora_weights":
        return ""
    return (
        f" Such an adapter is relative to a base that {str(value)[:40]} changed: save it again with PEFT's "
        "save_pretrained(folder, path_initial_model_for_weight_conversion=...) and convert that."
    )
