"""A long random life of one base: whatever is loaded, mixed, swapped and deleted, nothing stays."""

import gc
import os
import random
import weakref
from collections import Counter

import psutil
import pytest
import torch
from peft import LoraConfig

from restune_diffusion import (
    BypassConfig,
    ControlConfig,
    ResConfig,
    RestuneError,
    RestuneStableDiffusionPipeline,
    SkipConfig,
    Tuner,
    TunerCache,
    TunerManager,
    TunerNameError,
    TunerWeight,
    save_tuner,
    schedule,
)

from ...conftest import TWO_LEVELS, make_unet, randomize
from ...unit.hooks.test_attachment import assert_same, everything

OPERATIONS = int(os.environ.get("RESTUNE_OPERATIONS", "500"))
"""1,000 passed too; CI takes fewer."""
NAMES = ("a", "b", "c", "d")
CONFIGS = {
    "skip": SkipConfig(ratio=0.25),
    "bypass": BypassConfig(ratio=0.25),
    "res": ResConfig(self_attention="lora", cross_attention="prompt", feed_forward="prefix", block="adapter", width=2),
    "control": ControlConfig(ratio=0.25),
}


class Life:
    """One pipeline, the tuners that should be on it, and everything that a user may do next."""

    def __init__(self, components, folder):
        width = components["text_encoder"].config.hidden_size
        unet = make_unet(**TWO_LEVELS, cross_attention_dim=width)
        self.pipe = RestuneStableDiffusionPipeline(**{**components, "unet": unet}, requires_safety_checker=False)
        self.pipe.set_progress_bar_config(disable=True)
        self.unet, self.random = unet, random.Random(0)
        self.generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(4, 4, 8, 8, generator=self.generator)
        self.text = torch.randn(4, 7, width, generator=self.generator)
        self.kinds: dict[str, str] = {}
        self.deleted: list[weakref.ref] = []
        self.done, self.empty = Counter(), 0
        self.cache = TunerCache(3)
        self.files = {kind: [folder / f"{kind}-{seed}.safetensors" for seed in range(2)] for kind in CONFIGS}
        for kind, paths in self.files.items():
            for seed, path in enumerate(paths):
                tuner = Tuner.for_base(unet, CONFIGS[kind])
                randomize(tuner, seed)
                save_tuner(tuner, path)
        # diffusers leaves an attribute behind after the first LoRA; that is not ours to count.
        self.lora()
        self.before, self.plain = everything(unet), self.output()

    def output(self):
        with torch.no_grad():
            return self.unet(self.latents, torch.tensor(500), self.text).sample

    def step(self):
        """Run one random action."""
        choices = {
            self.load: 20,
            self.swap: 12,
            self.mix: 20,
            self.forward: 20,
            self.switch: 6,
            self.delete: 14,
            self.mistake: 4,
            self.draw: 2,
            self.lora: 1,
            self.unload: 3,
        }
        chosen = self.random.choices(list(choices), list(choices.values()))[0]
        self.done[chosen.__name__] += 1
        chosen()
        assert self.pipe.get_list_tuners().keys() == self.kinds.keys()
        if not self.kinds:
            self.assert_as_before()

    def load(self):
        free = [name for name in NAMES if name not in self.kinds]
        if not free:
            return self.delete()
        name, kind = self.random.choice(free), self.random.choice(list(CONFIGS))
        cache = self.random.choice([None, self.cache])
        self.pipe.load_tuner_weights(self.random.choice(self.files[kind]), name, weight=self.weight(), cache=cache)
        self.kinds[name] = kind
        if kind == "control":
            TunerManager.of(self.unet).set_conditions(name, [torch.rand(1, 3, 64, 64, generator=self.generator)])

    def swap(self):
        if not self.kinds:
            return self.load()
        name = self.random.choice(list(self.kinds))
        cache = self.random.choice([None, self.cache])
        path = self.random.choice(self.files[self.kinds[name]])
        self.pipe.load_tuner_weights(path, name, hotswap=True, cache=cache)

    def weight(self):
        factor = self.random.uniform(-1, 1)
        mask = torch.rand(self.random.randint(1, 9), 5, generator=self.generator)
        return self.random.choice(
            [
                0.0,
                1.0,
                factor,
                [factor, 0.0],
                [0.0, 0.0, factor, 1.0],
                {"*": factor},
                schedule("0-0.3: 0, 0.3-1: 1"),
                schedule("0.2-0.6: 0>1"),
                TunerWeight(factor, mask=mask),
                TunerWeight((factor, 1.0), steps=schedule("0-1: 1>0"), mask=mask.expand(2, -1, -1)),
            ]
        )

    def mix(self):
        chosen = self.random.sample(list(self.kinds), self.random.randint(0, len(self.kinds)))
        self.pipe.set_tuners({name: self.weight() for name in chosen})

    def forward(self):
        step = torch.tensor(self.random.randrange(1000))
        if self.random.random() < 0.1:
            # A pass that fails half-way.
            with pytest.raises(RuntimeError), torch.no_grad():
                self.unet(self.latents, step, self.text[..., :-1])
        rows = self.random.choice([4, 4, 8])
        with torch.set_grad_enabled(self.random.random() < 0.1):
            out = self.unet(self.latents.repeat(rows // 4, 1, 1, 1), step, self.text.repeat(rows // 4, 1, 1)).sample
        assert torch.isfinite(out).all()

    def switch(self):
        self.pipe.disable_tuners()
        if self.random.random() < 0.3:
            assert torch.equal(self.output(), self.plain)
        self.pipe.enable_tuners()

    def delete(self):
        if self.kinds:
            self.forget(self.random.sample(list(self.kinds), self.random.randint(1, len(self.kinds))))

    def unload(self):
        self.forget(None)

    def forget(self, names):
        manager = TunerManager.of(self.unet)
        for name in names if names is not None else list(self.kinds):
            tuner = manager.tuner(name)
            self.deleted += [weakref.ref(thing) for thing in (tuner, *tuner.parameters())]
            del self.kinds[name]
        if names is None:
            self.pipe.unload_tuner_weights()
        else:
            self.pipe.delete_tuners(names)

    def mistake(self):
        """Run an invalid action; the state must not change."""
        kind = self.random.choice(list(CONFIGS))
        with pytest.raises(TunerNameError):
            self.pipe.set_tuners("nobody")
        with pytest.raises(TunerNameError):
            self.pipe.load_tuner_weights(self.files[kind][0], "nobody", hotswap=True)
        for name, loaded in self.kinds.items():
            with pytest.raises(RestuneError):
                self.pipe.load_tuner_weights(self.files[kind][0], name)
            if loaded != kind:
                with pytest.raises(RestuneError):
                    self.pipe.load_tuner_weights(self.files[kind][0], name, hotswap=True)

    def draw(self):
        """Draw two images with a mix of this call's own."""
        self.pipe(
            ["sun", "tree"],
            num_inference_steps=self.random.randint(1, 2),
            height=64,
            width=64,
            generator=self.generator,
            output_type="latent",
            tuners=[self.random.choice([None, *self.kinds]), dict.fromkeys(self.kinds, 0.5)],
        )

    def lora(self):
        """A LoRA comes and goes; the base's modules are wrapped meanwhile."""
        targets = ["to_q", "to_v"]
        self.unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "lora")
        self.forward()
        self.pipe.unload_lora_weights()

    def assert_as_before(self):
        self.empty += 1
        assert TunerManager.of(self.unet) is None
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in self.unet.modules())
        if self.empty % 5 == 0:
            gc.collect()
            assert torch.equal(self.output(), self.plain)
            assert_same(self.before, everything(self.unet))
            assert not any(reference() is not None for reference in self.deleted)
            self.deleted.clear()


def live_tensors():
    gc.collect()
    # By type: to ask an object for its class may run code of its own.
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def resident_bytes():
    return psutil.Process().memory_info().rss


def test_hundreds_of_random_operations_leave_nothing(components, tmp_path):
    life = Life(components, tmp_path)
    counts, sizes = [], []
    for _ in range(4):
        for _ in range(OPERATIONS // 4):
            life.step()
        life.unload()
        life.cache.clear()
        counts.append(live_tensors())
        sizes.append(resident_bytes())
    life.assert_as_before()
    gc.collect()
    assert torch.equal(life.output(), life.plain)
    assert_same(life.before, everything(life.unet))
    assert not any(reference() is not None for reference in life.deleted)
    # Everything was done, and the base was empty again and again.
    assert life.done.total() == OPERATIONS
    assert min(life.done.values()) > OPERATIONS // 300
    assert life.empty > OPERATIONS // 50
    # Caches of Python and torch are filled in the first quarter and must not grow after it.
    assert max(counts[1:]) <= counts[0]
    assert sizes[-1] - sizes[0] < 8 * 2**20
