"""The tuner library: names stay inside the folder, files of all origins are listed, changes are seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from restune_diffusion import RestuneError, SkipConfig, Tuner, TunerFileError, TunerNameError, save_tuner
from restune_diffusion.serving import TunerLibrary

from ...conftest import make_unet, randomize


@pytest.fixture
def folder(tuners: Path, tmp_path: Path) -> Path:
    """A library with subfolders, beside a file that must not be reachable."""
    library = tmp_path / "library"
    (library / "styles" / "new").mkdir(parents=True)
    shutil.copy(tuners / "skip.safetensors", library)
    shutil.copy(tuners / "words.safetensors", library / "styles" / "dog.safetensors")
    shutil.copy(tuners / "lora.safetensors", library / "styles" / "new" / "lora.safetensors")
    shutil.copy(tuners / "skip.safetensors", tmp_path / "secret.safetensors")
    return library


def test_entries_have_the_facts_of_the_header(base, folder, tuners):
    thumbnail = "data:image/png;base64,AAAA"
    shutil.copy(tuners / "control.safetensors", folder)
    tuner = Tuner.for_base(base.unet, SkipConfig())
    save_tuner(
        tuner,
        folder / "trained.safetensors",
        training={"trigger_words": ["sks", "style"]},
        metadata={"modelspec.thumbnail": thumbnail, "modelspec.title": "Trained"},
    )
    entries = {entry.name: entry for entry in TunerLibrary(folder).list()}
    assert list(entries) == ["control", "skip", "styles/dog", "styles/new/lora", "trained"]
    trained = entries["trained"]
    assert (trained.families, trained.trigger_words) == (("skip",), ("sks", "style"))
    assert (trained.title, trained.thumbnail) == ("Trained", thumbnail)
    assert trained.bytes == (folder / "trained.safetensors").stat().st_size
    assert entries["styles/dog"].trigger_words == ("<dog>",)
    assert entries["styles/new/lora"].families == ("lora",)
    assert entries["control"].conditions == ("condition",)
    assert not any(entry.problem for entry in entries.values())


@pytest.mark.parametrize(
    "name",
    ["../secret", "styles/../../secret", "/etc/passwd", "", ".", "styles/", "/skip", "styles//dog", "skip.safetensors",
     "sk\0ip", "styles\\dog", "link", "linked/secret", "x" * 5000, "\ud800", None, 3],
)  # fmt: skip
def test_nothing_outside_the_folder_can_be_named(folder, name):
    (folder / "link.safetensors").symlink_to(folder.parent / "secret.safetensors")
    (folder / "linked").symlink_to(folder.parent)
    (folder / ".hidden.safetensors").write_bytes(b"")
    library = TunerLibrary(folder)
    with pytest.raises(TunerNameError, match="The library has no tuner"):
        library.entry(name)
    assert library.names() == ["skip", "styles/dog", "styles/new/lora"]


def test_a_link_inside_the_folder_is_a_tuner(folder):
    (folder / "alias.safetensors").symlink_to(folder / "skip.safetensors")
    assert TunerLibrary(folder).entry("alias").families == ("skip",)


def test_broken_files_are_listed_with_the_reason(base, folder):
    (folder / "damaged.safetensors").write_bytes(b"\0" * 50)
    (folder / "pickle.safetensors").write_bytes(b"PK\3\4" + b"\0" * 100)
    save_file({"weight": torch.ones(2)}, folder / "other.safetensors")
    wide = Tuner.for_base(make_unet(block_out_channels=(32, 32, 64, 64)), SkipConfig())
    save_tuner(wide, folder / "wide.safetensors")
    tensors = load_file(folder / "styles" / "new" / "lora.safetensors")
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    save_file({**tensors, key: torch.full_like(tensors[key], float("nan"))}, folder / "nan.safetensors")
    library = TunerLibrary(folder)
    library.bind(base)
    problems = {entry.name: entry.problem for entry in library.list() if entry.problem}
    assert problems.keys() == {"damaged", "pickle", "other", "wide"}
    assert "pickles can run code" in problems["pickle"]
    assert "neither a tuner nor a LoRA" in problems["other"]
    assert "made for a base with" in problems["wide"]
    assert not any(str(folder) in problem for problem in problems.values())
    # What only the tensors show is known after the first attempt, and refused from then on.
    with pytest.raises(TunerFileError, match=r"'nan' cannot be used: .*contains NaN"):
        library.load("nan")
    assert library.entry("nan").problem is not None
    shutil.copy(folder / "skip.safetensors", folder / "nan.safetensors")
    assert library.load("nan")[0].families == ("skip",)


def test_new_changed_and_removed_files_are_seen(base, folder):
    library = TunerLibrary(folder)
    library.bind(base)
    entry, tuner = library.load("skip")
    assert library.load("skip") == (entry, tuner)
    changed = Tuner.for_base(base.unet, SkipConfig(ratio=0.25))
    randomize(changed, 5)
    save_tuner(changed, folder / "skip.safetensors")
    newer, loaded = library.load("skip")
    assert newer.version != entry.version
    assert torch.equal(next(loaded.parameters()), next(changed.parameters()))
    shutil.copy(folder / "skip.safetensors", folder / "second.safetensors")
    assert "second" in library.names()
    os.remove(folder / "second.safetensors")
    with pytest.raises(TunerNameError):
        library.load("second")
    assert "second" not in [entry.name for entry in library.list()]


def test_a_library_serves_one_base(base, folder):
    library = TunerLibrary(folder)
    library.bind(base)
    library.bind(base)
    other = type("Other", (), {"unet": make_unet(), "text_encoder": None, "tokenizer": None})()
    with pytest.raises(RestuneError, match="another base"):
        library.bind(other)
    with pytest.raises(TunerFileError, match="not a folder"):
        TunerLibrary(folder / "skip.safetensors")


def test_given_files_are_named_beside_the_folder_or_without_one(base, folder, tuners, tmp_path):
    given = {"artist/ink": tuners / "res.safetensors", "skip": tuners / "bypass.safetensors"}
    library = TunerLibrary(folder, files=given)
    assert library.names() == ["artist/ink", "skip", "styles/dog", "styles/new/lora"]
    assert library.entry("skip").families == ("bypass",)
    alone = TunerLibrary(None, files=given)
    alone.bind(base)
    assert [entry.name for entry in alone.list()] == ["artist/ink", "skip"]
    assert alone.load("artist/ink")[1].configs[0].part == "res"
    for name in ("styles/dog", "artist", "../secret"):
        with pytest.raises(TunerNameError, match="it has: artist/ink, skip"):
            alone.entry(name)


def test_a_loaded_tuner_does_not_depend_on_its_file(base, folder):
    library = TunerLibrary(folder)
    library.bind(base)
    loaded = [library.load(name)[1] for name in ("skip", "styles/new/lora")]
    if os.path.exists("/proc/self/maps"):
        assert str(folder.resolve()) not in Path("/proc/self/maps").read_text()
    before = [{name: tensor.clone() for name, tensor in tuner.state_dict().items()} for tuner in loaded]
    for path in folder.rglob("*.safetensors"):
        with path.open("r+b") as file:
            file.truncate(0)
    for tuner, kept in zip(loaded, before, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in tuner.state_dict().items())


def test_a_file_that_is_cut_short_while_it_is_read_is_refused_and_the_process_lives(base, folder):
    """In a process of its own, which SIGBUS would end; a thread empties and fills the files in place all the time."""
    program = """
import sys, threading
from pathlib import Path
from restune_diffusion import RestuneError
from restune_diffusion.serving import TunerLibrary
from tests.serving_base import small_pipeline

folder = Path(sys.argv[1])
files = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
stop = threading.Event()

def rewrite():
    while not stop.is_set():
        for path, content in files.items():
            path.write_bytes(b"")
            path.write_bytes(content)

library = TunerLibrary(folder)
library.bind(small_pipeline())
writer = threading.Thread(target=rewrite)
writer.start()
loaded = refused = 0
for number in range(30):
    library.list()
    try:
        library.load(("skip", "styles/new/lora")[number % 2])
        loaded += 1
    except RestuneError:
        refused += 1
stop.set()
writer.join()
print(loaded, refused)
"""
    root = Path(__file__).parents[3]
    ended = subprocess.run([sys.executable, "-c", program, str(folder)], cwd=root, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert sum(map(int, ended.stdout.split())) == 30
    library = TunerLibrary(folder)
    library.bind(base)
    assert library.load("skip")[1].configs[0].part == "skip"
