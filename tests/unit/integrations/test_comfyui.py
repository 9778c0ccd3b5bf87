from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch

from restune_diffusion import BaseMismatchError, BypassConfig, RestuneError, SkipConfig, Tuner, attach, save_tuner

from ...conftest import ROOT, make_inputs, make_unet, randomize
from .comfy_stand_in import ModelPatcher

CONFIG = {"model_channels": 32, "channel_mult": (1, 2, 2, 3), "num_res_blocks": [2, 2, 2, 2], "context_dim": 32}


@pytest.fixture
def folder(tmp_path):
    for seed, (name, config) in enumerate(
        {"ink": SkipConfig(ratio=0.5), "water": SkipConfig(ratio=0.2, sites=("skip.3", "skip.1*"))}.items()
    ):
        tuner = Tuner.for_base(make_unet(), config)
        randomize(tuner, seed, std=0.2)
        save_tuner(tuner, tmp_path / f"{name}.safetensors")
    save_tuner(Tuner.for_base(make_unet(), BypassConfig()), tmp_path / "bypass.safetensors")
    return tmp_path


@pytest.fixture
def node(folder, monkeypatch):
    """The node, loaded in the way of ComfyUI's `custom_nodes` folders."""
    paths = types.ModuleType("folder_paths")
    paths.models_dir = str(folder.parent)
    paths.registered = []
    paths.add_model_folder_path = lambda name, path: paths.registered.append((name, path))
    paths.get_filename_list = lambda name: sorted(file.name for file in folder.glob("*.safetensors"))
    paths.get_full_path_or_raise = lambda name, file: str(folder / file)
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    for name in [name for name in sys.modules if name.startswith("integrations")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(ROOT))
    import integrations.comfyui as package

    assert paths.registered == [("restune", str(folder.parent / "restune"))]
    return package.NODE_CLASS_MAPPINGS["LoadRestuneTuner"]()


@pytest.fixture
def model(unet):
    return ModelPatcher(unet, CONFIG)


def attached(unet, folder, **weights):
    from restune_diffusion import load_tuner

    handles = [
        attach(unet, load_tuner(folder / f"{name}.safetensors"), name, weight) for name, weight in weights.items()
    ]
    with torch.no_grad():
        result = unet(*make_inputs()).sample
    for handle in handles:
        handle.detach()
    return result


def drawn(model, sigma=5.0):
    model.model_patches_to(torch.device("cpu"))
    model.model_patches_to(torch.float16)
    return model.forward(*make_inputs(), sigma)


def test_the_stand_in_runs_the_unet_as_diffusers_does(unet, model):
    with torch.no_grad():
        torch.testing.assert_close(drawn(model), unet(*make_inputs()).sample, rtol=0, atol=1e-5)


def test_a_tuner_acts_as_one_that_is_attached(unet, model, node, folder):
    (tuned,) = node.load(model, "ink.safetensors", 0.7, 0.0, 1.0)
    expected = attached(unet, folder, ink=0.7)
    assert (drawn(model) - expected).abs().max() > 0.05
    torch.testing.assert_close(drawn(tuned), expected, rtol=0, atol=1e-5)
    assert "patches" not in model.model_options["transformer_options"]


def test_several_tuners_add_up_in_any_order(unet, model, node, folder):
    expected = attached(unet, folder, ink=0.7, water=-0.5)
    for order in ([("ink", 0.7), ("water", -0.5)], [("water", -0.5), ("ink", 0.7)]):
        tuned = model
        for name, weight in order:
            (before, (tuned,)) = tuned, node.load(tuned, f"{name}.safetensors", weight, 0.0, 1.0)
        torch.testing.assert_close(drawn(tuned), expected, rtol=0, atol=1e-5)
        # The model between the two nodes may go elsewhere too, with the first tuner alone.
        (name, weight) = order[0]
        torch.testing.assert_close(drawn(before), attached(unet, folder, **{name: weight}), rtol=0, atol=1e-5)


