"""Text embeddings of requests, cached."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from .views import PipelineViews


@dataclass(frozen=True, eq=False)
class PromptEmbeddings:
    """Text embeddings of a request, one row per row of the batch: the negative prompt first, if there is guidance."""

    embeds: torch.Tensor
    pooled: torch.Tensor | None = None
    """Pooled embeddings of Stable Diffusion XL."""


class TextCache:
    """LRU cache of text embeddings.

    Args:
        views: the pipelines.
        capacity: largest number of cached texts.
    """

    def __init__(self, views: PipelineViews, capacity: int = 256) -> None:
        self._views = views
        self._capacity = capacity
        self._kept: OrderedDict[Hashable, tuple[torch.Tensor, ...]] = OrderedDict()
        self.hits = 0
        self.misses = 0

    @torch.no_grad()
    def encode(self, prompt: str, negative: str | None, tuners: Hashable) -> PromptEmbeddings:
        """Return the embeddings of a prompt.

        Args:
            prompt: the prompt.
            negative: the negative prompt; None without guidance.
            tuners: the active tuners of the text encoders with their weights; the caller has activated them.
        """
        if self._views.is_xl:
            # The pipeline itself decides whether an empty negative prompt is encoded or is zeros.
            embeds, negative_embeds, pooled, negative_pooled = self._get((prompt, negative, tuners))
            if negative is None:
                return PromptEmbeddings(embeds, pooled)
            return PromptEmbeddings(torch.cat([negative_embeds, embeds]), torch.cat([negative_pooled, pooled]))
        texts = [prompt] if negative is None else [negative, prompt]
        return PromptEmbeddings(torch.cat([self._get((text, None, tuners))[0] for text in texts]))

    def _get(self, key: tuple[str, str | None, Hashable]) -> tuple[torch.Tensor, ...]:
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key]
        self.misses += 1
        prompt, negative, _ = key
        pipeline: Any = self._views.pipeline
        options = {} if negative is None else {"negative_prompt": negative}
        encoded: tuple[torch.Tensor, ...] = pipeline.encode_prompt(
            prompt,
            device=self._views.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=negative is not None,
            **options,
        )
        self._kept[key] = encoded
        if len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return encoded
