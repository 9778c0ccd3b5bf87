"""Placeholder tokens for text encoders (Textual Inversion, arXiv 2208.01618), and LoRA (arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..backbones import BaseInfo, TextEncoder
from ..backbones.site_names import match_sites
from ..utils.errors import RestuneError
from .base import Features, Part
from .configs import TextConfig
from .lora import ResLora

# Standard deviation of the initial token embeddings of CLIP.
_STD = 0.02


class TextPart(Part):
    """Part with the vectors of placeholder tokens and LoRA on linear layers, for each text encoder.

    It writes at no site of the denoiser. Its own sites are `<encoder>.layers.<n>.<path of the linear layer>`.
    """

    def __init__(self, config: TextConfig, base: BaseInfo) -> None:
        super().__init__()
        if not base.text:
            raise RestuneError(
                "A `text` part needs the text encoders; build the tuner with Tuner.for_pipeline(pipe, ...)."
            )
        self.taps = ()
        self.writes = ()
        self.tokens = config.tokens
        """Placeholder tokens."""
        self.initializers = config.initializers or ("",) * len(config.tokens)
        """Initializer words of each placeholder token; empty for random vectors."""
        self.vectors_per_token = config.vectors_per_token
        """Number of vectors per placeholder token."""
        self.text_encoders = tuple(match_sites(config.encoders, base.text, "text encoder"))
        for encoder in self.text_encoders:
            info = base.text[encoder]
            if config.tokens:
                shape = (config.vectors_per_token, info.hidden_size)
                vectors = nn.ParameterList(nn.Parameter(torch.empty(shape)) for _ in config.tokens)
                self.register_site(f"{encoder}.token", vectors)
            paths = match_sites(config.linears, info.linears, "linear layer") if config.rank else []
            for layer in range(info.num_hidden_layers):
                for path in paths:
                    lora = ResLora(*info.linears[path], config.rank, config.alpha)
                    self.register_site(f"{encoder}.layers.{layer}.{path}.lora", lora)

    def linears(self, encoder: str) -> list[str]:
        """Return the paths of an encoder's linear layers with LoRA: `layers.<n>.<path>`."""
        prefix = f"{encoder}.layers."
        return [
            site.removeprefix(f"{encoder}.").removesuffix(".lora") for site in self.at_site if site.startswith(prefix)
        ]

    def vectors(self, encoder: str) -> torch.Tensor:
        """Return the vectors of all placeholder tokens, `(tokens * vectors_per_token, hidden_size)`."""
        return torch.cat(list(self._vectors(encoder)))

    def forward(self, site: str, x: torch.Tensor, features: Features | None = None) -> torch.Tensor:
        """Return the residual of a linear layer for its input `x`, in the part's dtype."""
        residual: torch.Tensor = self.at_site[f"{site}.lora"](x)
        return residual

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize the token vectors with small random values, and LoRA with a zero residual."""
        for module in self.at_site.values():
            if isinstance(module, ResLora):
                module.reset_parameters(generator)
            else:
                for vectors in module.parameters():
                    nn.init.normal_(vectors, std=_STD, generator=generator)

    @torch.no_grad()
    def initialize_from(self, encoders: Mapping[str, TextEncoder]) -> None:
        """Set each vector of a placeholder token to the mean embedding of its initializer words, if it has any.

        Raises:
            RestuneError: if an initializer contains no word.
        """
        for name in self.text_encoders if self.tokens else ():
            tokenizer, module = encoders[name].tokenizer, encoders[name].module
            embedding = module.get_input_embeddings()  # type: ignore[operator]
            for token, words, vectors in zip(self.tokens, self.initializers, self._vectors(name), strict=True):
                if not words:
                    continue
                ids = tokenizer(words, add_special_tokens=False).input_ids
                if not ids:
                    raise RestuneError(f"The initializer {words!r} of {token} contains no word; use existing words.")
                known = embedding.weight[torch.tensor(ids, device=embedding.weight.device)]
                vectors.copy_(known.float().mean(0))

    def _vectors(self, encoder: str) -> nn.ParameterList:
        vectors = self.at_site[f"{encoder}.token"]
        assert isinstance(vectors, nn.ParameterList)
        return vectors
