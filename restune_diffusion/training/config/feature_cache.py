"""Feature cache settings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ...utils.setting_groups import SettingGroup, setting


class FeatureCacheConfig(SettingGroup):
    """Cache of the base's features on disk, to train a bypass tuner without running the U-Net."""

    # Recorded under their old names, which existing tuner files and cache folder keys use.
    draws: int | None = setting(None, flat="feature_cache", affects="batches", recorded="feature_bank", gt=0)
    """For a `bypass` tuner: cache the base's features on disk for N noise and timestep samples per image, then train
    without running the U-Net. Fewer samples lower the quality. The disk space is printed before the cache is
    written."""
    dtype: Literal["fp16", "bf16", "fp32"] = setting(
        "fp16", flat="feature_cache_dtype", affects="batches", recorded="feature_bank_dtype"
    )
    """Precision of the cached features on disk."""
    folder: Path | None = setting(None, flat="feature_cache_dir", affects="output", recorded=False)
    """Folder for feature caches, which several runs may share. If not set, OUTPUT/feature-cache."""
