"""Changes of the library's folder: nothing is lost, overwritten, or written elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from restune_diffusion import ResConfig, RestuneError, SkipConfig, Tuner, load_tuner, read_info, save_tuner
from restune_diffusion.conversion.bases import describe_checkpoint
from restune_diffusion.conversion.formats import export_tuner
from restune_diffusion.storage.base_files.location import BUNDLED_BASE
from restune_diffusion.studio.library.cards import cards_html, details_html
from restune_diffusion.studio.library.fit import problem_of
from restune_diffusion.studio.library.shelf import Shelf
from restune_diffusion.studio.workspace import Workspace

from ....conftest import make_unet, randomize

BASE = str(BUNDLED_BASE)


def make_tuner(config, info, seed=0) -> Tuner:
    tuner = Tuner(config if isinstance(config, tuple) else (config,), info)
    randomize(tuner, seed)
    return tuner


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    info = describe_checkpoint(BASE)
    save_tuner(make_tuner(SkipConfig(), info), folder / "ink.safetensors", training={"trigger_words": ["ink style"]})
    lora = make_tuner(ResConfig(self_attention="lora", cross_attention=None, feed_forward=None, width=2), info)
    save_tuner(lora, folder / "lora.safetensors")
    export_tuner(lora, folder / "kohya.safetensors", "kohya")
    export_tuner(lora, folder / "peft.safetensors", "diffusers")
    return folder


@pytest.fixture
def shelf(tmp_path) -> Shelf:
    workspace = Workspace(tmp_path / "home")
    workspace.create()
    return Shelf(workspace)


@pytest.fixture
def home(shelf, tmp_path) -> Path:
    return tmp_path / "home"


def names(shelf: Shelf) -> list[str]:
    return shelf.library.names()


def test_a_tuner_is_imported_found_renamed_deleted_and_restored(shelf, home, files):
    assert shelf.import_file(files / "ink.safetensors", BASE) == "ink"
    assert shelf.import_file(files / "ink.safetensors", BASE) == "ink-2"
    original = (files / "ink.safetensors").read_bytes()
    assert shelf.rename("ink-2", " styles/Tinte ") == "styles/Tinte"
    assert names(shelf) == ["ink", "styles/Tinte"]
    assert [entry.name for entry in shelf.entries("TINTE ink")] == ["styles/Tinte"]
    assert [entry.name for entry in shelf.entries("ink style skip")] == ["ink", "styles/Tinte"]
    deleted = shelf.delete("styles/Tinte")
    assert names(shelf) == ["ink"]
    assert [each.id for each in shelf.trash()] == [deleted.id]
    # The name is taken meanwhile.
    shelf.rename("ink", "styles/Tinte")
    assert shelf.restore(deleted.id) == "styles/Tinte-2"
    assert shelf.trash() == []
    assert list((home / "trash").iterdir()) == []
    assert (home / "tuners" / "styles" / "Tinte-2.safetensors").read_bytes() == original


def test_a_deleted_tuner_can_be_removed_for_good(shelf, home, files):
    shelf.import_file(files / "ink.safetensors", BASE)
    deleted = shelf.delete("ink")
    assert shelf.remove_for_good(deleted.id) == "ink"
    assert list((home / "trash").iterdir()) == []
    with pytest.raises(RestuneError, match="not in the trash"):
        shelf.restore(deleted.id)


@pytest.mark.parametrize(
    "name",
    [
        "../out",
        "/tmp/out",
        "a/../../out",
        ".hidden",
        "a//b",
        "",
        " ",
        "a/",
        "a\0b",
        "a\\b",
        "x" * 300,
        "ink.",
        "linked/x",
    ],
)
def test_no_name_leads_out_of_the_library_or_replaces_a_tuner(shelf, home, files, tmp_path, name):
    (home / "tuners" / "linked").symlink_to(tmp_path)
    shelf.import_file(files / "ink.safetensors", BASE)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RestuneError):
        shelf.rename("ink", name)
    with pytest.raises(RestuneError):
        shelf.rename(name, "other")
    with pytest.raises(RestuneError):
        shelf.delete(name)
    with pytest.raises(RestuneError):
        shelf.restore(name)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_taken_name_is_refused(shelf, files):
    shelf.import_file(files / "ink.safetensors", BASE)
    shelf.import_file(files / "lora.safetensors", BASE)
    with pytest.raises(RestuneError, match="already"):
        shelf.rename("lora", "ink")
    assert names(shelf) == ["ink", "lora"]


@pytest.mark.parametrize("file", ["kohya", "peft"])
def test_lora_files_are_converted_and_compute_the_same(shelf, home, files, file):
    name = shelf.import_file(files / f"{file}.safetensors", BASE)
    ours = load_tuner(files / "lora.safetensors").state_dict()
    imported = load_tuner(home / "tuners" / f"{name}.safetensors").state_dict()
    assert imported.keys() == ours.keys()
    assert all(torch.allclose(imported[key], ours[key], atol=1e-6) for key in ours)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_lora_is_exported_and_another_tuner_is_refused(shelf, files, tmp_path, layout):
    for file in ("ink", "lora"):
        shelf.import_file(files / f"{file}.safetensors", BASE)
    path = shelf.export("lora", layout, tmp_path)
    assert path.name == f"lora-{layout}.safetensors"
    assert shelf.import_file(path, BASE) == f"lora-{layout}"
    with pytest.raises(RestuneError, match="lora"):
        shelf.export("ink", layout, tmp_path)
    assert shelf.export("ink", "restune", tmp_path).read_bytes() == (files / "ink.safetensors").read_bytes()


def test_checkpoints_pickles_and_other_files_are_refused_with_a_sentence(shelf, tmp_path):
    refused = {
        "model.ckpt": (b"\x80\x02", "pickle"),
        "renamed.safetensors": (b"PK\x03\x04" + b"\0" * 40, "pickle"),
        "cut.safetensors": (b"\x20\0\0\0\0\0\0\0{", "damaged|truncated"),
        "notes.txt": (b"x", "ends in .safetensors"),
    }
    for name, (content, why) in refused.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RestuneError, match=why) as failure:
            shelf.import_file(tmp_path / name, BASE)
        assert str(tmp_path) not in str(failure.value)
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, tmp_path / "base.safetensors")
    with pytest.raises(RestuneError, match="--base"):
        shelf.import_file(tmp_path / "base.safetensors", BASE)
    assert names(shelf) == []


def test_a_tuner_of_a_run_comes_with_its_newest_sample(shelf, home, files):
    run = home / "runs" / "my-cat"
    for step, color in ((1, "red"), (20, "blue")):
        (run / "samples" / f"step-{step:06d}").mkdir(parents=True)
        Image.new("RGB", (64, 64), color).save(run / "samples" / f"step-{step:06d}" / "00.png")
    (run / "tuner.safetensors").write_bytes((files / "ink.safetensors").read_bytes())
    (home / "runs" / "my-cat" / "away.safetensors").symlink_to(files / "ink.safetensors")
    assert list(shelf.run_files()) == ["my-cat/tuner"]
    assert shelf.add_from_run("my-cat/tuner") == "my-cat"
    entry = shelf.library.entry("my-cat")
    assert (entry.title, entry.trigger_words) == ("my-cat", ("ink style",))
    assert entry.thumbnail is not None
    assert entry.thumbnail.startswith("data:image/webp;base64,")
    ours, added = load_tuner(files / "ink.safetensors").state_dict(), load_tuner(entry.path).state_dict()
    assert all(torch.equal(ours[key], added[key]) for key in ours)
    assert read_info(entry.path).training == read_info(files / "ink.safetensors").training
    for name in ("my-cat/away", "../x", "/etc/passwd"):
        with pytest.raises(RestuneError, match="No run"):
            shelf.add_from_run(name)


def test_cards_escape_the_text_of_files_and_tell_what_does_not_fit(shelf, home):
    other = Tuner.for_base(make_unet(), SkipConfig())
    evil = '"><img src=x onerror=alert(1)>'
    save_tuner(other, home / "tuners" / "other.safetensors", training={"trigger_words": [evil]},
               metadata={"modelspec.thumbnail": 'data:image/png;base64,"onerror="x'})  # fmt: skip
    entry = shelf.library.entry("other")
    problem = problem_of(entry, BASE)
    assert problem is not None
    assert "This tuner was made for a base with" in problem
    for html in (cards_html([entry], lambda _: problem, None), details_html(entry, problem)):
        assert "<img src=x" not in html
        assert '"onerror=' not in html
    assert "Cannot be used" in cards_html([entry], lambda _: problem, None)