def test_it_acts_between_the_chosen_steps(unet, model, node, folder):
    (tuned,) = node.load(model, "ink.safetensors", 1.0, 0.25, 0.75)
    plain, full = drawn(model), attached(unet, folder, ink=1.0)
    for sigma, expected in {9.0: plain, 7.6: plain, 7.5: full, 5.0: full, 2.5: full, 2.4: plain, 0.1: plain}.items():
        torch.testing.assert_close(drawn(tuned, sigma), expected, rtol=0, atol=1e-5)
    (late,) = node.load(model, "ink.safetensors", 1.0, 0.0, 0.5)
    torch.testing.assert_close(drawn(late, 14.6), full, rtol=0, atol=1e-5)


def test_weight_zero_computes_nothing(model, node, monkeypatch):
    (tuned,) = node.load(model, "ink.safetensors", 0.0, 0.0, 1.0)
    (patch,) = tuned.model_options["transformer_options"]["patches"]["output_block_patch"]
    monkeypatch.setattr(type(patch.tuners[0]), "residual", None)
    assert torch.equal(drawn(tuned), drawn(model))


def test_other_patches_stay_where_they_are(model, node):
    model.set_model_output_block_patch(lambda h, hsp, options: (h, hsp * 2))
    (one,) = node.load(model, "ink.safetensors", 1.0, 0.0, 1.0)
    one.set_model_output_block_patch(lambda h, hsp, options: (h, hsp - 1))
    (two,) = node.load(one, "water.safetensors", 1.0, 0.0, 1.0)
    patches = two.model_options["transformer_options"]["patches"]["output_block_patch"]
    assert [type(patch).__name__ for patch in patches] == ["function", "SkipPatch", "function"]
    assert len(patches[1].tuners) == 2


def test_copies_share_the_tuner(model, node):
    (tuned,) = node.load(model, "ink.safetensors", 1.0, 0.0, 1.0)
    patches = [
        one.model_options["transformer_options"]["patches"]["output_block_patch"] for one in (tuned, tuned.clone())
    ]
    assert patches[0][0].tuners[0].tuner is patches[1][0].tuners[0].tuner


@pytest.mark.parametrize(("changes", "message"), [
    ({"channel_mult": (1, 2, 4, 4)}, "32, 32, 32, 32, 64.* but the model has"),
    ({"num_res_blocks": 1}, "but the model has"),
    ({"context_dim": 1024}, "text embeddings of width 32, but the model has 1024"),
    ({"model_channels": None}, "no U-Net with skip connections"),
])  # fmt: skip
def test_a_model_of_another_structure_is_refused(unet, node, changes, message):
    with pytest.raises(BaseMismatchError, match=message):
        node.load(ModelPatcher(unet, {**CONFIG, **changes}), "ink.safetensors", 1.0, 0.0, 1.0)


def test_other_parts_are_refused(model, node):
    with pytest.raises(RestuneError, match="single skip part; this one has bypass"):
        node.load(model, "bypass.safetensors", 1.0, 0.0, 1.0)


def test_the_inputs_are_what_comfyui_reads(node):
    inputs = node.INPUT_TYPES()["required"]
    assert list(inputs) == ["model", "tuner_name", "weight", "start_percent", "end_percent"]
    assert inputs["tuner_name"] == (["bypass.safetensors", "ink.safetensors", "water.safetensors"],)
    assert all(inputs[name][0] == "FLOAT" for name in ("weight", "start_percent", "end_percent"))


def test_the_node_needs_neither_diffusers_nor_transformers(folder):
    code = f"""
import sys, types
sys.modules["diffusers"] = sys.modules["transformers"] = None
paths = types.ModuleType("folder_paths")
paths.models_dir, paths.add_model_folder_path = "", lambda *a: None
paths.get_full_path_or_raise = lambda name, file: {str(folder / "ink.safetensors")!r}
sys.modules["folder_paths"] = paths
import integrations.comfyui
from restune_diffusion import load_tuner
print(load_tuner(paths.get_full_path_or_raise("", "")).num_parameters())
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
