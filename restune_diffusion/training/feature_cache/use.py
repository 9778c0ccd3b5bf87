"""Build the feature cache of training runs, and replace their batches with cached ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ...backbones import describe_base
from ..config.feature_cache import FeatureCacheConfig
from ..config.shared_settings import batch_settings
from ..latents.batches import Batches
from ..latents.cache import Cache
from ..state import TrainState
from .batches import CachedFeatureBatches, CachedFeatureSampler, PrefetchedBatches
from .cache import FeatureCache, models_hash
from .layout import FeatureCacheLayout, Shard
from .shared_pass import features_of, tapped_by
from .tap_features import TapFeatures

_FORMAT = 1


def cached_feature_sampler(config: FeatureCacheConfig, cache: Cache, seed: int) -> CachedFeatureSampler | None:
    """Return the sampler of a run that trains from a feature cache, or None if it does not."""
    return None if config.draws is None else CachedFeatureSampler(len(cache.shown), seed, config.draws)


def hash_of_models(pipeline: Any) -> str:
    """Return a hash of the weights of all models of a pipeline."""
    return models_hash(model for _, model in sorted(pipeline.components.items()) if isinstance(model, nn.Module))


def hash_of_vae(vae: Any) -> str:
    """Return a hash of a VAE's weights and of the settings that scale its latents."""
    scaling = [vae.config.get(name) for name in ("scaling_factor", "shift_factor", "force_upcast")]
    return hashlib.sha256(f"{models_hash([vae])} {scaling}".encode()).hexdigest()


def use_feature_cache(runs: Sequence[TrainState], models: str | None, verbose: bool = True) -> FeatureCache:
    """Complete the feature cache of runs that have the same batches, and make the runs train from it.

    Args:
        runs: training runs of bypass tuners.
        models: hash of the base's models.
        verbose: whether to print the size of the cache and show a progress bar.

    Raises:
        TrainingError: if the cache does not fit on the disk, or a feature is out of range for its dtype.
        TunerFileError: if a file cannot be written.
    """
    run = runs[0]
    config, accelerator, batches = run.config, run.accelerator, run.batches
    sampler = cached_feature_sampler(config.feature_cache, run.cache, config.seed)
    assert sampler is not None
    assert isinstance(batches, Batches)
    feature_cache = _open_feature_cache(run, tapped_by(runs), models)
    if verbose:
        accelerator.print(f"features    {feature_cache.describe()}")
    feature_cache.check_space()
    # All processes must check the free space before one of them writes.
    accelerator.wait_for_everyone()
    _complete(feature_cache, run, batches, sampler, verbose)
    device, dtype = accelerator.device, run.pipeline.unet.dtype
    cached = CachedFeatureBatches(batches, sampler, feature_cache, size=config.batch_size, device=device, dtype=dtype)
    kept = config.gradient_accumulation_steps
    shared = PrefetchedBatches(cached, stride=accelerator.num_processes, kept=kept)
    for each in runs:
        each.batches = shared
    return feature_cache


def _open_feature_cache(run: TrainState, taps: set[str], models: str | None) -> FeatureCache:
    config = run.config
    latents = [run.cache.latents[views[0]].mean for views in run.cache.shown]
    sizes = [(latent.shape[-2], latent.shape[-1]) for latent in latents]
    draws = config.feature_cache.draws
    assert draws is not None
    layout = FeatureCacheLayout.of(describe_base(run.pipeline.unet), taps, sizes, draws, config.feature_cache.dtype)
    noise_levels = run.objective.noise_scheduler.alphas_cumprod.cpu().numpy().tobytes()
    identity = {
        "format": _FORMAT,
        "models": models,
        "images and captions": run.cache.data_hash,
        "resolution": run.resolution,
        "noise levels": hashlib.sha256(noise_levels).hexdigest(),
        "taps": layout.taps,
        "settings": batch_settings(config, order=False),
        # The hash of the models lacks the scaling factor, which another VAE may change too.
        **({"vae": run.vae} if run.vae is not None else {}),
    }
    return FeatureCache(config.feature_cache_folder, layout, identity)


def _complete(
    feature_cache: FeatureCache, run: TrainState, batches: Batches, sampler: CachedFeatureSampler, verbose: bool
) -> None:
    accelerator = run.accelerator

    def compute(shard: Shard) -> TapFeatures:
        draws = [sampler.draw(shard.image, shard.first + number) for number in range(shard.count)]
        return features_of(run, feature_cache.layout.taps, batches.of(draws))

    share, shares = accelerator.process_index, accelerator.num_processes
    shown = verbose and accelerator.is_main_process and bool(feature_cache.missing())
    with tqdm(
        total=-(-sum(1 for _ in feature_cache.layout.shards()) // shares), desc="features", disable=not shown
    ) as bar:
        feature_cache.build(compute, share, shares, bar.update)
    accelerator.wait_for_everyone()
    # If the processes share no disk, each machine computes the rest itself.
    feature_cache.build(compute)
