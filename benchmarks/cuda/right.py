"""Part `right`: the numbers on the device are those of the CPU, and a tuner comes off without a trace."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor

from restune_diffusion import TextConfig, Tuner, TunerManager, TunerWeight, attach, enable_restune, schedule
from restune_diffusion.backbones import text_encoders
from restune_diffusion.hooks.mixing import Layout
from restune_diffusion.hooks.weights import Weight

from .bases import Base, build_pipeline, build_unet
from .bench import DTYPES, KINDS, Bench, difference
from .results import CannotRun, Check, Result, at_most, holds

_MIB = 2**20
_LIMITS = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 3e-2}
# Of a random base, a tuner with this noise changes the output by percents.
_STD = 0.02


def output(unet: Any, call: dict[str, Any]) -> torch.Tensor:
    """Return the prediction of a U-Net without gradients."""
    with torch.no_grad():
        predicted: torch.Tensor = unet(**call, return_dict=False)[0]
    return predicted


@contextlib.contextmanager
def attached(unet: Any, tuner: Tuner, call: dict[str, Any], name: str = "tuner") -> Iterator[TunerManager]:
    """Context manager with a tuner attached, with a condition image if it takes one."""
    with attach(unet, tuner, name):
        manager = TunerManager.of(unet)
        assert manager is not None
        if any(part.conditions for part in tuner.parts()):
            side = 8 * call["sample"].shape[-1]
            image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(3))
            manager.set_conditions(name, [image.to(call["sample"].device)])
        yield manager


def fresh_tuners(bench: Bench) -> Iterator[Result]:
    """Compare the base with itself under new tuners, and after they are detached, bit for bit."""
    for base in bench.bases:
        for name, dtype in DTYPES.items():
            unet, call = bench.unet(base, dtype), bench.inputs(base, 2, dtype)
            plain, wrong = output(unet, call), []
            for kind, config in KINDS.items():
                with attached(unet, bench.tuner(unet, config), call):
                    tuned = output(unet, call)
                if not (torch.equal(tuned, plain) and torch.equal(output(unet, call), plain)):
                    wrong.append(kind)
            if not _text_is_unchanged(bench, base, dtype):
                wrong.append("text")
            value = f"changed by {', '.join(wrong)}" if wrong else f"{len(KINDS) + 1} kinds equal"
            yield holds(f"{base.name}, {name}", not wrong, value, "equal")


def _text_is_unchanged(bench: Bench, base: Base, dtype: torch.dtype) -> bool:
    """Return whether a new `text` tuner leaves the encoded prompt as it is, and a detached one too."""
    pipe = enable_restune(bench.pipeline(base, dtype))
    tuner = Tuner.for_pipeline(pipe, TextConfig(rank=4)).to(bench.device, dtype)

    def encoded() -> torch.Tensor:
        with torch.no_grad():
            states: torch.Tensor = pipe.encode_prompt(
                prompt="a cat", device=bench.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )[0]
        return states

    plain = encoded()
    with attach(pipe.unet, tuner, "text", text=text_encoders(pipe)):
        tuned = encoded()
    return torch.equal(tuned, plain) and torch.equal(encoded(), plain)


def memory_comes_back(bench: Bench) -> Iterator[Result]:
    """Compare the allocated memory before attaching a tuner and after detaching it."""
    for base in bench.bases:
        unet, call = bench.unet(base, bench.half), bench.inputs(base, 2, bench.half)
        for kind, config in KINDS.items():
            left = 0.0
            for _ in range(2):  # the first time, kernels may allocate workspace that stays
                bench.tidy()
                before = torch.cuda.memory_allocated()
                with attached(unet, bench.tuner(unet, config, std=_STD), call):
                    output(unet, call)
                bench.tidy()
                left = (torch.cuda.memory_allocated() - before) / _MIB
            yield at_most(f"{base.name}, {kind}", left, 1.0, ".2f")


def against_the_cpu(bench: Bench, precisions: tuple[str, ...]) -> Iterator[Result]:
    """Compare acting tuners on the device with the same in fp32 on the CPU."""
    for base in bench.bases:
        side = base.small_latent
        whole = bench.unet(base, torch.float32)
        on_cpu = bench.kept(("on the CPU", base.name), partial(_copy_on_cpu, whole))
        call = bench.inputs(base, 1, torch.float32, side)
        there = {name: _moved(value, torch.device("cpu"), torch.float32) for name, value in call.items()}
        plain = output(on_cpu, there)
        kinds = KINDS if not base.is_xl or bench.dry else {"skip": KINDS["skip"]}
        for kind, config in kinds.items():
            tuner = bench.tuner(whole, config, std=_STD)
            with attached(on_cpu, copy.deepcopy(tuner).cpu(), there):
                expected = output(on_cpu, there)
            effect = difference(expected, plain)
            for name in precisions:
                unet = bench.unet(base, DTYPES[name])
                here = {key: _moved(value, bench.device, DTYPES[name]) for key, value in call.items()}
                with attached(unet, copy.deepcopy(tuner).to(DTYPES[name]), here):
                    apart = difference(output(unet, here), expected)
                what = f"{base.name}, {kind}, {name}"
                if effect < 1e-3:
                    yield holds(what, False, f"the tuner changes the output by only {effect:.1e}")
                else:
                    yield at_most(what, apart, _LIMITS[name])


def _copy_on_cpu(unet: Any) -> Any:
    return copy.deepcopy(unet).cpu()


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return an argument of a forward pass on a device; numbers of timesteps keep their dtype."""
    if isinstance(value, dict):
        return {name: _moved(each, device, dtype) for name, each in value.items()}
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


