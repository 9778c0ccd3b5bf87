from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from restune_diffusion import (
    BypassConfig,
    SkipConfig,
    Tuner,
    TunerFileError,
    attach,
    describe_base,
    load_tuner,
    save_tuner,
)
from restune_diffusion.conversion import describe_checkpoint, export_tuner, import_tuner

from ...conftest import TINY_BASE, make_inputs, make_unet, randomize
from .swift_files import READERS, swift_tensors, write_swift

ADAPTER = Path("default", "adapter_model.safetensors")


@pytest.fixture
def base(unet):
    return describe_base(unet)


def output(unet, tuner=None):
    with torch.no_grad():
        if tuner is None:
            return unet(*make_inputs()).sample
        with attach(unet, tuner):
            return unet(*make_inputs()).sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0.1, 0.33, 1.0])
def test_a_file_of_ms_swift_comes_back_bit_for_bit(base, tmp_path, dtype, ratio):
    tensors = swift_tensors(base, ratio, dtype)
    tuner = import_tuner(write_swift(tmp_path / "in", tensors), base)
    assert tuner.dtype == dtype
    save_tuner(tuner, tmp_path / "ours.safetensors")
    export_tuner(load_tuner(tmp_path / "ours.safetensors"), tmp_path / "out", "swift")
    back = load_file(tmp_path / "out" / ADAPTER)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) and back[key].dtype == dtype for key in tensors)


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.33, 0.51])
def test_a_tuner_of_ours_comes_back_bit_for_bit(unet, base, tmp_path, ratio):
    tuner = Tuner.for_base(unet, SkipConfig(ratio=ratio))
    randomize(tuner)
    export_tuner(tuner, tmp_path / "swift", "swift")
    settings = json.loads((tmp_path / "swift" / "default" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "swift" / ADAPTER)
    for module, channels in zip(settings["target_modules"], settings["dims"], strict=True):
        # ms-swift builds its modules by this rule, then loads the tensors into them
        assert tensors[f"{module}.scetuner_default.tuner_op.ln1.weight"].shape[0] == int(
            channels * settings["down_ratio"]
        )
    back = import_tuner(tmp_path / "swift", base)
    state = tuner.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in back.state_dict().items())
    assert back.state_dict().keys() == state.keys()


