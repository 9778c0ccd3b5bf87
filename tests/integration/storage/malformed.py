"""Damage tuner files in every way that chance or a stranger might: a seeded stream of mutated files."""

from __future__ import annotations

import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save
from transformers import CLIPTextModel

from restune_diffusion import BypassConfig, SkipConfig, Tuner, save_tuner
from restune_diffusion.backbones import TextEncoder
from restune_diffusion.tuners.configs import ControlConfig, ResConfig, TextConfig

from ...conftest import make_unet, randomize
from ...tiny_training import text_config, tokenizer

# Every kind of part, in every dtype. A new kind of part joins the fuzzing by a line here.
SEEDS: dict[str, tuple[tuple[Any, ...], torch.dtype]] = {
    "skip": ((SkipConfig(ratio=0.5),), torch.float32),
    "narrow skip": ((SkipConfig(ratio=0.1, sites=("skip.[0-2]",)),), torch.bfloat16),
    "bypass": ((BypassConfig(ratio=0.5, taps=("skip.3", "mid")),), torch.float16),
    "skip and bypass": ((SkipConfig(), BypassConfig(taps=("up.*",))), torch.float32),
    "res": ((ResConfig(width=2, cross_attention="lora", sites=("mid.*",)),), torch.float32),
    "control": ((ControlConfig(ratio=0.25),), torch.bfloat16),
    "text": ((TextConfig(tokens=("<dog>",), rank=1, linears=("self_attn.*",)),), torch.float32),
}

Outcome = Literal["same", "refused", "either"]
"""Expected result of a file: it loads with its seed's values, is refused, or either (with correct values)."""


@dataclass(frozen=True)
class Seed:
    """A good tuner file."""

    name: str
    data: bytes
    tuner: Tuner

    def split(self) -> tuple[dict[str, Any], bytes]:
        """Parse the header; return it with the tensors' bytes."""
        size = int.from_bytes(self.data[:8], "little")
        return json.loads(self.data[8 : 8 + size]), self.data[8 + size :]


@dataclass(frozen=True)
class Mutant:
    """A file that was a tuner file."""

    number: int
    mutation: str
    seed: Seed
    data: bytes
    outcome: Outcome


def tiny_unet() -> UNet2DConditionModel:
    """Build the smallest base that has every kind of site."""
    return make_unet(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )


def tiny_text() -> dict[str, TextEncoder]:
    """Build a text encoder to go with it."""
    words = tokenizer()
    return {"text_encoder": TextEncoder(CLIPTextModel(text_config(len(words))), words)}


def make_seeds(folder: Path) -> list[Seed]:
    """Write one good file for each entry of `SEEDS`."""
    unet, seeds = tiny_unet(), []
    text = tiny_text()
    for name, (configs, dtype) in SEEDS.items():
        tuner = Tuner.for_base(unet, *configs, text=text)
        randomize(tuner)
        path = folder / f"{name}.safetensors"
        training = {"steps": 3, "images": 2, "data_hash": "ab" * 32, "config": {"prompt": "ink", "seed": 1}}
        save_tuner(tuner.to(dtype), path, training=training, metadata={"modelspec.date": "2026-01-01"})
        header, body = Seed(name, path.read_bytes(), tuner).split()
        # safetensors writes the header's entries in another order each time.
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        seeds.append(Seed(name, assemble(dict(sorted(header.items())), body), tuner))
    return seeds


def mutants(seeds: list[Seed], count: int, seed: int = 0) -> Iterator[Mutant]:
    """Yield `count` mutated files; the same for the same seed, each dependent on its number alone."""
    names = [name for name, (weight, _, _) in MUTATIONS.items() for _ in range(weight)]
    for number in range(count):
        rng = random.Random(seed * 1_000_003 + number)
        origin, name = rng.choice(seeds), names[number % len(names)]
        _, outcome, mutate = MUTATIONS[name]
        yield Mutant(number, name, origin, mutate(rng, origin), outcome)


Mutation = Callable[[random.Random, Seed], bytes]
MUTATIONS: dict[str, tuple[int, Outcome, Mutation]] = {}


def mutation(weight: int, outcome: Outcome = "either") -> Callable[[Mutation], Mutation]:
    def register(function: Mutation) -> Mutation:
        MUTATIONS[function.__name__] = (weight, outcome, function)
        return function

    return register


def assemble(header: object, body: bytes, text: str | None = None) -> bytes:
    raw = (json.dumps(header) if text is None else text).encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + body


def tensor_names(header: dict[str, Any]) -> list[str]:
    return [key for key in header if key != "__metadata__"]


# The bytes alone


