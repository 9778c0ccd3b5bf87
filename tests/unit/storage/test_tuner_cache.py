import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from restune_diffusion import (
    RestuneError,
    SkipConfig,
    Tuner,
    TunerCache,
    TunerFileError,
    TunerManager,
    attach,
    save_tuner,
)
from restune_diffusion.storage import tuner_cache as module

from ...conftest import make_inputs, make_unet, randomize
from ..hooks.test_attachment import run
from ..pipelines.test_loaders import generate, same


@pytest.fixture
def folder(tmp_path):
    unet = make_unet()
    for seed, name in enumerate("abcd"):
        write(unet, tmp_path / f"{name}.safetensors", seed)
    return tmp_path


def write(unet, path, seed, ratio=0.25):
    tuner = Tuner.for_base(unet, SkipConfig(ratio=ratio))
    randomize(tuner, seed)
    save_tuner(tuner, path)
    return tuner


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that are read, in order."""
    names, load = [], module.load_tuner

    def counted(path, **options):
        names.append(path.stem)
        return load(path, **options)

    monkeypatch.setattr(module, "load_tuner", counted)
    return names


def values(tuner):
    return [parameter.clone() for parameter in tuner.parameters()]


def equal(one, two):
    return all(torch.equal(mine, other) for mine, other in zip(one, two, strict=True))


def test_the_least_recently_used_goes_first(folder, reads):
    cache = TunerCache(2)
    a = cache.get(folder / "a.safetensors")
    cache.get(folder / "b.safetensors")
    assert cache.get(str(folder / "a.safetensors")) is a
    cache.get(folder / "c.safetensors")
    assert reads == ["a", "b", "c"]
    assert folder / "a.safetensors" in cache
    assert folder / "b.safetensors" not in cache
    cache.get(folder / "a.safetensors")
    cache.get(folder / "b.safetensors")
    assert reads == ["a", "b", "c", "b"]
    assert len(cache) == 2
    cache.clear()
    assert len(cache) == cache.num_bytes == 0


def test_values_are_those_of_the_file_in_the_dtype_asked_for(folder):
    wanted = values(write(make_unet(), folder / "a.safetensors", 9))
    assert equal(values(TunerCache(1).get(folder / "a.safetensors")), wanted)
    half = TunerCache(1, dtype=torch.float16).get(folder / "a.safetensors")
    assert equal(values(half), [value.half() for value in wanted])
    assert half.device.type == "cpu"
    assert not any(parameter.requires_grad for parameter in half.parameters())


def test_bytes_are_counted_and_bound(folder):
    one = 4 * Tuner.for_base(make_unet(), SkipConfig(ratio=0.25)).num_parameters()
    cache = TunerCache(max_bytes=2 * one + one // 2)
    for count, name in enumerate("abc", start=1):
        cache.get(folder / f"{name}.safetensors")
        assert cache.num_bytes == min(count, 2) * one
    assert folder / "a.safetensors" not in cache
    half = TunerCache(max_bytes=2 * one + one // 2, dtype=torch.bfloat16)
    for name in "abcd":
        half.get(folder / f"{name}.safetensors")
    assert half.num_bytes == 2 * one
    assert len(half) == 4


def test_what_is_too_large_is_read_but_drives_nothing_out(folder, reads):
    one = 4 * Tuner.for_base(make_unet(), SkipConfig(ratio=0.25)).num_parameters()
    large = values(write(make_unet(), folder / "large.safetensors", 5, ratio=2.0))
    cache = TunerCache(max_bytes=2 * one)
    cache.get(folder / "a.safetensors")
    assert equal(values(cache.get(folder / "large.safetensors")), large)
    assert folder / "large.safetensors" not in cache
    assert cache.num_bytes == one
    cache.get(folder / "a.safetensors")
    assert reads == ["a", "large"]


def test_a_changed_file_is_read_again(folder, reads):
    path, cache = folder / "a.safetensors", TunerCache(4)
    old = cache.get(path)
    before, size = values(old), path.stat().st_size
    # The same size and another time; then the same time and another size.
    new = write(make_unet(), path, 30)
    os.utime(path, ns=(1, 1))
    assert path.stat().st_size == size
    assert equal(values(cache.get(path)), values(new))
    assert equal(values(old), before)
    assert len(cache) == 1
    wider = write(make_unet(), path, 31, ratio=0.5)
    os.utime(path, ns=(1, 1))
    assert equal(values(cache.get(path)), values(wider))
    assert reads == ["a", "a", "a"]


def test_what_is_kept_does_not_depend_on_the_file(folder):
    path, cache = folder / "a.safetensors", TunerCache(1)
    tuner = cache.get(path)
    before = values(tuner)
    with path.open("r+b") as file:  # in place, as a careless copy does
        file.write(b"\xff" * path.stat().st_size)
    assert equal(values(tuner), before)
    with pytest.raises(TunerFileError):
        cache.get(path)


def test_threads_that_ask_for_one_file_read_it_once(folder, reads, monkeypatch):
    inside, go, load = threading.Event(), threading.Event(), module.load_tuner

    def slow(path, **options):
        if path.stem == "a":
            inside.set()
            assert go.wait(30)
        return load(path, **options)

    monkeypatch.setattr(module, "load_tuner", slow)
    cache = TunerCache(4)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(cache.get, folder / "a.safetensors") for _ in range(6)]
        assert inside.wait(30)
        # Another file is not kept waiting meanwhile.
        other = pool.submit(cache.get, folder / "b.safetensors").result(30)
        go.set()
        got = [future.result(30) for future in asked]
    assert reads == ["b", "a"]
    assert all(tuner is got[0] for tuner in got)
    assert other is not got[0]


def test_many_threads_and_few_places(folder):
    wanted = {name: values(TunerCache(1).get(folder / f"{name}.safetensors")) for name in "abcd"}
    cache = TunerCache(2)

    def work(seed):
        order = torch.randint(4, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
        names = ["abcd"[number] for number in order]
        return all(equal(values(cache.get(folder / f"{name}.safetensors")), wanted[name]) for name in names)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
    assert len(cache) <= 2


def test_a_file_that_fails_fails_for_all_and_is_not_kept(folder, reads, monkeypatch):
    good = (folder / "a.safetensors").read_bytes()
    (folder / "a.safetensors").write_bytes(good[:-10])
    cache = TunerCache(2)
    for _ in range(2):
        with pytest.raises(TunerFileError, match="truncated"):
            cache.get(folder / "a.safetensors")
    assert reads == ["a", "a"]
    assert len(cache) == 0
    (folder / "a.safetensors").write_bytes(good)
    cache.get(folder / "a.safetensors")
    with pytest.raises(TunerFileError, match="There is no tuner file"):
        cache.get(folder / "none.safetensors")


def test_attaching_leaves_a_kept_tuner_as_it_is(folder):
    unet, inputs, cache = make_unet(), make_inputs(), TunerCache(2)
    kept = cache.get(folder / "a.safetensors")
    before = values(kept)
    with attach(unet, kept):
        attached = TunerManager.of(unet).tuner("default")
        assert not attached.shared
        assert {p.data_ptr() for p in attached.parameters()}.isdisjoint(p.data_ptr() for p in kept.parameters())
        tuned = run(unet, inputs)
        TunerManager.of(unet).swap("default", cache.get(folder / "b.safetensors"))
        assert not torch.equal(run(unet, inputs), tuned)
        attached.to(torch.float64)
        randomize(attached, 12)
    assert equal(values(kept), before)
    assert equal(values(cache.get(folder / "b.safetensors")), values(TunerCache(1).get(folder / "b.safetensors")))
    with attach(unet, cache.get(folder / "a.safetensors")):
        assert torch.equal(run(unet, inputs), tuned)


def test_a_pipeline_loads_and_swaps_from_a_cache(pipe, files, reads):
    cache = TunerCache(4)
    pipe.load_tuner_weights(files / "water.safetensors", cache=cache)
    assert pipe.get_list_tuners() == {"water": 1.0}
    cached = generate(pipe)
    pipe.load_tuner_weights(files / "water.safetensors", "water", hotswap=True, cache=cache)
    assert same(generate(pipe), cached)
    pipe.unload_tuner_weights()
    pipe.load_tuner_weights(files, weight_name="water.safetensors", cache=cache)
    assert same(generate(pipe), cached)
    assert reads == ["water"]
    pipe.unload_tuner_weights()
    pipe.load_tuner_weights(files / "water.safetensors")
    assert same(generate(pipe), cached)


@pytest.mark.parametrize("bounds", [{}, {"capacity": 0}, {"max_bytes": -1}, {"capacity": 3, "max_bytes": 0}])
def test_a_cache_needs_a_bound(bounds):
    with pytest.raises(RestuneError, match="positive `capacity`"):
        TunerCache(**bounds)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_memory_is_not_pinned_without_cuda(folder):
    with pytest.raises(RestuneError, match="needs CUDA"):
        TunerCache(1, pin_memory=True)
    assert not TunerCache(1).pin_memory


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_memory_is_pinned_with_cuda(folder):
    cache = TunerCache(1)
    tuner = cache.get(folder / "a.safetensors")
    assert all(parameter.is_pinned() for parameter in tuner.parameters())
    assert equal(values(tuner), values(TunerCache(1, pin_memory=False).get(folder / "a.safetensors")))