def test_every_tensor_lands_at_the_skip_that_its_module_reads(unet, base, tmp_path):
    tensors = swift_tensors(base)
    tuner = import_tuner(write_swift(tmp_path / "in", tensors), base)
    seen = []

    def check(module, args, number):
        skip = args[0][:, -tuner.base.sites[f"skip.{11 - number}"].channels :]
        seen.append((number, skip))

    handles = [
        unet.get_submodule(module).register_forward_pre_hook(lambda m, a, n=number: check(m, a, n))
        for number, module in enumerate(READERS)
    ]
    output(unet)
    before, seen = dict(seen), []
    with attach(unet, tuner), torch.no_grad():
        unet(*make_inputs())
    for handle in handles:
        handle.remove()
    # The first block that reads a skip has seen no other change yet: there the equation is exact.
    parts = {name: tensors[f"{READERS[0]}.scetuner_default.tuner_op.{name}"]
             for name in ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias")}  # fmt: skip
    x = before[0].permute(0, 2, 3, 1)
    expected = x + F.linear(
        F.gelu(F.linear(x, parts["ln1.weight"], parts["ln1.bias"])), parts["ln2.weight"], parts["ln2.bias"]
    )
    torch.testing.assert_close(dict(seen)[0].permute(0, 2, 3, 1), expected, rtol=1e-5, atol=1e-6)


def test_widths_that_no_ratio_gives_are_padded_with_zeros_and_act_the_same(base, tmp_path):
    tensors = swift_tensors(base, 0.5)
    narrow = "up_blocks.1.resnets.1.scetuner_default.tuner_op."
    for name in ("ln1.weight", "ln1.bias"):
        tensors[narrow + name] = tensors[narrow + name][:7].clone()
    tensors[narrow + "ln2.weight"] = tensors[narrow + "ln2.weight"][:, :7].clone()
    tuner = import_tuner(write_swift(tmp_path / "in", tensors), base)
    site = tuner.get_submodule("skip.skip.7")
    assert site.down.weight.shape[0] == 32
    x = torch.randn(1, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = F.linear(
        F.gelu(F.linear(x.permute(0, 2, 3, 1), tensors[narrow + "ln1.weight"], tensors[narrow + "ln1.bias"])),
        tensors[narrow + "ln2.weight"],
        tensors[narrow + "ln2.bias"],
    )
    torch.testing.assert_close(site(x).permute(0, 2, 3, 1), expected, rtol=0, atol=1e-6)
    # ms-swift builds all its modules by one ratio too, so its layout keeps the padding; ours comes back unchanged.
    export_tuner(tuner, tmp_path / "out", "swift")
    back = import_tuner(tmp_path / "out", base).state_dict()
    assert all(torch.equal(value, back[key]) for key, value in tuner.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_some_skips_alone(base, tmp_path, prefix):
    chosen = READERS[3:6]
    tensors = {prefix + key: value for key, value in swift_tensors(base).items() if key.startswith(tuple(chosen))}
    tuner = import_tuner(write_swift(tmp_path / "in", tensors), base)
    (config,) = tuner.configs
    assert config.sites == ("skip.6", "skip.7", "skip.8")


def test_lsc_identity_of_ms_swift_and_of_scepter(base, tmp_path):
    tensors = swift_tensors(base)
    expected = import_tuner(write_swift(tmp_path / "in", tensors), base).state_dict()
    renamed = swift_tensors(base, modules=[f"model.lsc_identity.{number}" for number in range(12)])
    in_swift = import_tuner(write_swift(tmp_path / "lsc", renamed, tuner_mode="identity"), base)
    save_file(
        {key.replace(".scetuner_default", ""): value for key, value in renamed.items()}, tmp_path / "s.safetensors"
    )
    for tuner in (in_swift, import_tuner(tmp_path / "s.safetensors", base)):
        assert all(torch.equal(value, expected[key]) for key, value in tuner.state_dict().items())


def test_what_is_no_skip_tuner_is_refused(base, tmp_path):
    names = ["conv_in", *READERS[1:]]
    with pytest.raises(TunerFileError, match="`conv_in` in encoder mode, which is not a skip connection"):
        import_tuner(write_swift(tmp_path / "a", swift_tensors(base, modules=names), tuner_mode="encoder"), base)
    with pytest.raises(TunerFileError, match="in encoder mode, which is not a skip connection"):
        import_tuner(write_swift(tmp_path / "b", swift_tensors(base), tuner_mode="encoder"), base)
    other = describe_base(make_unet(block_out_channels=(32, 32, 64, 64)))
    with pytest.raises(TunerFileError, match="is for another base: at skip"):
        import_tuner(write_swift(tmp_path / "c", swift_tensors(base)), other)
    tensors = swift_tensors(base)
    del tensors[f"{READERS[0]}.scetuner_default.tuner_op.ln2.bias"]
    with pytest.raises(TunerFileError, match=r"damaged: it has no `up_blocks.0.resnets.0.*ln2.bias`"):
        import_tuner(write_swift(tmp_path / "d", tensors), base)
    with pytest.raises(TunerFileError, match="also contains `odd`"):
        import_tuner(write_swift(tmp_path / "e", {**swift_tensors(base), "odd": torch.zeros(2)}), base)
    bypass = {"restuning_default.bypass_blocks.0.lateral_tuner.tuner.ln1.weight": torch.zeros(4, 4)}
    with pytest.raises(TunerFileError, match="Res-Tuning-Bypass of ms-swift"):
        import_tuner(write_swift(tmp_path / "f", bypass), base)
    save_file({"something.else": torch.zeros(2)}, tmp_path / "g.safetensors")
    with pytest.raises(TunerFileError, match=r"has an unknown layout; it contains `something\.else`"):
        import_tuner(tmp_path / "g.safetensors", base)
    save_file({"a.scetuner_x.tuner_op.ln1.bias": torch.tensor([1, 2])}, tmp_path / "h.safetensors")
    with pytest.raises(TunerFileError, match=r"as torch.int64; convert it to fp32"):
        import_tuner(tmp_path / "h.safetensors", base)


@pytest.mark.parametrize(
    ("setting", "value"), [("hint_modules", ["mid_block"]), ("tuner_op", "Other"), ("of_a_later_version", 1)]
)
def test_a_setting_that_changes_the_tuner_or_is_unknown_is_refused(base, tmp_path, setting, value):
    folder = write_swift(tmp_path / "in", swift_tensors(base, 0.5, torch.float32))
    settings = next(folder.rglob("adapter_config.json"))
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {setting: value}))
    with pytest.raises(TunerFileError, match=setting):
        import_tuner(folder, base)


def test_pickles_are_refused_unopened_with_the_way_to_convert_them(base, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.mkdir, (tmp_path / "exploded",)

    torch.save({"a": Bomb()}, tmp_path / "adapter_model.bin")
    (tmp_path / "plain.safetensors").write_bytes(pickle.dumps(Bomb(), protocol=4))
    for name in ("adapter_model.bin", "plain.safetensors"):
        with pytest.raises(TunerFileError, match=r"is a pickle.*torch\.load\('.*', weights_only=True\)"):
            import_tuner(tmp_path / name, base)
    assert not (tmp_path / "exploded").exists()


def test_only_skip_tuners_fit_the_layout(unet, tmp_path):
    with pytest.raises(TunerFileError, match="only represent skip tuners"):
        export_tuner(Tuner.for_base(unet, SkipConfig(), BypassConfig()), tmp_path, "swift")
    assert not any(tmp_path.iterdir())


def test_a_base_is_described_from_its_config_alone(components, tmp_path):
    described = describe_checkpoint(str(TINY_BASE))
    assert described.model_copy(update={"name": "", "text": {}}) == describe_base(components["unet"]).model_copy(
        update={"name": "", "text": {}}
    )
    assert described.name == "restune-tiny"
    assert describe_checkpoint(str(TINY_BASE / "unet")).sites == described.sites


@pytest.fixture
def swift():
    """ms-swift 4.6.0 itself; `pip install ms-swift` in an environment of its own, or see docs/interchange.md."""
    pytest.importorskip("swift.tuners.scetuning.scetuning", reason="ms-swift is not installed")
    from swift.tuners import Swift
    from swift.tuners.scetuning.scetuning import SCETuningConfig

    return Swift, SCETuningConfig


@pytest.fixture
def SCEAdapter(monkeypatch):
    """The adapter's class out of ms-swift's own file: the whole package asks for versions that collide with ours."""
    try:
        distribution = importlib.metadata.distribution("ms-swift")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("ms-swift is not installed; pip install --no-deps ms-swift==4.6.0 is enough here")
    path = distribution.locate_file("swift/tuners/scetuning/scetuning_components.py")
    # All that the file asks of the rest of the package is a logger.
    utilities = types.ModuleType("swift.utils")
    utilities.get_logger = logging.getLogger
    monkeypatch.setitem(sys.modules, "swift", types.ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.utils", utilities)
    spec = importlib.util.spec_from_file_location("scetuning_components", str(path))
    components = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(components)
    return components.SCEAdapter


def test_the_module_of_ms_swift_is_the_equation_and_ours(SCEAdapter):
    theirs = SCEAdapter(dim=24, adapter_length=10).double()
    randomize(theirs, std=0.5)
    x = torch.randn(2, 24, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = theirs.state_dict()
    rows = x.permute(0, 2, 3, 1)
    hidden = F.gelu(rows @ weights["ln1.weight"].T + weights["ln1.bias"])
    equation = x + (hidden @ weights["ln2.weight"].T + weights["ln2.bias"]).permute(0, 3, 1, 2)
    torch.testing.assert_close(theirs(x), equation, rtol=0, atol=1e-12)

    from restune_diffusion.tuners.skip import SkipTuner

    ours = SkipTuner(24, 10).double()
    names = {"down.weight": "ln1.weight", "down.bias": "ln1.bias", "up.weight": "ln2.weight", "up.bias": "ln2.bias"}
    ours.load_state_dict({name: weights[other] for name, other in names.items()})
    torch.testing.assert_close(x + ours(x), theirs(x), rtol=0, atol=1e-12)


def test_what_ms_swift_saved_acts_here_as_it_does_there(swift, tmp_path):
    Swift, SCETuningConfig = swift
    base = describe_base(make_unet())
    channels = [base.sites[f"skip.{11 - number}"].channels for number in range(12)]
    theirs = Swift.prepare_model(
        make_unet(), SCETuningConfig(dims=channels, target_modules=r"up_blocks\.\d+\.resnets\.\d+", down_ratio=0.4)
    )
    for name, parameter in theirs.named_parameters():
        if "scetuner" in name:
            torch.nn.init.normal_(parameter.data, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(str(tmp_path / "swift"))
    with torch.no_grad():
        expected = theirs(*make_inputs()).sample
    unet = make_unet()
    assert not torch.allclose(output(unet), expected, atol=1e-2)
    torch.testing.assert_close(output(unet, import_tuner(tmp_path / "swift", base)), expected, rtol=0, atol=1e-5)


def test_what_is_written_here_acts_in_ms_swift_as_it_does_here(swift, unet, tmp_path):
    Swift, _ = swift
    tuner = Tuner.for_base(unet, SkipConfig(ratio=0.3))
    randomize(tuner, std=0.2)
    expected = output(unet, tuner)
    export_tuner(tuner, tmp_path / "swift", "swift")
    theirs = Swift.from_pretrained(make_unet(), str(tmp_path / "swift"))
    with torch.no_grad():
        torch.testing.assert_close(theirs(*make_inputs()).sample, expected, rtol=0, atol=1e-5)
