"""Training captions of the icons."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from research.restune_tiny.palette import COLOURS


class Captions:
    """Random captions for icons, and their ids in the compact vocabulary of the tokens in use."""

    templates = ("a picture of {}", "an icon of {}", "a drawing of {}", "an emoji of {}", "{} emoji", "{} icon")

    def __init__(self, records: list[dict[str, Any]], tokenizer: CLIPTokenizer) -> None:
        self.records, self.tokenizer = records, tokenizer
        texts = {text for record in records for text in [*record["captions"], *record["tags"], record["style"]]}
        texts |= {template.format("a, an in on background") for template in self.templates} | set(COLOURS)
        used = {token for ids in tokenizer(sorted(texts)).input_ids for token in ids}
        self.used = sorted(used)
        self.compact = {token: index for index, token in enumerate(self.used)}

    def draw(self, record: dict[str, Any], colour: str, rng: random.Random) -> str:
        """Return a random caption for an icon on a background color; one in ten is empty, for guidance."""
        if rng.random() < 0.1:
            return ""
        name = self.name(record, rng)
        if colour != "white" or rng.random() < 0.08:
            name += f" on a {colour} background"
        if rng.random() < 0.1:
            return name
        return f"{name} in {record['style']}" if rng.random() < 0.1 else f"{name}, {record['style']}"

    def name(self, record: dict[str, Any], rng: random.Random) -> str:
        """Return a random name of an icon."""
        kind, tags = rng.random(), record["tags"]
        if tags and kind < 0.04:
            return str(rng.choice(tags))
        name = str(record["captions"][0] if kind < 0.6 else rng.choice(record["captions"]))
        if kind > 0.93 and tags:
            return ", ".join([name, *rng.sample(tags, min(2, len(tags)))])
        article = "an" if name[0] in "aeiou" else "a"
        dressed = name if rng.random() < 0.7 else f"{article} {name}"
        return rng.choice(self.templates).format(dressed) if rng.random() < 0.07 else dressed

    def ids(self, prompts: list[str]) -> Tensor:
        """Return the compact token ids of prompts, N x 77, padded to the length used at inference."""
        rows = self.tokenizer(prompts, padding="max_length", max_length=77, truncation=True).input_ids
        return torch.tensor([[self.compact[token] for token in row] for row in rows])
