"""Settings of the cache of the base's features, from which a bypass tuner trains."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ...utils.setting_groups import SettingGroup, setting


class FeatureCacheConfig(SettingGroup):
    """Cache of the base's features on the disk, to train a bypass tuner without running the base."""

    # The files and folder keys of before know these by their old names.
    draws: int | None = setting(None, flat="feature_cache", affects="batches", recorded="feature_bank", gt=0)
    """For a `bypass` tuner: cache the base's features for so many noise and timestep samples per image on the disk,
    then train without running the base. Fewer samples cost quality; the disk use is printed before."""
    dtype: Literal["fp16", "bf16", "fp32"] = setting(
        "fp16", flat="feature_cache_dtype", affects="batches", recorded="feature_bank_dtype"
    )
    """Precision of the feature cache on the disk."""
    folder: Path | None = setting(None, flat="feature_cache_dir", affects="output", recorded=False)
    """Folder for feature caches, which several runs may share; OUTPUT/feature-cache where not given."""