def fp32_against_the_cpu(bench: Bench) -> Iterator[Result]:
    """Compare fp32 on CUDA with fp32 on the CPU."""
    yield from against_the_cpu(bench, ("fp32",))


def half_against_the_cpu(bench: Bench) -> Iterator[Result]:
    """Compare fp16 and bf16 with fp32 on the CPU."""
    yield from against_the_cpu(bench, ("fp16", "bf16"))


def mixed_batch(bench: Bench) -> Iterator[Result]:
    """Compare each row of a batch with weights per image with that image alone."""
    base = bench.bases[0]
    unet, call = bench.unet(base, torch.float32), bench.inputs(base, 4, torch.float32)
    weights = {"skip": (1.0, 0.0, 0.0, 0.5), "bypass": (0.0, 1.0, 0.0, 0.5), "lora": (0.0, 0.0, 0.0, 1.0)}
    plain = output(unet, call)
    with contextlib.ExitStack() as stack:
        for seed, name in enumerate(weights):
            stack.enter_context(attach(unet, bench.tuner(unet, KINDS[name], seed=seed, std=_STD), name))
        manager = TunerManager.of(unet)
        assert manager is not None
        manager.set_weights(weights)
        mixed = output(unet, call)
        for row in range(4):
            one = {name: value if value.dim() == 0 else value[row : row + 1] for name, value in call.items()}
            manager.set_weights({name: each[row] for name, each in weights.items()})
            apart = difference(mixed[row : row + 1], output(unet, one))
            effect = difference(mixed[row], plain[row])
            acts = any(each[row] for each in weights.values())
            if acts and effect < 1e-3:
                yield holds(f"image {row}", False, f"its tuners change it by only {effect:.1e}")
            else:
                yield at_most(f"image {row}", apart, 1e-4)


def no_waiting(bench: Bench) -> Iterator[Result]:
    """Run one pass for each form of weight where every wait of the host for the device is an error."""
    base = bench.bases[0]
    unet, call = bench.unet(base, bench.half), bench.inputs(base, 4, bench.half)
    side = base.latent
    weights: dict[str, Weight] = {
        "scalar": 0.7,
        "per site": {"*": 0.5},
        "mask": TunerWeight(mask=torch.ones(side, side)),
        "per image": [1.0, 0.5],
        "on": TunerWeight(on="cond"),
        "schedule": schedule("0-0.2: 0, 0.2-1: 1"),
    }
    for kind in ("skip", "bypass", "res, adapters", "lora"):
        with attached(unet, bench.tuner(unet, KINDS[kind], std=_STD), call) as manager:
            manager.layout = Layout(2, True)
            for name, weight in weights.items():
                if name == "mask" and kind == "lora":
                    continue  # keys and values of cross-attention have the tokens of the text, not a grid
                manager.set_weights({"tuner": weight})
                output(unet, call)
                bench.tidy()
                yield _without_waiting(f"{kind}, {name}", lambda: output(unet, call))


def _without_waiting(what: str, run: Callable[[], object]) -> Result:
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return holds(what, False, str(error).splitlines()[0][:120], "no wait")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return holds(what, True, "no wait", "no wait")


