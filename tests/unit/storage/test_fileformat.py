import json
import os
import pickle
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from restune_diffusion import (
    BypassConfig,
    RestuneError,
    SkipConfig,
    Tuner,
    TunerFileError,
    attach,
    load_tuner,
    read_info,
    save_tuner,
)
from restune_diffusion.storage.header import MAX_HEADER_BYTES

from ...conftest import make_unet, randomize


@pytest.fixture
def tuner(unet):
    tuner = Tuner.for_base(unet, SkipConfig(ratio=0.5), BypassConfig(ratio=0.25))
    randomize(tuner)
    return tuner


@pytest.fixture
def path(tuner, tmp_path):
    save_tuner(tuner, tmp_path / "watercolor.safetensors", training={"steps": 12, "prompt": "watercolor"})
    return tmp_path / "watercolor.safetensors"


def assert_equal(one, two):
    one, two = one.state_dict(), two.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def rewrite_header(path, **changes):
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header, body = json.loads(file.read(size)), file.read()
    for key, value in changes.items():
        if value is None:
            del header["__metadata__"][f"restune.{key}"]
        else:
            header["__metadata__"][f"restune.{key}"] = value
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + body)


def test_round_trip_keeps_values_configs_and_output(unet, inputs, tuner, path):
    loaded = load_tuner(path)
    assert_equal(tuner, loaded)
    assert loaded.configs == tuner.configs
    assert loaded.base == tuner.base
    outputs = []
    for each in (tuner, loaded):
        with attach(unet, each), torch.no_grad():
            outputs.append(unet(*inputs).sample)
    assert torch.equal(*outputs)


def test_keys_read_part_site_module_param(path):
    keys = load_file(path).keys()
    assert {"skip.skip.0.down.weight", "skip.skip.11.up.bias", "bypass.skip.0.horizontal.mix.weight"} <= keys
    assert {"bypass.up.3.vertical.mix.weight", "bypass.gate.weight", "bypass.up.3.logit"} <= keys


def test_the_header_tells_what_the_file_is(tuner, path):
    info = read_info(path)
    assert info.training == {"steps": 12, "prompt": "watercolor"}
    assert info.configs == (SkipConfig(ratio=0.5), BypassConfig(ratio=0.25))
    assert info.num_parameters == tuner.num_parameters()
    assert info.bytes == path.stat().st_size
    assert info.base.structure["block_out_channels"] == [32, 64, 64, 96]
    assert info.metadata["modelspec.title"] == "watercolor"
    assert info.metadata["modelspec.architecture"] == "UNet2DConditionModel/restune-skip-bypass"


