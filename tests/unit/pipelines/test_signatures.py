"""`__call__` and `encode_prompt` show the parameters of diffusers' class, then ours, and pass them on as it would."""

from __future__ import annotations

import ast
import inspect
import pydoc
import textwrap
from typing import Any, get_type_hints

import pytest
import torch
from diffusers import AnimateDiffPipeline, StableDiffusionPipeline

from restune_diffusion import RestuneLoaderMixin, enable_restune
from restune_diffusion.pipelines.call_options import MixPerImage
from restune_diffusion.pipelines.control_images import TunerImage, TunerScale
from restune_diffusion.pipelines.enable import _enabled_class

from ...peers import lora
from ...tiny_pipelines import (
    KINDS,
    PAG_KINDS,
    PROMPTS,
    Kind,
    detach_all,
    difference,
    draw,
    identical,
    make_tuner,
    sd_components,
    sdxl_components,
)

OURS: dict[str, Any] = {
    "tuners": MixPerImage | None,
    "tuner_image": TunerImage | None,
    "tuner_conditioning_scale": TunerScale,
}
TEXT = {"prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds", "guidance_scale"}
SIZED = {"height", "width"}
# What diffusers' tests require of each task; its img2img tests take height and width off.
REQUIRED = {
    "": TEXT | SIZED,
    "Img2Img": TEXT | {"image", "strength"},
    "Inpaint": TEXT | SIZED | {"image", "mask_image", "strength"},
    "ControlNet": TEXT | SIZED | {"image", "controlnet_conditioning_scale"},
}
OPTIONAL = {
    "num_inference_steps",
    "num_images_per_prompt",
    "generator",
    "output_type",
    "return_dict",
    "cross_attention_kwargs",
    "clip_skip",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "ip_adapter_image",
    "ip_adapter_image_embeds",
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.removesuffix("Pipeline"))


def pairs() -> list[Any]:
    """Each class with tuners, and the class that it extends."""
    named = [pytest.param(kind.ours, kind.plain, id=kind.ours.__name__) for kind in KINDS]
    plain = [*(kind.plain for kind in [*KINDS, *PAG_KINDS]), AnimateDiffPipeline]
    return named + [pytest.param(_enabled_class(cls), cls, id=f"enabled-{cls.__name__}") for cls in plain]


EACH_PAIR = pytest.mark.parametrize(("ours", "plain"), pairs())


@pytest.fixture(scope="module")
def made():
    return {False: sd_components(), True: sdxl_components()}


@pytest.fixture
def components(made):
    yield made
    for parts in made.values():
        detach_all(parts["unet"])


