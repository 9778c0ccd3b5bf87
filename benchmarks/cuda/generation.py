"""Part `generation`: the time that tuners add to generating, and the time of a swap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

from peft import LoraConfig

from benchmarks.diffusers_lora import ATTENTION
from restune_diffusion import SkipConfig, TunerCache, TunerManager, enable_restune, save_tuner

from .bases import Base, build_pipeline, twin, wrap
from .bench import KINDS, Bench, milliseconds, over
from .results import Check, Result, Status, ratio

_STD = 0.01
PLAIN, PEER = "plain", "PEFT LoRA r=16"
_LIMITS = {"skip": (PLAIN, 1.10), "bypass": (PLAIN, 1.10), "lora": (PEER, 1.05)}


def pipelines(bench: Bench, base: Base) -> dict[str, Any]:
    """Return one pipeline for each contestant; their U-Nets share the weights."""
    whole = bench.kept(("pipeline", base.name), lambda: build_pipeline(base, bench.unet(base, bench.half)))
    made = {name: wrap(base, {**whole.components, "unet": twin(whole.unet)}) for name in (PLAIN, PEER, *_LIMITS)}
    made[PEER].unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=ATTENTION), "peer")
    made[PEER].unet.to(bench.half).requires_grad_(False)
    for name in _LIMITS:
        made[name] = enable_restune(made[name])
        made[name].load_tuner_weights(bench.tuner(made[name].unet, KINDS[name], std=_STD), name)
    return made


def generating(bench: Bench, base: Base, pipe: Any, images: int, steps: int, **options: Any) -> Callable[[], object]:
    """Return a call that generates latents from prompts that are encoded already, with guidance."""
    call = bench.inputs(base, images, bench.half)
    states = call["encoder_hidden_states"]
    given: dict[str, Any] = {"prompt_embeds": states, "negative_prompt_embeds": states}
    if base.is_xl:
        pooled = call["added_cond_kwargs"]["text_embeds"]
        given |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled}
    given |= {"num_inference_steps": steps, "latents": call["sample"], "output_type": "latent"}
    given |= {"height": base.pixels, "width": base.pixels}
    return lambda: pipe(**given, **options)


def one_tuner(bench: Bench) -> Iterator[Result]:
    """Compare the time of generating with one tuner with that of the plain pipeline, or of PEFT's LoRA."""
    # Base, images, steps, contestants; the time of SDXL is that of its U-Net whatever the number of steps.
    rounds = [(0, 2, 4, ()), (0, 8, 2, ()), (1, 2, 1, ()), (1, 8, 1, ("lora", PEER))]
    for index, images, steps, omitted in rounds:
        base = bench.bases[index]
        every = bench.kept(("contestants", base.name), partial(pipelines, bench, base))
        chosen = {name: pipe for name, pipe in every.items() if name not in omitted}
        times = bench.in_turn({name: generating(bench, base, pipe, images, steps) for name, pipe in chosen.items()})
        for name, (peer, limit) in _LIMITS.items():
            if name in chosen:
                what = f"{base.name}, {images} images, {name} / {peer}"
                yield ratio(bench, what, over(times, name, peer), limit, note=milliseconds(times, name))


def own_tuners(bench: Bench) -> Iterator[Result]:
    """Compare eight images with a tuner each with eight images with one tuner."""
    base = bench.bases[0]
    whole = bench.kept(("pipeline", base.name), lambda: build_pipeline(base, bench.unet(base, bench.half)))
    pipe = enable_restune(wrap(base, {**whole.components, "unet": twin(whole.unet)}))
    names = [f"style {number}" for number in range(8)]
    for seed, name in enumerate(names):
        pipe.load_tuner_weights(bench.tuner(pipe.unet, KINDS["skip"], seed=seed, std=_STD), name)
    ways = {
        "one": generating(bench, base, pipe, 8, 2, tuners=[names[0]] * 8),
        "each": generating(bench, base, pipe, 8, 2, tuners=names),
    }
    times = bench.in_turn(ways)
    yield ratio(bench, "own tuners / one tuner", over(times, "each", "one"), 1.15, note=milliseconds(times, "each"))


def swap_time(bench: Bench) -> Iterator[Result]:
    """Measure a swap between two files of 40 MB in a cache."""
    base = bench.bases[0]
    unet = twin(bench.unet(base, bench.half))
    cache = TunerCache(2)
    paths = [bench.folder / f"{name}.safetensors" for name in "ab"]
    for seed, path in enumerate(paths):
        save_tuner(bench.tuner(unet, SkipConfig(), seed=seed, std=_STD), path)
    pipe = enable_restune(wrap(base, {**bench.pipeline(base, bench.half).components, "unet": unet}))
    pipe.load_tuner_weights(paths[0], "style", cache=cache)
    manager = TunerManager.of(unet)
    assert manager is not None
    manager.place(bench.device)
    turn = [0]

    def swap() -> None:
        turn[0] += 1
        pipe.load_tuner_weights(paths[turn[0] % 2], "style", hotswap=True, cache=cache)

    times = bench.in_turn({"swap": swap, "again": swap})
    value = 1000 * median([*times["swap"], *times["again"]])
    size = paths[0].stat().st_size / 1e6
    status: Status = "measured" if bench.dry else ("passed" if value <= 15 else "failed")
    yield Result(f"skip, {size:.0f} MB", status, f"{value:.2f} ms", "<= 15 ms")


CHECKS = (
    Check("Generating with a tuner", one_tuner),
    Check("Eight images with their own tuners", own_tuners),
    Check("A swap", swap_time),
)