def test_unknown_metadata_survives_saving_again(tuner, tmp_path):
    save_tuner(tuner, tmp_path / "a.safetensors", metadata={"someone.else": "keep me"}, training={"steps": 3})
    save_tuner(load_tuner(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    info = read_info(tmp_path / "b.safetensors")
    assert info.metadata["someone.else"] == "keep me"
    assert info.training == {"steps": 3}


def test_a_file_can_be_read_in_another_dtype(tuner, path):
    assert load_tuner(path, dtype=torch.float16).dtype == torch.float16
    for key, value in load_tuner(path, dtype=torch.float16).state_dict().items():
        assert torch.equal(value, tuner.state_dict()[key].half())


def test_missing_file(tmp_path):
    with pytest.raises(TunerFileError, match="There is no tuner file at"):
        load_tuner(tmp_path / "none.safetensors")
    (tmp_path / "ink.safetensors").touch()
    with pytest.raises(TunerFileError, match=r"is a folder; give the .* in it, such as .*ink\.safetensors"):
        read_info(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 0.5, -1])
def test_truncated_file(path, keep):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(TunerFileError, match=r"(truncated|damaged).*get the file again"):
        load_tuner(path)
    with pytest.raises(TunerFileError, match=r"truncated|damaged"):
        read_info(path)


def test_a_pickle_is_never_opened(tuner, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    for name, write in {
        "torch": lambda path: torch.save({"a": Bomb()}, path),
        "pickle": lambda path: path.write_bytes(pickle.dumps(Bomb())),
    }.items():
        path = tmp_path / f"{name}.safetensors"
        write(path)
        with pytest.raises(TunerFileError, match="is a pickle"):
            load_tuner(path)
    assert not (tmp_path / "exploded").exists()


def test_foreign_safetensors(tmp_path):
    save_file({"lora_unet.down.weight": torch.zeros(2)}, tmp_path / "lora.safetensors", {"format": "pt"})
    with pytest.raises(TunerFileError, match="not a tuner of restune-diffusion; load a LoRA with load_lora_weights"):
        load_tuner(tmp_path / "lora.safetensors")


def test_newer_version(path):
    rewrite_header(path, format_version="2")
    with pytest.raises(
        TunerFileError, match=r"format version 2, but this version of restune-diffusion reads up to 1; upgrade"
    ):
        load_tuner(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": "one"},
        {"config": "[]"},
        {"config": "{"},
        {"config": '[{"part": "magic"}]'},
        {"config": '[{"part": "skip", "ratio": 1e9}]'},
        {"config": '[{"part": "skip", "colour": 1}]'},
        {"config": None},
        {"base": "{}"},
        {"base": None},
        {"training": "[1]"},
        {"training": "{"},
        {"config": '[{"part": "skip", "ratio": 0.25}, {"part": "bypass", "ratio": 0.25}]'},
        {"config": '[{"part": "skip", "ratio": 0.5, "sites": ["skip.77"]}]'},
        {"config": '[{"part": "skip", "ratio": 0.5}]'},
        {"config": "[" * 100_000},
    ],
    ids=str,
)
def test_damaged_headers_are_refused(path, changes):
    rewrite_header(path, **changes)
    for read in (load_tuner, read_info):
        with pytest.raises(TunerFileError) as error:
            read(path)
        assert str(path) in str(error.value)
        assert len(str(error.value)) < 500


def test_the_first_wrong_tensor_is_named(path):
    tensors = load_file(path)
    header = {**read_info(path).metadata}
    tensors["skip.skip.3.up.weight"] = tensors["skip.skip.3.up.weight"][:-1].clone()
    save_file(tensors, path, header)
    wrong = r"its config needs `skip.skip.3.up.weight` of shape \(32, 16\), but it contains shape \(31, 16\)"
    with pytest.raises(TunerFileError, match=wrong):
        load_tuner(path)
    tensors["skip.skip.3.up.weight"] = torch.zeros(32, 16, dtype=torch.int32)
    save_file(tensors, path, header)
    with pytest.raises(TunerFileError, match="dtype I32"):
        load_tuner(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_neither_saved_nor_loaded(tuner, path, value):
    before = path.read_bytes()
    with torch.no_grad():
        next(tuner.parameters())[0, 0] = value
    with pytest.raises(TunerFileError, match=r"`skip.skip.0.down.weight` contains NaN or infinity"):
        save_tuner(tuner, path)
    assert path.read_bytes() == before
    save_file(tuner.state_dict(), path, read_info(path).metadata)
    with pytest.raises(
        TunerFileError, match=r"was not loaded: `skip\.skip\.0\.down\.weight` contains NaN or infinity"
    ):
        load_tuner(path)


def test_a_tuner_for_another_base_is_refused_by_name_of_the_difference(path):
    other = make_unet(block_out_channels=(32, 64, 96, 96))
    with pytest.raises(RestuneError, match=r"block_out_channels = \[32, 64, 64, 96\].*\[32, 64, 96, 96\]"):
        attach(other, load_tuner(path))
    attach(make_unet(seed=7), load_tuner(path))


def test_full_disk_keeps_the_old_file(tuner, path):
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    randomize(tuner, seed=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        with pytest.raises(TunerFileError, match=r"Cannot write .*watercolor.safetensors: File too large; free space"):
            save_tuner(tuner, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [child.name for child in path.parent.iterdir()] == [path.name]
    save_tuner(tuner, path)
    assert_equal(tuner, load_tuner(path))


def test_a_folder_that_cannot_be_made(tuner, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TunerFileError, match="Cannot write"):
        save_tuner(tuner, tmp_path / "file" / "tuner.safetensors")


def test_saved_files_have_the_usual_permissions(path):
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_what_is_saved_with_the_longest_header_can_be_loaded(tuner, path):
    save_tuner(tuner, path, metadata={"note": ""})
    room = MAX_HEADER_BYTES - int.from_bytes(path.read_bytes()[:8], "little")
    saved = []
    for length in range(room - 72, room + 72, 8):
        try:
            save_tuner(tuner, path, metadata={"note": "x" * length})
        except TunerFileError:
            continue
        saved.append(length)
        assert_equal(load_tuner(path), tuner)
    assert saved == list(range(room - 72, saved[-1] + 8, 8))
    assert room - 72 < saved[-1] < room + 64


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of maps")
def test_loaded_tensors_are_mapped_privately(tuner, path):
    before = path.read_bytes()
    loaded = load_tuner(path)
    ranges = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    spans = [[int(end, 16) for end in each.split("-")] for each in ranges]
    length = int.from_bytes(before[:8], "little")
    places = {
        key: 8 + length + entry["data_offsets"][0]
        for key, entry in json.loads(before[8 : 8 + length]).items()
        if key != "__metadata__"
    }
    mapped = {key for key, value in loaded.state_dict().items() if any(a <= value.data_ptr() < b for a, b in spans)}
    assert mapped == {key for key, place in places.items() if place % 64 == 0}
    assert mapped
    # Elsewhere than torch puts them, matrix kernels of some CPUs round differently.
    assert not any(value.data_ptr() % 64 for value in loaded.parameters())
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert path.read_bytes() == before
    assert_equal(load_tuner(path), tuner)


def test_a_loaded_tuner_outlives_its_file(tuner, path):
    loaded = load_tuner(path)
    other = load_tuner(path)
    randomize(other, seed=1)
    save_tuner(other, path)
    assert_equal(loaded, tuner)
    assert_equal(load_tuner(path), other)
    path.unlink()
    assert_equal(loaded, tuner)


def test_what_could_not_be_loaded_is_not_saved(tuner, path):
    before = path.read_bytes()
    deep = json.loads("[" * 40 + "]" * 40)
    for changes in ({"training": {"a": deep}}, {"metadata": {"thumbnail": "x" * (9 << 20)}}):
        with pytest.raises(TunerFileError, match="The tuner was not saved to"):
            save_tuner(tuner, path, **changes)
    tuner.skip.half()
    save_tuner(tuner, path)
    assert_equal(load_tuner(path), tuner)
    assert read_info(path).dtype == "F16/F32"
    before = path.read_bytes()
    tuner.skip.get_submodule("skip.3.down").float()
    with pytest.raises(TunerFileError, match=r"`skip.skip.3.down.weight` has the dtype F32 in a part of dtype F16"):
        save_tuner(tuner, path)
    tuner.skip.to(torch.float8_e5m2)
    with pytest.raises(TunerFileError, match=r"`skip.skip.0.down.weight` has the dtype torch.float8_e5m2"):
        save_tuner(tuner, path)
    assert path.read_bytes() == before


def test_numbers_that_json_has_not_become_text(tuner, path):
    save_tuner(tuner, path, training={"loss": float("nan"), "clip": [float("inf")], "prompt": "\udcff"})
    assert read_info(path).training == {"loss": "NaN", "clip": ["Infinity"], "prompt": "\udcff"}
