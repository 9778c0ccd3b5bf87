import contextlib
import gc
import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from restune_diffusion import RestuneError, TunerFileError, attach, load_tuner, read_info
from restune_diffusion.cli.guard import run_guarded
from restune_diffusion.cli.inspect import InspectOptions
from restune_diffusion.tuners.configs import parts_from_json

from ...conftest import make_inputs
from .malformed import MUTATIONS, SEEDS, Mutant, big_mutants, make_seeds, mutants, tiny_text, tiny_unet
from .malformed_headers import CONTROL

MIB = 2**20
FILES = int(os.environ.get("RESTUNE_MALFORMED_FILES", "4000"))
"""10,000 passed too; CI takes fewer."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return make_seeds(tmp_path_factory.mktemp("seeds"))


def inspect(path, json_output=False):
    """Run `restune inspect` here; returns its exit code, output and errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_guarded(InspectOptions(file=path, json_output=json_output).run)
    return code, out.getvalue(), err.getvalue()


def rewritten(path, data):
    """Replace a file; a tuner that is still mapped from the old file keeps it."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def expect_of(data):
    """Return the metadata and tensors of a tuner file, parsed by a minimal reader."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    metadata = header.pop("__metadata__")
    tensors = {}
    for key, entry in header.items():
        start, stop = entry["data_offsets"]
        tensors[key] = torch.frombuffer(bytearray(body[start:stop]), dtype=DTYPES[entry["dtype"]])
        tensors[key] = tensors[key].reshape(entry["shape"])
    return metadata, tensors


def check_loaded(mutant: Mutant, tuner) -> None:
    metadata, expected = expect_of(mutant.data)
    state = tuner.state_dict()
    assert state.keys() == expected.keys()
    for key, value in state.items():
        assert value.isfinite().all()
        assert value.data_ptr() % value.element_size() == 0
        assert value.dtype == expected[key].dtype
        assert torch.equal(value, expected[key])
    assert tuner.configs == parts_from_json(metadata["restune.config"])
    # A tuner keeps the sites that it needs.
    assert tuner.base.sites.keys() <= json.loads(metadata["restune.base"])["sites"].keys()
    assert tuner.metadata == metadata
    if mutant.outcome == "same":
        assert tuner.configs == mutant.seed.tuner.configs
        assert all(torch.equal(value, state[key]) for key, value in mutant.seed.tuner.state_dict().items())


def check(mutant: Mutant, path: Path):
    """Load and inspect one file; returns the tuner, or None if it is refused."""
    rewritten(path, mutant.data)
    try:
        tuner = load_tuner(path)
    except RestuneError as error:
        tuner, refusal = None, str(error)
        assert mutant.outcome != "same", refusal
        assert str(path) in refusal
        assert len(refusal) < 1000
        assert refusal.isprintable()
    else:
        assert mutant.outcome != "refused"
        check_loaded(mutant, tuner)
    code, out, err = inspect(path, json_output=mutant.number % 2 == 0)
    if code:
        # A file with an invalid header is also refused by loading.
        assert tuner is None
        assert not out
        assert err.startswith(f"restune: {path} ")
        assert err[:-1].isprintable()
    else:
        # `inspect` does not import torch, so it compares neither values nor the tensors with the config.
        unseen = ("NaN or infinity", "is damaged: its config", "has a config that does not fit its base")
        assert tuner is not None or any(reason in refusal for reason in unseen), refusal
        assert all(line.isprintable() for line in out.split("\n"))
        if mutant.number % 2 == 0:
            json.loads(out, parse_constant=pytest.fail)
    return tuner


class Memory:
    """Return the peak resident memory since the last reset, if the kernel reports it."""

    def __init__(self) -> None:
        self.known = os.access("/proc/self/clear_refs", os.W_OK)
        self.start = 0
        self.reset()

    def reset(self) -> None:
        if self.known:
            Path("/proc/self/clear_refs").write_text("5")
            self.start = self._read("VmRSS")

    def growth(self) -> int:
        return self._read("VmHWM") - self.start if self.known else 0

    @staticmethod
    def _read(field):
        return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.mark.timeout(600)
