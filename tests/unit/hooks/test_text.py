"""The text part in a pipeline: against PEFT, against Textual Inversion, and gone without a trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from transformers import CLIPTextConfig, CLIPTextModel

from restune_diffusion import (
    BaseMismatchError,
    RestuneError,
    RestuneStableDiffusionPipeline,
    RestuneStableDiffusionXLPipeline,
    SkipConfig,
    TextConfig,
    Tuner,
    attach,
    load_tuner,
    merge_lora,
    read_info,
    save_tuner,
    schedule,
    text_encoders,
)
from restune_diffusion.utils.errors import SettingsError

from ...conftest import randomize
from ...tiny_pipelines import KINDS_BY_NAME as KINDS
from ...tiny_pipelines import TEXT_WIDTH, difference, draw, identical, sd_components, sdxl_components

SD, SDXL = KINDS["StableDiffusionPipeline"], KINDS["StableDiffusionXLPipeline"]
PROMPT = "a <dog> at sea"
WORDS = TextConfig(tokens=("<dog>",), initializers=("dog",), rank=0)
LORA = TextConfig(rank=3, alpha=6.0)


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return sd_components()


@pytest.fixture(scope="module")
def xl_parts() -> dict[str, Any]:
    return sdxl_components()


@pytest.fixture
def pipe(parts: dict[str, Any]) -> Any:
    pipe: Any = SD.make(RestuneStableDiffusionPipeline, parts)
    yield pipe
    pipe.unload_tuner_weights()


@pytest.fixture
def xl(xl_parts: dict[str, Any]) -> Any:
    pipe: Any = SDXL.make(RestuneStableDiffusionXLPipeline, xl_parts)
    yield pipe
    pipe.unload_tuner_weights()


def acting(pipe: Any, *configs: Any, seed: int = 0, std: float = 0.3) -> Tuner:
    """A tuner of these parts that acts."""
    tuner = Tuner.for_pipeline(pipe, *configs)
    randomize(tuner, seed, std)
    return tuner


def states(pipe: Any, prompt: Any = PROMPT) -> torch.Tensor:
    with torch.no_grad():
        encoded: torch.Tensor = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1,
                                                   do_classifier_free_guidance=False)[0]  # fmt: skip
    return encoded


def fingerprint(pipe: Any) -> tuple[Any, ...]:
    """All of the text encoders and tokenizers that a tuner could have touched."""
    seen: list[Any] = []
    for encoder in text_encoders(pipe).values():
        # transformers installs hooks of its own, to return hidden states.
        hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in encoder.module.modules()]
        tensors = {name: tensor.clone() for name, tensor in encoder.module.state_dict().items()}
        attributes = {name: set(vars(module)) for name, module in encoder.module.named_modules()}
        backend = encoder.tokenizer._tokenizer.to_str()
        seen.append((id(encoder.tokenizer), len(encoder.tokenizer), backend, hooks, tensors, attributes))
    return (set(vars(pipe)), *seen)


def assert_same_fingerprint(one: tuple[Any, ...], two: tuple[Any, ...]) -> None:
    assert one[0] == two[0]
    for before, after in zip(one[1:], two[1:], strict=True):
        assert before[:4] == after[:4]
        assert before[5] == after[5]
        assert before[4].keys() == after[4].keys()
        assert all(torch.equal(before[4][name], after[4][name]) for name in before[4])


def test_lora_equals_peft_on_the_same_weights(pipe: Any) -> None:
    tuner = acting(pipe, LORA, std=0.2)
    model = copy.deepcopy(pipe.text_encoder)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    peft = get_peft_model(model, LoraConfig(r=3, lora_alpha=6.0, target_modules=targets))
    for name, module in peft.named_modules():
        if hasattr(module, "lora_A"):
            site = name[name.index("layers.") :]
            for matrix, ours in (("lora_A", "down"), ("lora_B", "up")):
                value = tuner.get_parameter(f"text.text_encoder.{site}.lora.{ours}.weight")
                getattr(module, matrix)["default"].weight.data.copy_(value)
    ids = pipe.tokenizer("a boat at sea", return_tensors="pt").input_ids
    with torch.no_grad():
        plain, expected = pipe.text_encoder(ids), peft(input_ids=ids)
        with attach(pipe.unet, tuner, text=text_encoders(pipe)):
            ours_out = pipe.text_encoder(ids)
    for key in ("last_hidden_state", "pooler_output"):
        assert (expected[key] - plain[key]).abs().max() > 0.1
        assert (ours_out[key] - expected[key]).abs().max() < 2e-6
    assert torch.equal(pipe.text_encoder(ids).last_hidden_state, plain.last_hidden_state)


@pytest.mark.parametrize("vectors", [1, 3])
def test_words_equal_textual_inversion(pipe: Any, vectors: int) -> None:
    tuner = acting(pipe, WORDS.model_copy(update={"vectors_per_token": vectors}))
    peer: Any = SD.make(StableDiffusionPipeline, sd_components())
    assert identical(draw(peer, SD), draw(pipe, SD)), "two pipelines of the same weights"
    peer.load_textual_inversion(tuner.state_dict()["text.text_encoder.token.0"].clone(), token="<dog>")
    pipe.load_tuner_weights(tuner)
    case = "<DOG>" if vectors == 1 else PROMPT  # diffusers writes out several vectors in the exact case alone
    for prompt in (PROMPT, case, "x<dog>y, <dog><dog> z", "nothing new", "<dog> " * 80):
        assert torch.equal(states(pipe, prompt), states(peer, prompt)), prompt
    changes = {"prompt": PROMPT, "negative_prompt": "no <dog>"}
    assert identical(draw(pipe, SD, **changes), draw(peer, SD, **changes))
    assert not identical(draw(pipe, SD, prompt=PROMPT), draw(pipe, SD, prompt="a cat at sea"))


def test_words_start_as_the_mean_of_their_initializers(pipe: Any) -> None:
    config = TextConfig(tokens=("<one>", "<two>"), initializers=("a b", ""), rank=0, vectors_per_token=2)
    state = Tuner.for_pipeline(pipe, config, generator=torch.Generator().manual_seed(1)).state_dict()
    ids = pipe.tokenizer.convert_tokens_to_ids(["a</w>", "b</w>"])
    mean = pipe.text_encoder.get_input_embeddings().weight[ids].mean(0)
    assert torch.allclose(state["text.text_encoder.token.0"], mean.expand(2, -1))
    random = state["text.text_encoder.token.1"]
    assert 0.005 < random.std() < 0.04
    again = Tuner.for_pipeline(pipe, config, generator=torch.Generator().manual_seed(1)).state_dict()
    assert torch.equal(random, again["text.text_encoder.token.1"])


def test_a_fresh_tuner_changes_nothing_and_a_fresh_word_reads_as_its_initializer(pipe: Any) -> None:
    before, known = draw(pipe, SD), draw(pipe, SD, prompt="a d at sea")
    config = TextConfig(tokens=("<dog>",), initializers=("d",), rank=4)
    pipe.load_tuner_weights(Tuner.for_pipeline(pipe, config, SkipConfig(ratio=0.5)), "dog")
    assert identical(draw(pipe, SD), before)
    assert identical(draw(pipe, SD, prompt=PROMPT), known)


def test_nothing_is_left_behind(pipe: Any, xl: Any) -> None:
    config = TextConfig(tokens=("<dog>", "sks"), rank=2, vectors_per_token=2)
    for each, kind in ((pipe, SD), (xl, SDXL)):
        drawn = draw(each, kind, prompt=PROMPT)
        before = fingerprint(each)
        each.load_tuner_weights(acting(each, config, SkipConfig(ratio=0.5)), "one")
        each.load_tuner_weights(acting(each, LORA, seed=1), "two")
        assert not identical(draw(each, kind, prompt=PROMPT), drawn)
        each.delete_tuners("one")
        with_two = draw(each, kind, prompt=PROMPT)
        assert not identical(with_two, drawn)
        each.disable_tuners()
        assert identical(draw(each, kind, prompt=PROMPT), drawn)
        each.enable_tuners()
        assert identical(draw(each, kind, prompt=PROMPT), with_two)
        each.unload_tuner_weights()
        assert_same_fingerprint(before, fingerprint(each))
        assert identical(draw(each, kind, prompt=PROMPT), drawn)


def test_an_error_while_encoding_leaves_the_tokenizer(pipe: Any) -> None:
    pipe.load_tuner_weights(acting(pipe, WORDS))
    tokenizer = pipe.tokenizer
    with pytest.raises(TypeError):
        draw(pipe, SD, prompt=PROMPT, negative_prompt=["a"])
    assert pipe.tokenizer is tokenizer
    assert "_placeholder_tokens" not in vars(pipe)


def test_the_weight_scales_lora_and_decides_whether_words_are_known(pipe: Any) -> None:
    tuner = acting(pipe, TextConfig(tokens=("<dog>",), rank=2))
    plain = states(pipe)
    pipe.load_tuner_weights(tuner, "dog", weight=0.0)
    assert torch.equal(states(pipe), plain)
    pipe.set_tuners("dog", 0.5)
    half = states(pipe)
    with torch.no_grad():
        for name, parameter in tuner.named_parameters():
            if name.endswith("up.weight"):
                parameter.mul_(0.5)
    pipe.set_tuners("dog", 1.0)
    assert torch.allclose(states(pipe), half, atol=1e-6)
    pipe.set_tuners({"dog": schedule("0-0.3: 0, 0.3-1: 1")})
    assert torch.allclose(states(pipe), half, atol=1e-6), "a schedule is for the steps, the text is before them"


@pytest.mark.parametrize("kind", [SD, SDXL], ids=["sd", "sdxl"])
def test_tuners_for_each_prompt_equal_one_at_a_time(pipe: Any, xl: Any, kind: Any) -> None:
    each = pipe if kind is SD else xl
    each.load_tuner_weights(acting(each, TextConfig(tokens=("<dog>",), rank=2), SkipConfig(ratio=0.5)), "one")
    each.load_tuner_weights(acting(each, TextConfig(tokens=("<dog>",), rank=2), seed=1), "two")
    mixes: list[Any] = ["one", None, {"two": 0.7}]
    batch = draw(each, kind, 3, prompt=[PROMPT] * 3, negative_prompt=["a <dog>"] * 3, tuners=mixes)
    for number, mix in enumerate(mixes):
        alone = draw(each, kind, prompt=[PROMPT], negative_prompt=["a <dog>"], tuners=[mix],
                     generator=torch.Generator().manual_seed(number))  # fmt: skip
        assert difference(batch[number : number + 1], alone) < 1e-4
    assert difference(batch[:1], batch[1:2]) > 1e-2
    two_each = {"num_images_per_prompt": 2, "generator": torch.Generator().manual_seed(0)}
    draw(each, kind, 2, prompt=[PROMPT] * 2, tuners=["one", "two"], **two_each)
    each.set_tuners({"one": (1.0, 0.0)})
    with pytest.raises(RestuneError, match="'one' has a `text` part, and the images of one prompt share its text"):
        draw(each, kind, prompt=PROMPT, **two_each)


def test_two_tuners_with_one_word_are_refused_on_one_prompt(pipe: Any) -> None:
    pipe.load_tuner_weights(acting(pipe, WORDS), "one")
    pipe.load_tuner_weights(acting(pipe, WORDS, seed=1), "two")
    with pytest.raises(RestuneError, match="'one' and 'two' both have the placeholder token <dog>"):
        states(pipe)
    states(pipe, "a cat")
    pipe.set_tuners("two")
    states(pipe)


def test_words_are_whole(pipe: Any) -> None:
    plain = states(pipe, "he asks")
    pipe.load_tuner_weights(acting(pipe, TextConfig(tokens=("sks", "sks2"), rank=0)))
    assert torch.equal(states(pipe, "he asks"), plain)
    assert not torch.equal(states(pipe, "he sks"), states(pipe, "he sks2"))
    states(pipe, "a \u017fk\u017f")  # an old form of s, which is none in lower case


def test_branches_share_the_text(pipe: Any) -> None:
    pipe.load_tuner_weights(acting(pipe, LORA), "lora")
    pipe.load_tuner_weights(acting(pipe, SkipConfig(ratio=0.5)), "skip")
    with pytest.raises(RestuneError, match="'lora' has a `text` part, and all branches of a prompt share its text"):
        pipe.branches("a fox", ["lora", None], num_inference_steps=2)
    draws = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    mixes = [{"lora": 1.0, "skip": 1.0}, "lora"]
    assert len(pipe.branches("a fox", mixes, 1, trunk="lora", **draws).images) == 2


def test_it_goes_beside_textual_inversion_and_lora(parts: dict[str, Any]) -> None:
    pipe: Any = SD.make(RestuneStableDiffusionPipeline, sd_components())
    pipe.load_textual_inversion(torch.full((2, TEXT_WIDTH), 0.1), token="<cat>")
    pipe.load_tuner_weights(acting(pipe, TextConfig(tokens=("<dog>",), rank=2)), "dog")
    both = states(pipe, "<cat> <dog>")
    assert not torch.equal(both, states(pipe, "x <dog>"))
    pipe.unload_textual_inversion()
    assert not torch.equal(states(pipe, "<cat> <dog>"), both)
    assert not torch.equal(states(pipe, "x <dog>"), states(pipe, "x y"))
    pipe.unload_tuner_weights()
    assert torch.equal(states(pipe, "<dog>"), states(SD.make(StableDiffusionPipeline, parts), "<dog>"))


def test_pipelines_that_share_an_encoder_hear_their_own_tuners(pipe: Any, parts: dict[str, Any]) -> None:
    other: Any = SD.make(RestuneStableDiffusionPipeline, {**parts, "unet": copy.deepcopy(parts["unet"])})
    plain = states(other)
    pipe.load_tuner_weights(acting(pipe, TextConfig(tokens=("<dog>",), rank=2)))
    assert torch.equal(states(other), plain)
    assert not torch.equal(states(pipe), plain)


def test_a_text_encoder_of_sdxl_finds_the_end_of_the_text(xl_parts: dict[str, Any]) -> None:
    """SDXL's configs have the end's id wrong, so that transformers looks for the largest id, which a new word has."""
    encoder = copy.deepcopy(xl_parts["text_encoder_2"])
    encoder.text_model.eos_token_id = 2
    pipe: Any = SDXL.make(RestuneStableDiffusionXLPipeline, {**xl_parts, "text_encoder_2": encoder})

    def pooled(prompt: str) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, device="cpu")[2]
        return out

    expected = pooled("a d at sea")
    fresh = Tuner.for_pipeline(pipe, TextConfig(tokens=("<dog>",), initializers=("d",), rank=0))
    pipe.load_tuner_weights(fresh)
    found = pooled(PROMPT)
    pipe.unload_tuner_weights()
    assert torch.equal(found, expected)


def test_it_is_saved_and_loaded(pipe: Any, xl: Any, tmp_path: Path) -> None:
    config = TextConfig(tokens=("<dog>",), rank=2, encoders=("text_encoder",))
    tuner = acting(xl, config, SkipConfig(ratio=0.5))
    xl.load_tuner_weights(tuner, "dog")
    drawn = draw(xl, SDXL, prompt=PROMPT)
    path = xl.save_tuner_weights(tmp_path, "dog")
    xl.unload_tuner_weights()
    xl.load_tuner_weights(path)
    assert identical(draw(xl, SDXL, prompt=PROMPT), drawn)
    info = read_info(path)
    assert list(info.base.text) == ["text_encoder"]
    assert info.base.text["text_encoder"].vocab_size == len(xl.tokenizer)
    assert info.metadata["modelspec.trigger_phrase"] == "<dog>"
    assert info.configs[0] == config
    assert "text.text_encoder.token.0" in load_tuner(path).state_dict()
    other = acting(xl, config, SkipConfig(ratio=0.5), seed=3)
    xl.load_tuner_weights(other, "dog", hotswap=True)
    assert not identical(draw(xl, SDXL, prompt=PROMPT), drawn)
    wider = acting(xl, config.model_copy(update={"rank": 3}), SkipConfig(ratio=0.5))
    with pytest.raises(RestuneError, match="`text` part has rank = 2, the new one's rank = 3"):
        xl.load_tuner_weights(wider, "dog", hotswap=True)
    save_tuner(acting(pipe, SkipConfig(ratio=0.5)), tmp_path / "skip.safetensors")
    assert '"text"' not in read_info(tmp_path / "skip.safetensors").metadata["restune.base"]


def test_another_encoder_is_refused_by_name(parts: dict[str, Any], pipe: Any, xl: Any) -> None:
    tuner = acting(pipe, WORDS)
    config = CLIPTextConfig.from_dict({**pipe.text_encoder.config.to_dict(), "num_hidden_layers": 3})
    deeper: Any = SD.make(RestuneStableDiffusionPipeline, {**parts, "text_encoder": CLIPTextModel(config)})
    fresh = fingerprint(deeper)
    with pytest.raises(BaseMismatchError, match=r"text_encoder with num_hidden_layers = 2, but this one has .* = 3"):
        deeper.load_tuner_weights(tuner)
    assert deeper.get_list_tuners() == {}
    assert_same_fingerprint(fresh, fingerprint(deeper))
    both = acting(xl, LORA)
    with pytest.raises(BaseMismatchError, match="acts on `text_encoder_2`, but the pipeline has no `text_encoder_2`"):
        attach(xl.unet, both, text={"text_encoder": text_encoders(xl)["text_encoder"]})
    with pytest.raises(RestuneError, match="load it with load_tuner_weights, or attach it with text="):
        attach(pipe.unet, tuner)
    compiled: Any = SD.make(RestuneStableDiffusionPipeline, {**parts, "text_encoder": CLIPTextModel(config)})
    deeper_tuner = Tuner.for_pipeline(compiled, LORA)
    compiled.text_encoder.compile()
    with pytest.raises(RestuneError, match="The text_encoder is already compiled; load the tuners first"):
        compiled.load_tuner_weights(deeper_tuner)
    with pytest.raises(RestuneError, match="Only lora can be merged"):
        merge_lora(pipe.unet, acting(pipe, LORA))
    with pytest.raises(RestuneError, match=r"Tuner\.for_pipeline"):
        Tuner.for_base(pipe.unet, WORDS)
    with pytest.raises(RestuneError, match="No text encoder matches `clip`; this base has text_encoder"):
        Tuner.for_pipeline(pipe, TextConfig(encoders=("clip",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "no tokens and the rank of LoRA is 0"),
        ({"tokens": ("<dog>", "<DOG>")}, "are not unique, ignoring case"),
        ({"tokens": ("a dog",)}, "tokens"),
        ({"tokens": ("<dog>",), "initializers": ("a", "b")}, "2 initializers for 1 tokens"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        TextConfig(**settings)


def test_gradients_reach_the_part_alone(pipe: Any) -> None:
    tuner = acting(pipe, TextConfig(tokens=("<dog>",), rank=2))
    with attach(pipe.unet, tuner, text=text_encoders(pipe)):
        pipe.encode_prompt(PROMPT, "cpu", 1, False)[0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in tuner.parameters())
    assert all(parameter.grad is None for parameter in pipe.text_encoder.parameters())
