import pytest
import torch
from peft import LoraConfig

from restune_diffusion import (
    BypassConfig,
    ResConfig,
    RestuneError,
    SkipConfig,
    Tuner,
    TunerManager,
    TunerWeight,
    attach,
    schedule,
)
from restune_diffusion.hooks.mixing import Layout

from ...conftest import make_inputs
from .test_attachment import KINDS, run, trained


def test_a_tuner_of_one_site_is_left_where_all_others_have_factor_zero(unet, inputs):
    whole = trained(unet, SkipConfig(ratio=0.5))
    one = Tuner.for_base(unet, SkipConfig(ratio=0.5, sites=("skip.7",)))
    one.load_state_dict({key: value for key, value in whole.state_dict().items() if key.startswith("skip.skip.7.")})
    with attach(unet, one):
        expected = run(unet, inputs)
    with attach(unet, whole, weight={"*": 0.0, "skip.7": 1.0}):
        assert torch.equal(run(unet, inputs), expected)


def test_weights_by_site_reach_operations_and_their_linear_layers(unet, inputs):
    plain = run(unet, inputs)
    tuner = trained(unet, ResConfig(self_attention="lora", feed_forward="adapter", width=4))
    with attach(unet, tuner, weight={"*.ff": 0.0, "*.to_q": 0.0, "*.to_k": 0.0, "*.to_v": 0.0, "*.to_out.0": 0.0}):
        assert torch.equal(run(unet, inputs), plain)
        manager = TunerManager.of(unet)
        manager.set_weights({"default": {"*.ff": 0.0}})
        attention_only = run(unet, inputs)
        assert not torch.equal(attention_only, plain)
        with pytest.raises(RestuneError, match=r"`up\.9\.\*`; its sites are down\.0\.attn"):
            manager.set_weights({"default": {"up.9.*": 0.0}})
        assert torch.equal(run(unet, inputs), attention_only)


@KINDS
def test_a_schedule_acts_at_its_steps_alone(unet, inputs, config):
    latents, _, text = inputs
    with attach(unet, trained(unet, config), weight=TunerWeight(0.5, steps=schedule("0.2-0.6: 1"))):
        scheduled = {step: run(unet, (latents, step, text)) for step in (800, 799, 400, 399)}
        TunerManager.of(unet).set_weights({"default": 0.5})
        tuned = {step: run(unet, (latents, step, text)) for step in scheduled}
    for step, acts in {800: False, 799: True, 400: True, 399: False}.items():
        expected = tuned[step] if acts else run(unet, (latents, step, text))
        assert torch.equal(scheduled[step], expected), step


@KINDS
def test_one_half_of_guidance_alone(unet, config):
    inputs = make_inputs(batch=4)
    plain = run(unet, inputs)
    with attach(unet, trained(unet, config)):
        manager = TunerManager.of(unet)
        tuned = run(unet, inputs)
        manager.layout = Layout(2, True, 2)
        manager.set_weights({"default": TunerWeight(on="cond")})
        cond = run(unet, inputs)
        manager.set_weights({"default": TunerWeight(on="uncond")})
        uncond = run(unet, inputs)
    torch.testing.assert_close(cond, torch.cat([plain[:2], tuned[2:]]), rtol=0, atol=1e-5)
    torch.testing.assert_close(uncond, torch.cat([tuned[:2], plain[2:]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [SkipConfig(ratio=0.5), BypassConfig(ratio=0.25), ResConfig(self_attention="attention", block="adapter", width=4)],
    ids=["skip", "bypass", "res"],
)
@pytest.mark.parametrize("size", [16, 24])
def test_a_mask_bounds_where_a_tuner_acts(unet, config, size):
    inputs = make_inputs(size=size)
    plain = run(unet, inputs)
    with attach(unet, trained(unet, config)):
        tuned = run(unet, inputs)
        manager = TunerManager.of(unet)
        for mask, expected in {torch.zeros(5, 5): plain, torch.ones(2, 3, 3): tuned}.items():
            manager.set_weights({"default": TunerWeight(mask=mask)})
            assert torch.equal(run(unet, inputs), expected)
        manager.set_weights({"default": TunerWeight((1.0, 0.5), mask=torch.eye(8))})
        some = run(unet, inputs)
    assert not torch.equal(some, plain)
    assert not torch.equal(some, tuned)


def test_a_mask_has_no_meaning_on_text(unet, inputs):
    tuner = trained(unet, ResConfig(self_attention=None, feed_forward=None, cross_attention="lora", width=4))
    with (
        attach(unet, tuner, weight=TunerWeight(mask=torch.ones(4, 4))),
        pytest.raises(RestuneError, match="grid of tokens, but this site has 7 tokens"),
    ):
        run(unet, inputs)


def test_a_tuner_reads_the_base_frozen_beside_loras_of_both_kinds(unet, inputs):
    """Prompt tokens go through the base's projections; what other tuners add to these must not reach them."""
    prompt = trained(unet, ResConfig(self_attention="prompt", feed_forward=None, width=4), std=0.3)
    lora = trained(unet, ResConfig(self_attention="lora", feed_forward=None, width=4), seed=1)
    seen = []

    def keep(module, args, output):
        seen.append(output.clone())

    first = "res.down.0.attn.0.block.0.self.prompt"
    prompt.get_submodule(first).register_forward_hook(keep)
    attach(unet, prompt, "prompt")
    run(unet, inputs)
    attach(unet, lora, "lora")
    run(unet, inputs)
    assert torch.equal(seen[0], seen[1])
    # PEFT changes the layers themselves, and the identity of prompt tuning is about the layers as they are.
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_k"], init_lora_weights="gaussian"))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    run(unet, inputs)
    assert not torch.equal(seen[2], seen[1])