def flipped(rng: random.Random, data: bytes, start: int, stop: int) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        changed[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    return bytes(changed)


@mutation(6)
def flip_bits_anywhere(rng: random.Random, seed: Seed) -> bytes:
    return flipped(rng, seed.data, 0, len(seed.data))


@mutation(8)
def flip_bits_of_the_header(rng: random.Random, seed: Seed) -> bytes:
    return flipped(rng, seed.data, 8, len(seed.data) - len(seed.split()[1]))


@mutation(4)
def flip_bits_of_the_values(rng: random.Random, seed: Seed) -> bytes:
    return flipped(rng, seed.data, len(seed.data) - len(seed.split()[1]), len(seed.data))


@mutation(3, "refused")
def cut_off(rng: random.Random, seed: Seed) -> bytes:
    return seed.data[: rng.choice((0, 1, 7, 8, 9, 100, len(seed.data) - 1, rng.randrange(len(seed.data))))]


@mutation(1, "refused")
def append(rng: random.Random, seed: Seed) -> bytes:
    return seed.data + rng.randbytes(rng.choice((1, 2, 8, 4096)))


@mutation(3)
def move_bytes(rng: random.Random, seed: Seed) -> bytes:
    start, stop = sorted(rng.randrange(len(seed.data)) for _ in range(2))
    place = rng.randrange(len(seed.data))
    piece = rng.choice((seed.data[start:stop], b"\0" * (stop - start), rng.randbytes(stop - start)))
    return rng.choice(
        (
            seed.data[:start] + seed.data[stop:],
            seed.data[:place] + piece + seed.data[place:],
            seed.data[:start] + piece[: stop - start] + seed.data[stop:],
        )
    )


@mutation(2, "refused")
def declare_another_header_size(rng: random.Random, seed: Seed) -> bytes:
    size = int.from_bytes(seed.data[:8], "little")
    sizes = [0, 1, 2, size - 1, size + 1, len(seed.data), len(seed.data) - 8, 10**8, 10**8 + 1, 2**31, 2**32, 2**40]
    declared = rng.choice([*sizes, 2**62, 2**63, 2**64 - 1, 2**64 - 8, rng.randrange(2**64)])
    return declared.to_bytes(8, "little") + seed.data[8:]


@mutation(2, "refused")
def replace_by_something_else(rng: random.Random, seed: Seed) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data.pkl", seed.data)
    return rng.choice(
        (
            b"",
            b"\0" * rng.choice((1, 8, 9, 16, 4096)),
            b"\xff" * rng.choice((1, 8, 9, 16, 4096)),
            rng.randbytes(rng.randrange(1, 4096)),
            pickle.dumps({"a": 1}),
            archive.getvalue(),
            b"<html><body>404 Not Found</body></html>",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n",
            save({"lora_unet.down.weight": torch.zeros(2)}, {"format": "pt"}),
            save({"lora_unet.down.weight": torch.zeros(2)}),
            assemble({}, b""),
            assemble([], b""),
            assemble(None, b""),
            assemble(None, b"", "[" * 100_000),
            assemble(None, b"", '{"a":' * 100_000),
        )
    )


# The same tuner, written in another way


@mutation(2, "same")
def reorder_the_header(rng: random.Random, seed: Seed) -> bytes:
    header, body = seed.split()
    entries = list(header.items())
    rng.shuffle(entries)
    return assemble(dict(entries), body)


@mutation(2, "same")
def pad_the_header(rng: random.Random, seed: Seed) -> bytes:
    # Any number of spaces, so that tensors start anywhere.
    header, body = seed.split()
    return assemble(None, body, json.dumps(header, indent=rng.choice((None, 1))) + " " * rng.randrange(40))


@mutation(2, "same")
def reorder_the_values(rng: random.Random, seed: Seed) -> bytes:
    header, body = seed.split()
    names, pieces, offset = tensor_names(header), [], 0
    rng.shuffle(names)
    for name in names:
        start, stop = header[name]["data_offsets"]
        pieces.append(body[start:stop])
        header[name]["data_offsets"] = [offset, offset := offset + stop - start]
    return assemble(header, b"".join(pieces))


def big_mutants(seeds: list[Seed]) -> Iterator[Mutant]:
    """Yield files that are large, or that ask for much work."""
    seed = seeds[0]
    header, body = seed.split()
    facts = header["__metadata__"]
    base = json.loads(facts["restune.base"])
    site = {"channels": 8, "stride": 1}
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    deep = ".".join("abcdefghij")

    def with_metadata(**changes: str) -> dict[str, Any]:
        return {**header, "__metadata__": {**facts, **{f"restune.{key}": value for key, value in changes.items()}}}

    def with_sites(names: Iterator[str], **changes: str) -> dict[str, Any]:
        sites = {**dict.fromkeys(names, site), "out": site}
        return with_metadata(base=json.dumps({**base, "sites": sites}, separators=(",", ":")), **changes)

    cases: dict[str, tuple[Any, Outcome]] = {
        "100,000 tensors": ({**{f"t{i}": empty for i in range(100_000)}, **header}, "refused"),
        "1,000 sites": (with_sites(f"skip.{i}" for i in range(1_000)), "refused"),
        "1,000 deep names": (with_sites(f"skip.{i}.{deep}" for i in range(1_000)), "refused"),
        "6,000 sites of a bypass": (
            with_sites((f"skip.{i}" for i in range(6_000)), config='[{"part":"bypass","taps":["skip.*"]}]'),
            "refused",
        ),
        "50,000 sites": (with_sites(f"skip.{i}" for i in range(50_000)), "refused"),
        "1,000 sites and patterns": (
            with_sites(
                (f"skip.{i}" for i in range(1_000)),
                config=json.dumps([{"part": "skip", "sites": [f"skip.{i}*" for i in range(1_000)]}]),
            ),
            "refused",
        ),
        "500,000 parts": (with_metadata(config="[" + ",".join(['{"part":"skip"}'] * 500_000) + "]"), "refused"),
        "2,000,000 empty lists": (with_metadata(training='{"a":[' + "[]," * 2_000_000 + "1]}"), "refused"),
        "header of 20 MB": ({**header, "__metadata__": {**facts, "x": "y" * 20_000_000}}, "refused"),
        "thumbnail of 5 MB": ({**header, "__metadata__": {**facts, "modelspec.thumbnail": "y" * 5_000_000}}, "same"),
        "200,000 entries": (
            {**header, "__metadata__": {**{str(i): "" for i in range(200_000)}, **facts}},
            "same",
        ),
    }
    for number, (name, (changed, outcome)) in enumerate(cases.items()):
        yield Mutant(number, name, seed, assemble(changed, body), outcome)