def offloading(bench: Bench) -> Iterator[Result]:
    """Compare the latents of a pipeline with offloaded weights with those of the same pipeline on the device."""
    base, cpu = bench.bases[0], torch.device("cpu")
    modes: dict[str, Callable[[Any], Any]] = {
        "model": lambda pipe: pipe.enable_model_cpu_offload(device=bench.device),
        "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(device=bench.device),
        "group, blocks": lambda pipe: pipe.enable_group_offload(
            bench.device, cpu, offload_type="block_level", num_blocks_per_group=1
        ),
        "group, leaves": lambda pipe: pipe.enable_group_offload(bench.device, cpu, offload_type="leaf_level"),
    }
    whole = build_unet(base, cpu).to(bench.half)
    kinds = [kind for kind in KINDS if kind != "control"]
    tuners = {kind: bench.tuner(whole, KINDS[kind], seed=seed, std=_STD) for seed, kind in enumerate(kinds)}

    def latents(prepare: Callable[[Any], Any]) -> torch.Tensor:
        pipe = enable_restune(build_pipeline(base, copy.deepcopy(whole)))
        for name, tuner in tuners.items():
            pipe.load_tuner_weights(tuner.copy().cpu(), name, weight=0.3)
        prepare(pipe)
        made: torch.Tensor = pipe(
            "a cat", num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0)
        ).images
        return made.cpu()

    expected = latents(lambda pipe: pipe.to(bench.device))
    for mode, prepare in modes.items():
        yield at_most(mode, difference(latents(prepare), expected), 1e-3)
        bench.tidy()


def swapping(bench: Bench) -> Iterator[Result]:
    """Check that a swap allocates nothing, keeps every parameter's address, and has the other tuner's effect."""
    base = bench.bases[0]
    unet, call = bench.unet(base, bench.half), bench.inputs(base, 2, bench.half)
    for kind in ("skip", "bypass", "lora"):
        tuner = bench.tuner(unet, KINDS[kind], std=_STD)
        other = bench.tuner(unet, KINDS[kind], seed=1, std=_STD)
        with attach(unet, other):
            expected = output(unet, call)
        other = other.cpu()
        with attach(unet, tuner, "tuner"):
            manager = TunerManager.of(unet)
            assert manager is not None
            first = output(unet, call)
            addresses = [parameter.data_ptr() for parameter in tuner.parameters()]
            before = _allocated(bench)
            manager.swap("tuner", other)
            after = _allocated(bench)
            same = addresses == [parameter.data_ptr() for parameter in manager.tuner("tuner").parameters()]
            swapped = output(unet, call)
        right = torch.equal(swapped, expected) and not torch.equal(swapped, first)
        yield holds(kind, same and right and after == before, f"{after - before} bytes", "0 bytes")


def _allocated(bench: Bench) -> int:
    if bench.device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def xformers(bench: Bench) -> Iterator[Result]:
    """Compare tuners in parallel to attention under xformers and under SDPA."""
    if importlib.util.find_spec("xformers") is None:
        raise CannotRun("needs xformers")
    base = bench.bases[0]
    unet, call = bench.unet(base, torch.float16), bench.inputs(base, 2, torch.float16)
    try:
        for kind in ("res, prefix and prompt", "res, attention", "lora", "skip"):
            with attached(unet, bench.tuner(unet, KINDS[kind], std=_STD), call):
                unet.set_attn_processor(AttnProcessor2_0())
                expected = output(unet, call)
                unet.set_attn_processor(XFormersAttnProcessor())
                yield at_most(kind, difference(output(unet, call), expected), _LIMITS["fp16"])
    finally:
        unet.set_attn_processor(AttnProcessor2_0())


CHECKS = (
    Check("A new tuner changes nothing, and a detached one leaves nothing", fresh_tuners),
    Check("MiB left allocated by a detached tuner", memory_comes_back, needs_cuda=True),
    Check("fp32 differs from the CPU by", fp32_against_the_cpu, needs_cuda=True),
    Check("Half precision differs from fp32 on the CPU by", half_against_the_cpu),
    Check("A row of a mixed batch differs from the image alone by", mixed_batch),
    Check("A pass with a tuner never waits for the device", no_waiting, needs_cuda=True),
    Check("Offloaded weights change the latents by", offloading, needs_cuda=True),
    Check("A swap allocates nothing", swapping),
    Check("xformers differs from SDPA by", xformers, needs_cuda=True),
)