@EACH_PAIR
def test_the_call_has_the_parameters_of_diffusers_and_then_ours(ours, plain):
    theirs = list(inspect.signature(plain.__call__).parameters.values())
    signature = inspect.signature(ours.__call__)
    shown = list(signature.parameters.values())
    rest = [parameter for parameter in theirs if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    own = shown[len(theirs) - len(rest) : len(shown) - len(rest)]
    assert shown == [*(parameter for parameter in theirs if parameter not in rest), *own, *rest]
    assert {parameter.name: parameter.annotation for parameter in own} == OURS
    assert {parameter.kind for parameter in own} == {inspect.Parameter.KEYWORD_ONLY}
    assert [parameter.default for parameter in own] == [None, None, 1.0]
    assert signature.return_annotation == inspect.signature(plain.__call__).return_annotation
    hints = get_type_hints(ours.__call__)
    assert {name: hints[name] for name in OURS} == OURS
    # The oldest diffusers annotates no return value.
    assert hints.get("return") == get_type_hints(plain.__call__).get("return")


@EACH_PAIR
def test_encoding_has_the_parameters_of_diffusers(ours, plain):
    assert inspect.signature(ours.encode_prompt) == inspect.signature(plain.encode_prompt)
    assert {"lora_scale", "clip_skip"} <= inspect.signature(ours.encode_prompt).parameters.keys()


@EACH_PAIR
def test_help_shows_both_docstrings(ours, plain):
    for method, words in (("__call__", "tuner_conditioning_scale: factor on"), ("encode_prompt", "`text` part")):
        shown = pydoc.plain(pydoc.render_doc(getattr(ours, method)))
        lines = {line.strip() for line in shown.splitlines()}
        assert {line.strip() for line in getattr(plain, method).__doc__.splitlines()} <= lines
        assert words in shown
        assert words not in getattr(plain, method).__doc__


@EACH_KIND
def test_what_diffusers_tests_look_up_is_found(kind, components):
    task = kind.name.removeprefix("StableDiffusion").removeprefix("XL").removesuffix("Pipeline")
    parts = components[kind.is_xl]
    for pipe in (kind.make(kind.ours, parts), enable_restune(kind.make(kind.plain, parts))):
        for call in (pipe.__call__, type(pipe).__call__):
            parameters = inspect.signature(call).parameters
            assert REQUIRED[task] | OPTIONAL <= parameters.keys()
            assert all(parameters[name].default is not inspect.Parameter.empty for name in OPTIONAL)
        assert "self" not in inspect.signature(pipe.__call__).parameters
        assert list(inspect.signature(pipe).parameters) == list(inspect.signature(pipe.__call__).parameters)
        assert type(pipe)._get_signature_keys(pipe) == kind.plain._get_signature_keys(kind.plain)


@EACH_KIND
def test_arguments_by_position_keep_their_order(kind, components):
    plain = kind.make(kind.plain, components[kind.is_xl])
    pipe = kind.make(kind.ours, components[kind.is_xl])
    given = {
        **kind.inputs(1),
        "prompt": PROMPTS[:1],
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "negative_prompt": ["blurry"],
        "output_type": "latent",
        "return_dict": False,
    }

    def drawn(called: Any, shown: Any) -> Any:
        parameters = [
            p for p in inspect.signature(shown.__call__).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        values = {**given, "generator": torch.Generator().manual_seed(0)}
        return called(*(values.get(p.name, p.default) for p in parameters))[0]

    expected = drawn(plain, plain)
    assert identical(drawn(pipe, plain), expected)
    pipe.load_tuner_weights(make_tuner(pipe.unet), "style")
    assert difference(drawn(pipe, pipe), expected) > 1e-2
    pipe.set_tuners({})
    assert identical(drawn(pipe, pipe), expected)


@EACH_KIND
def test_callbacks_get_the_tensors_that_they_ask_for(kind, components):
    plain = kind.make(kind.plain, components[kind.is_xl])
    pipe = kind.make(kind.ours, components[kind.is_xl])
    seen: list[set[str]] = []

    def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(set(tensors))
        return {}

    def clear(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else {}

    asked = [["latents"], list(plain._callback_tensor_inputs)]
    for names in asked:
        draw(pipe, kind, callback_on_step_end=note, callback_on_step_end_tensor_inputs=names)
    assert seen == [set(names) for names in asked for _ in range(2)]
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        draw(pipe, kind, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["unheard"])
    changed = draw(pipe, kind, callback_on_step_end=clear)
    assert changed.abs().max() == 0
    assert difference(draw(pipe, kind), changed) > 1e-2


@EACH_KIND
def test_the_scale_of_a_lora_reaches_the_pipeline(kind, components):
    plain = kind.make(kind.plain, components[kind.is_xl])
    pipe = kind.make(kind.ours, components[kind.is_xl])
    with lora(plain, kind):
        full, half = (draw(plain, kind, cross_attention_kwargs={"scale": scale}) for scale in (1.0, 0.5))
        assert identical(draw(pipe, kind, cross_attention_kwargs={"scale": 0.5}), half)
        assert identical(draw(pipe, kind), full)
        assert difference(half, full) > 1e-4


def test_a_class_of_ones_own_shows_what_it_takes():
    class Own(RestuneLoaderMixin, StableDiffusionPipeline):
        pass

    class Other(Own):
        def __call__(self, prompt: str) -> Any:
            return super().__call__(prompt)

    class Heir(Other):
        pass

    assert list(OURS) == [name for name in inspect.signature(Own.__call__).parameters if name.startswith("tuner")]
    assert list(inspect.signature(Heir.__call__).parameters) == ["self", "prompt"]
    assert Heir.__call__ is Other.__call__
    assert Heir.encode_prompt is Own.encode_prompt


def test_a_parameter_of_our_name_is_shown_once():
    class Theirs(StableDiffusionPipeline):
        def __call__(self, prompt: str, tuners: int = 0, *, quiet: bool = False) -> Any:
            raise NotImplementedError

    parameters = inspect.signature(_enabled_class(Theirs).__call__).parameters
    assert list(parameters) == ["self", "prompt", "quiet", *OURS]
    assert parameters["tuners"].annotation == OURS["tuners"]


@EACH_KIND
def test_editors_are_shown_the_class_that_is_extended(kind: Kind):
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind.ours)))
    declared = {
        node.name: ast.unparse(node.decorator_list[0]) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    }
    assert declared == {
        "__call__": f"call_with_tuners({kind.name}.__call__)",
        "encode_prompt": f"same_as({kind.name}.encode_prompt)",
    }