def test_thousands_of_malformed_files(seeds, tmp_path, request):
    unet, text, inputs = tiny_unet(), tiny_text(), make_inputs(size=8)
    path = tmp_path / "mutant.safetensors"
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in MUTATIONS}
    ran = 0
    warm = list(mutants(seeds, 200, seed=1))
    for mutant in warm:
        check(mutant, path)
    with attach(unet, seeds[0].tuner, text=text), torch.no_grad():
        unet(*inputs)
    # Python collects all garbage when it has grown by a quarter of what lives; what earlier tests left must not count.
    gc.collect()
    gc.freeze()
    request.addfinalizer(gc.unfreeze)
    gc.collect()
    memory = Memory()
    for mutant in mutants(seeds, FILES):
        try:
            tuner = check(mutant, path)
        except Exception as error:
            raise AssertionError(f"mutant {mutant.number}: {mutant.mutation} of {mutant.seed.name}") from error
        outcomes[mutant.mutation]["refused" if tuner is None else "loaded"] += 1
        if (
            tuner is not None
            and tuner.base == mutant.seed.tuner.base
            and mutant.number % 10 == 0
            and not hasattr(tuner, "control")
        ):
            # A loaded tuner also runs; a control part needs a condition first.
            with attach(unet, tuner, text=text), torch.no_grad():
                unet(*inputs)
            ran += 1
    assert memory.growth() < 64 * MIB
    assert sum(each.total() for each in outcomes.values()) == FILES
    # The mutations cover their targets: each one occurs many times, with refused and loaded files.
    assert min(each.total() for each in outcomes.values()) >= FILES // 200
    assert [name for name in MIXED if not outcomes[name]["refused"] or not outcomes[name]["loaded"]] == []
    assert ran >= FILES // 200


MIXED = (
    "flip_bits_anywhere",
    "flip_bits_of_the_header",
    "move_bytes",
    "change_inside_an_entry",
    "change_the_dtype_of_all",
    "exchange_entries",
    "change_patterns",
    "nest_deeply",
    "replace_an_entry",
)


def test_every_kind_of_part_is_fuzzed():
    from restune_diffusion.tuners import tuner_families

    kinds = {config.part for configs, _ in SEEDS.values() for config in configs}
    assert kinds == {family.name for family in tuner_families()}


@pytest.mark.timeout(300)
def test_large_malformed_files_take_little_memory(seeds, tmp_path):
    for mutant in big_mutants(seeds):
        memory = Memory()
        check(mutant, tmp_path / "big.safetensors")
        assert memory.growth() < 100 * MIB, mutant.mutation


