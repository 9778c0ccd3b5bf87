"""Features of diffusers' pipelines with tuners; with tuners disabled, outputs are bit-identical to diffusers'."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import tomesd
import torch
from accelerate import cpu_offload
from DeepCache import DeepCacheSDHelper
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)

from restune_diffusion import Tuner

from ...peers import freeu, ip_adapter, lora
from ...tiny_pipelines import (
    KINDS,
    KINDS_BY_NAME,
    SIZE,
    Kind,
    detach_all,
    difference,
    draw,
    identical,
    make_tuner,
    sd_components,
    sd_unet,
    sdxl_components,
    untouched,
)

Arguments = dict[str, Any]
Row = Callable[[Any, Kind], contextlib.AbstractContextManager[Arguments]]
EACH_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.removesuffix("Pipeline"))


@pytest.fixture(scope="module")
def made() -> Iterator[dict[bool, Arguments]]:
    """The components of SD (False) and SDXL (True), shared by all tests here, which leave the U-Nets as they were."""
    components = {False: sd_components(), True: sdxl_components()}
    before = {is_xl: untouched(parts["unet"]) for is_xl, parts in components.items()}
    yield components
    for is_xl, parts in components.items():
        assert_same_weights(before[is_xl], untouched(parts["unet"]))


@pytest.fixture
def components(made: dict[bool, Arguments]) -> Iterator[dict[bool, Arguments]]:
    """Shared components; tuners left on their U-Nets by a failed test are detached."""
    yield made
    for parts in made.values():
        detach_all(parts["unet"])


def assert_same_weights(before: Any, after: Any) -> None:
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])


@cache
def tuners(is_xl: bool) -> dict[str, Tuner]:
    unet = (sdxl_components() if is_xl else sd_components())["unet"]
    return {part: make_tuner(unet, part) for part in ("skip", "bypass", "res inside attention")}


def load_several(pipe: Any) -> None:
    for name, tuner in tuners("XL" in type(pipe).__name__).items():
        pipe.load_tuner_weights(tuner, name)


# Each row enables a feature on a pipeline and gives the arguments of the call.


def passing(**arguments: Any) -> Row:
    return lambda pipe, kind: contextlib.nullcontext(arguments)


def scheduled(scheduler_class: Any) -> Row:
    def row(pipe: Any, kind: Kind) -> contextlib.AbstractContextManager[Arguments]:
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
        return contextlib.nullcontext({})

    return row


def switched(on: Callable[[Any], Any], off: Callable[[Any], Any], **arguments: Any) -> Row:
    @contextlib.contextmanager
    def row(pipe: Any, kind: Kind) -> Iterator[Arguments]:
        on(pipe)
        try:
            yield arguments
        finally:
            off(pipe)

    return row


def embedded(pipe: Any, kind: Kind) -> contextlib.AbstractContextManager[Arguments]:
    names = ["prompt_embeds", "negative_prompt_embeds"]
    names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"] if kind.is_xl else []
    embeds = pipe.encode_prompt(["a ship"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    return contextlib.nullcontext({"prompt": None, **dict(zip(names, embeds, strict=True))})


def stepwise(pipe: Any, kind: Kind) -> contextlib.AbstractContextManager[Arguments]:
    def after_step(pipe: Any, step: int, timestep: Any, arguments: Arguments) -> Arguments:
        return {"latents": arguments["latents"] * (0.9 - step / 10)}

    return contextlib.nullcontext(
        {"callback_on_step_end": after_step, "callback_on_step_end_tensor_inputs": ["latents"]}
    )


@contextlib.contextmanager
def deep_cached(pipe: Any, kind: Kind) -> Iterator[Arguments]:
    helper = DeepCacheSDHelper(pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    try:
        yield {}
    finally:
        helper.disable()


@contextlib.contextmanager
def tiled(pipe: Any, kind: Kind) -> Iterator[Arguments]:
    tiles = {"tile_sample_min_size": SIZE // 2, "tile_latent_min_size": SIZE // 16, "tile_overlap_factor": 0.5}
    pipe.vae.enable_tiling()
    before = {name: getattr(pipe.vae, name) for name in tiles}
    vars(pipe.vae).update(tiles)
    try:
        yield {"output_type": "np"}
    finally:
        vars(pipe.vae).update(before)
        pipe.vae.disable_tiling()


ROWS: dict[str, Row] = {
    "guidance": passing(guidance_scale=5.0, negative_prompt=["blurry"]),
    "no guidance": passing(guidance_scale=1.0),
    "a generator for each prompt": passing(count=2),
    "one generator, several images per prompt": passing(num_images_per_prompt=2, one_generator=True),
    "prompt embeds": embedded,
    "numpy output": passing(output_type="np"),
    "PIL output in a tuple": passing(output_type="pil", return_dict=False),
    "a callback": stepwise,
    "Euler": scheduled(EulerDiscreteScheduler),
    "DPM++": scheduled(DPMSolverMultistepScheduler),
    "LCM": scheduled(LCMScheduler),
    "VAE slicing": switched(
        lambda pipe: pipe.vae.enable_slicing(), lambda pipe: pipe.vae.disable_slicing(), count=2, output_type="np"
    ),
    "VAE tiling": tiled,
    "FreeU": freeu,
    "token merging": switched(
        lambda pipe: tomesd.apply_patch(pipe, ratio=0.5, max_downsample=4, use_rand=False), tomesd.remove_patch
    ),
    "DeepCache": deep_cached,
    "IP-Adapter": ip_adapter,
    "LoRA": lora,
}


@pytest.mark.parametrize("row", ROWS)
@EACH_KIND
def test_a_feature_works_with_tuners_and_is_unchanged_without(kind, row, components):
    parts = components[kind.is_xl]
    plain = kind.make(kind.plain, parts)
    with ROWS[row](plain, kind) as arguments:
        expected = draw(plain, kind, **arguments)
    after_plain = untouched(parts["unet"])

    pipe = kind.make(kind.ours, parts)
    load_several(pipe)
    with ROWS[row](pipe, kind) as arguments:
        tuned = draw(pipe, kind, **arguments)
        pipe.disable_tuners()
        assert identical(draw(pipe, kind, **arguments), expected)
        pipe.unload_tuner_weights()
        assert identical(draw(pipe, kind, **arguments), expected)
    assert difference(tuned, expected) > 1e-2
    after_ours = untouched(parts["unet"])
    assert_same_weights(after_plain, after_ours)
    assert after_ours[1] == after_plain[1]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@EACH_KIND
def test_each_prompt_has_its_own_tuner(kind, guidance, components):
    pipe = kind.make(kind.ours, components[kind.is_xl])
    load_several(pipe)
    mixes = ["skip", None, {"skip": -0.5, "bypass": 0.7}]
    together = draw(pipe, kind, count=3, guidance_scale=guidance, tuners=mixes)
    pipe.set_tuners({})
    plain = draw(pipe, kind, count=3, guidance_scale=guidance)
    for number, mix in enumerate(mixes):
        alone = draw(pipe, kind, count=3, guidance_scale=guidance, tuners=[mix] * 3)[number]
        assert difference(together[number], alone) < 1e-4
    assert difference(together[0], plain[0]) > 1e-2
    assert difference(together[1], plain[1]) < 1e-4


@EACH_KIND
def test_a_callback_changes_the_mix_for_the_steps_that_follow(kind, components):
    pipe = kind.make(kind.ours, components[kind.is_xl])
    pipe.load_tuner_weights(make_tuner(pipe.unet), "style")

    def latents(first, second):
        seen = []

        def after_step(pipe, step, timestep, arguments):
            seen.append(arguments["latents"].clone())
            pipe.set_tuners("style", second)
            return {}

        pipe.set_tuners("style", first)
        draw(pipe, kind, callback_on_step_end=after_step)
        return seen

    (on, on_on), (also_on, on_off) = latents(1.0, 1.0), latents(1.0, 0.0)
    assert pipe.get_active_tuners() == []
    off, off_off = latents(0.0, 0.0)
    assert identical(on, also_on)
    assert min(difference(on, off), difference(on_on, on_off), difference(on_off, off_off)) > 1e-4


@pytest.mark.parametrize("mix", [None, ["skip"]], ids=["no mix", "a mix"])
def test_a_callback_unloads_a_tuner(mix, components):
    kind = KINDS[0]
    pipe = kind.make(kind.ours, components[False])
    load_several(pipe)
    draw(
        pipe,
        kind,
        tuners=mix,
        callback_on_step_end=lambda pipe, step, timestep, arguments: (
            pipe.delete_tuners([name for name in pipe.get_list_tuners() if name != "bypass"]) or {}
        ),
    )
    assert pipe.get_list_tuners() == {"bypass": 1.0}
    draw(pipe, kind, callback_on_step_end=lambda pipe, *_: pipe.unload_tuner_weights() or {})
    assert pipe.get_list_tuners() == {}


def offload_in_sequence(pipe: Any) -> None:
    # What `enable_sequential_cpu_offload` does; that itself insists on an indexed device, which a CPU is not.
    for model in pipe.components.values():
        if isinstance(model, torch.nn.Module):
            cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)


OFFLOADS: dict[str, Callable[[Any], Any]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": offload_in_sequence,
    "group, blocks": lambda pipe: pipe.enable_group_offload(
        torch.device("cpu"), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    ),
    "group, leaves": lambda pipe: pipe.enable_group_offload(
        torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level"
    ),
}


@pytest.fixture(scope="module")
def drawn(made: dict[bool, Arguments]) -> Callable[[Kind], tuple[Any, Any]]:
    """Images of a pipeline class without and with tuners, each generated once."""

    @cache
    def both(kind: Kind) -> tuple[Any, Any]:
        pipe = kind.make(kind.ours, made[kind.is_xl])
        without = draw(pipe, kind)
        load_several(pipe)
        tuned = draw(pipe, kind)
        pipe.unload_tuner_weights()
        return without, tuned

    return both


@pytest.mark.parametrize("offload", OFFLOADS)
@EACH_KIND
def test_offloading(kind, offload, components, drawn):
    """The hooks of offloading and ours live together; with the CPU as the accelerator, no tensor really travels."""
    without, tuned = drawn(kind)
    parts = {
        name: copy.deepcopy(part) if isinstance(part, torch.nn.Module) else part
        for name, part in components[kind.is_xl].items()
    }
    pipe = kind.make(kind.ours, parts)
    load_several(pipe)
    OFFLOADS[offload](pipe)
    assert identical(draw(pipe, kind), tuned)
    pipe.unload_tuner_weights()
    assert identical(draw(pipe, kind), without)


@EACH_KIND
def test_a_saved_pipeline_loads_with_and_without_this_package(kind, components, tmp_path):
    parts = components[kind.is_xl]
    pipe = kind.make(kind.ours, parts)
    load_several(pipe)
    pipe.save_pretrained(tmp_path / "ours")
    pipe.unload_tuner_weights()
    kind.make(kind.plain, parts).save_config(tmp_path / "plain")
    index, plain_index = (tmp_path / folder / "model_index.json" for folder in ("ours", "plain"))
    assert index.read_text() == plain_index.read_text()

    plain = DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(plain) is kind.plain
    # Weights from a file lie at other addresses, where some kernels add in another order.
    assert difference(draw(plain, kind), draw(pipe, kind)) < 1e-4
    again = kind.ours.from_pretrained(tmp_path / "ours")
    assert type(again) is kind.ours
    assert again.get_list_tuners() == {}
    assert identical(draw(again, kind), draw(plain, kind))
    load_several(again)
    assert difference(draw(again, kind), draw(plain, kind)) > 1e-2


@EACH_KIND
def test_from_pipe_shares_the_base_and_its_tuners(kind, components):
    parts = components[kind.is_xl]
    plain = kind.make(kind.plain, parts)
    expected = draw(plain, kind)
    pipe = kind.ours.from_pipe(plain)
    assert type(pipe) is kind.ours
    assert pipe.unet is plain.unet
    load_several(pipe)
    tuned = draw(pipe, kind)
    assert identical(draw(plain, kind), tuned)
    assert identical(draw(kind.plain.from_pipe(pipe), kind), tuned)
    sibling = kind.ours.from_pipe(pipe)
    assert list(sibling.get_list_tuners()) == ["skip", "bypass", "res inside attention"]
    sibling.unload_tuner_weights()
    assert pipe.get_list_tuners() == {}
    assert identical(draw(pipe, kind), expected)


@EACH_KIND
def test_from_pipe_changes_the_task(kind, components):
    parts = components[kind.is_xl]
    text_to_image = KINDS_BY_NAME[f"StableDiffusion{'XL' * kind.is_xl}Pipeline"]
    pipe = text_to_image.make(text_to_image.ours, parts)
    load_several(pipe)
    added = {"controlnet": parts["controlnet"]} if "ControlNet" in kind.name else {}
    other = kind.ours.from_pipe(pipe, **added)
    other.set_progress_bar_config(disable=True)
    assert other.get_active_tuners() == ["skip", "bypass", "res inside attention"]
    tuned = draw(other, kind)
    pipe.unload_tuner_weights()
    assert difference(tuned, draw(other, kind)) > 1e-2


def test_inpainting_with_a_mask_input(components):
    """A nine-channel base has the skips of its text-to-image sibling, and takes the same tuners."""
    kind = KINDS_BY_NAME["StableDiffusionInpaintPipeline"]
    parts = components[False]
    unet = sd_unet(in_channels=9)
    plain = kind.make(kind.plain, parts, unet=unet)
    expected = draw(plain, kind)
    pipe = kind.make(kind.ours, parts, unet=unet)
    pipe.load_tuner_weights(make_tuner(parts["unet"]), "style")
    assert difference(draw(pipe, kind), expected) > 1e-2
    pipe.unload_tuner_weights()
    assert identical(draw(pipe, kind), expected)
