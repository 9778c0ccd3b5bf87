"""Device, bases, inputs and clocks that the checks share."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

from restune_diffusion import BypassConfig, ControlConfig, ResConfig, SkipConfig, Tuner
from restune_diffusion.tuners.configs import PartConfig

from .bases import FULL, TINY, Base, build_pipeline, build_unet

LORA = ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=16)
KINDS: dict[str, PartConfig] = {
    "skip": SkipConfig(),
    "bypass": BypassConfig(),
    "res, adapters": ResConfig(),
    "res, prefix and prompt": ResConfig(self_attention="prefix", cross_attention="prompt", feed_forward="prefix"),
    "res, attention": ResConfig(self_attention="attention", cross_attention="attention", feed_forward=None),
    "lora": LORA,
    "control": ControlConfig(conditions=("edges",)),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SECONDS = 12.0
_FEWEST_ROUNDS = 5


class Bench:
    """What the checks run on: CUDA at full size, or in a dry run the CPU with small bases.

    Args:
        dry: whether this is a dry run.
        folder: folder for temporary files.
        device: another device than these.
    """

    def __init__(self, *, dry: bool, folder: Path, device: torch.device | None = None) -> None:
        self.dry = dry
        self.folder = folder
        self.device = device or torch.device("cpu" if dry else "cuda")
        self.bases = TINY if dry else FULL
        self.half = torch.bfloat16 if dry else torch.float16
        self.rounds = 2 if dry else 20
        self._made: dict[Any, Any] = {}

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return an object that is made once in a part."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def release(self) -> None:
        """Drop all objects of the part that has ended, and free their memory."""
        self._made.clear()
        self.tidy()

    def tidy(self) -> None:
        """Wait for the device, and free what nothing references."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def unet(self, base: Base, dtype: torch.dtype) -> Any:
        """Return the U-Net of a base in a dtype; the same values for each dtype, except rounding."""
        whole = self.kept(("unet", base.name), lambda: build_unet(base, self.device))
        if dtype == torch.float32:
            return whole
        return self.kept(("unet", base.name, dtype), lambda: copy.deepcopy(whole).to(dtype))

    def pipeline(self, base: Base, dtype: torch.dtype) -> Any:
        """Return a pipeline around that U-Net."""
        return self.kept(("pipeline", base.name, dtype), lambda: build_pipeline(base, self.unet(base, dtype)))

    def inputs(self, base: Base, batch: int, dtype: torch.dtype, side: int | None = None) -> dict[str, Any]:
        """Return the arguments of a forward pass of the U-Net, always the same ones."""
        side = side or base.latent
        generator = torch.Generator().manual_seed(2)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(batch, *shape, generator=generator).to(self.device, dtype)

        call: dict[str, Any] = {
            "sample": random(4, side, side),
            "timestep": torch.tensor(321, device=self.device),
            "encoder_hidden_states": random(77, sum(base.text_widths)),
        }
        if base.is_xl:
            sizes = torch.tensor([[8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side]] * batch)
            call["added_cond_kwargs"] = {
                "text_embeds": random(base.text_widths[-1]),
                "time_ids": sizes.to(self.device, dtype),
            }
        return call

    def tuner(self, unet: Any, config: PartConfig, *, seed: int = 0, std: float = 0.0) -> Tuner:
        """Return a tuner on the device in the base's dtype; normal noise of `std` on all parameters makes it act."""
        generator = torch.Generator().manual_seed(seed)
        tuner = Tuner.for_base(unet, config, generator=generator).requires_grad_(False)
        if std:
            for parameter in tuner.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
        return tuner.to(self.device, unet.dtype)

    @cached_property
    def images(self) -> Mapping[int, Path]:
        """Folders of four random images for training, by their side in pixels."""
        folders = {}
        for pixels in {base.pixels for base in self.bases}:
            folders[pixels] = self.folder / f"images-{pixels}"
            folders[pixels].mkdir(parents=True, exist_ok=True)
            for number in range(4):
                image = Image.effect_noise((pixels, pixels), 60 + number).convert("RGB")
                image.save(folders[pixels] / f"{number}.png")
        return folders

    def in_turn(
        self, ways: Mapping[str, Callable[[], object]], seconds: float = _SECONDS, *, warm: bool = True
    ) -> dict[str, list[float]]:
        """Run functions in turn and return the times of each, in seconds.

        CUDA times are those of the device between two events, with the host's work in between; CPU times are processor
        times. There are 20 rounds, fewer (but at least 5) if they would take longer than `seconds`, after one that is
        not counted if `warm`.
        """
        times: dict[str, list[float]] = {name: [] for name in ways}
        if warm:
            for way in ways.values():
                way()
        started = time.perf_counter()
        for number in range(self.rounds):
            if number >= _FEWEST_ROUNDS and time.perf_counter() - started > seconds:
                break
            for name, way in ways.items():
                times[name].append(self.timed(way))
        return times

    def timed(self, way: Callable[[], object]) -> float:
        """Return the time of one call in seconds."""
        if self.device.type != "cuda":
            before = time.process_time()
            way()
            return time.process_time() - before
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        way()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference, as a share of the largest value of the second."""
    one, other = one.double().cpu(), other.double().cpu()
    return float((one - other).abs().max() / other.abs().max())


def over(times: Mapping[str, list[float]], name: str, peer: str) -> float:
    """Return the median over the rounds of one contestant's time divided by another's in the same round."""
    return median(own / other for own, other in zip(times[name], times[peer], strict=True))


def milliseconds(times: Mapping[str, list[float]], name: str) -> str:
    """Return the median time of a contestant and the number of rounds, for a table."""
    return f"{1000 * median(times[name]):.1f} ms, {len(times[name])} rounds"