UNDER_A_LIMIT = textwrap.dedent(
    """
    import re, resource, sys
    from pathlib import Path
    from restune_diffusion import RestuneError, load_tuner, read_info

    files = sorted(Path(sys.argv[1]).glob("*.safetensors"))
    load_tuner(files.pop(0))
    size = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[2]),) * 2)
    for file in files:
        for read in (load_tuner, read_info):
            try:
                read(file)
                print(file.name, "ok")
            except RestuneError:
                print(file.name, "refused")
    """
)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's process status")
def test_hostile_files_are_refused_where_memory_is_short(seeds, tmp_path):
    (tmp_path / "0.safetensors").write_bytes(seeds[0].data)
    hostile = [each for each in big_mutants(seeds) if each.outcome == "refused"]
    asking = (each for each in mutants(seeds, 2_000) if each.mutation == "ask_for_more_than_there_is")
    hostile += [each for each, _ in zip(asking, range(20), strict=False)]
    for number, mutant in enumerate(hostile):
        (tmp_path / f"1-{number:03d}.safetensors").write_bytes(mutant.data)
    command = [sys.executable, "-c", UNDER_A_LIMIT, str(tmp_path), str(256 * MIB)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 2 * len(hostile)
    assert all(line.endswith("refused") for line in lines)


def test_inspect_in_a_process_of_its_own(seeds, tmp_path):
    header, body = seeds[0].split()
    header["__metadata__"]["modelspec.title"] = f"a{CONTROL}é🦊"
    raw = json.dumps(header).encode()
    path = rewritten(tmp_path / "odd.safetensors", len(raw).to_bytes(8, "little") + raw + body)
    command = [sys.executable, "-c", "from restune_diffusion.cli import main; main()", "inspect"]
    # An ASCII-only terminal
    result = subprocess.run([*command, path], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0
    assert rb"title       a\x1b[2J\x1b]0;owned\x07\x9b31m\x7f\x00\r\n\u202e\u2028\xe9\U0001f98a" in result.stdout
    assert not re.search(rb"[^\n\x20-\x7e]", result.stdout)

    header["\x1b[31mred"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    raw = json.dumps(header).encode()
    rewritten(path, len(raw).to_bytes(8, "little") + raw + body)
    result = subprocess.run([*command, path], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == ""
    expected = f"{path} is damaged: its config has no tensor `\\x1b[31mred`; get the file again."
    assert result.stderr == f"restune: {expected}\n"


def test_paths_that_are_no_files(seeds, tmp_path):
    good = tmp_path / "good.safetensors"
    good.write_bytes(seeds[0].data)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "empty").write_bytes(b"")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        names = ("fifo", "loop", "dangling", "empty", "socket", "gone", "a\0b", "x" * 5000, "good.safetensors/x", ".")
        for path in (*(tmp_path / name for name in names), Path("/dev/zero"), Path("/dev/null"), Path("")):
            for read in (load_tuner, read_info):
                with pytest.raises(TunerFileError):
                    read(path)
            code, out, err = inspect(path)
            assert (code, out) == (1, "")
            assert len(err.splitlines()) == 1
            assert err[:-1].isprintable()
    (tmp_path / "link").symlink_to(good)
    assert load_tuner(tmp_path / "link").configs == seeds[0].tuner.configs


def test_names_in_metadata_never_become_paths(pipe, files, tmp_path):
    data = (files / "water.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    place = tmp_path / "here" / "inner"
    place.mkdir(parents=True)
    tricks = ("../../evil", str(tmp_path / "evil"), "..", "a\0b", "evil/")
    for number, text in enumerate(tricks):
        base = {**json.loads(header["__metadata__"]["restune.base"]), "name": text}
        training = {"config": {"base": text, "output": text, "name": text}, "steps": 1}
        titles = dict.fromkeys(("modelspec.title", "name", "modelspec.architecture", "restune.name", text), text)
        changes = {"restune.base": json.dumps(base), "restune.training": json.dumps(training)}
        raw = json.dumps({**header, "__metadata__": {**header["__metadata__"], **titles, **changes}}).encode()
        (place / f"tuner-{number}.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + body)
        pipe.load_tuner_weights(place / f"tuner-{number}.safetensors")
    names = [f"tuner-{number}" for number in range(len(tricks))]
    assert list(pipe.get_list_tuners()) == names
    for name in names:
        assert pipe.save_tuner_weights(place / "out", name) == place / "out" / f"{name}.safetensors"
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    inner = Path("here", "inner")
    assert written == {folder / f"{name}.safetensors" for name in names for folder in (inner, inner / "out")}


def test_values_beyond_the_range_of_the_dtype_asked_for(seeds, tmp_path):
    metadata, tensors = expect_of(seeds[0].data)
    tensors["skip.skip.1.up.bias"][0] = 1e6
    path = rewritten(tmp_path / "big.safetensors", save(tensors, metadata))
    with pytest.raises(
        TunerFileError, match=r"`skip\.skip\.1\.up\.bias` contains values beyond the range of torch.float16"
    ):
        load_tuner(path, dtype=torch.float16)
    assert math.isclose(
        load_tuner(path, dtype=torch.bfloat16).state_dict()["skip.skip.1.up.bias"][0], 1e6, rel_tol=0.01
    )
    # Sums of large values overflow, which does not make the values infinite.
    tensors["skip.skip.1.up.weight"][:] = 3e38
    path = rewritten(path, save(tensors, metadata))
    assert torch.equal(load_tuner(path).state_dict()["skip.skip.1.up.weight"], tensors["skip.skip.1.up.weight"])
