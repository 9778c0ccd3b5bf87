"""The engine: cancellation, eviction, limits, errors of one request, previews, and its threads."""

from __future__ import annotations

import itertools
import shutil
import threading
from typing import Any

import pytest
import torch

from restune_diffusion import (
    ConditionError,
    RestuneError,
    SkipConfig,
    Tuner,
    TunerFileError,
    TunerManager,
    TunerNameError,
    save_tuner,
)
from restune_diffusion.serving import (
    Engine,
    EngineStopped,
    ImageRequest,
    QueueFull,
    RequestCancelled,
    RequestFailed,
    RequestRefused,
    TunerLibrary,
)
from restune_diffusion.serving.execution.memory import decoding_bytes, row_bytes

from ...conftest import randomize
from ...fragile_replica import end_thread_of
from ...serving_base import assert_as_alone, gray, image


def finish(engine: Engine) -> int:
    """Compute steps until nothing is left, and return their number."""
    count = 0
    while engine.step():
        count += 1
    return count


def ask(seed: int = 0, **changes: Any) -> ImageRequest:
    return ImageRequest("a", **{"seed": seed, "steps": 3, "guidance": 2.0, **changes})


def tuned(*names: str, **changes: Any) -> ImageRequest:
    return ask(tuners=tuple((name, 1.0) for name in names), **changes)


def test_a_request_joins_at_the_next_step_and_leaves_after_its_last(make_engine):
    engine = make_engine(max_rows=8)
    long = engine.submit(ask(steps=6, guidance=1.0))
    engine.step()
    short = engine.submit(ask(steps=2))
    rows = []
    while engine.step():
        rows.append(engine.stats().rows)
        if len(rows) == 3:
            assert short.done
            assert not long.done
    # Guidance takes two rows in the same call; the last step only decodes.
    assert rows[:2] == [3, 3]
    assert rows[2:5] == [1, 1, 1]
    assert engine.stats().calls == 6


def test_cancelled_requests_free_their_rows(reference, tuners, make_engine):
    engine = make_engine(max_rows=2)
    running, waiting, last = (engine.submit(tuned("skip", seed=seed, steps=50)) for seed in range(3))
    engine.step()
    waiting.cancel()
    assert waiting.progress.state == "cancelled"
    running.cancel()
    engine.step()
    assert last.progress.state == "running"
    for ticket in (running, waiting):
        with pytest.raises(RequestCancelled):
            ticket.result(0)
    last.cancel()
    after = engine.submit(tuned("skip", seed=9))
    finish(engine)
    assert_as_alone(reference, tuners, [after.result(0)])
    stats = engine.stats()
    assert (stats.cancelled, stats.done, stats.running, stats.queued) == (3, 1, 0, 0)


def test_tuners_are_evicted_least_recently_used_and_never_in_use(base, reference, tuners, make_engine):
    engine = make_engine(max_rows=8, max_attached=2)
    long = engine.submit(tuned("skip", seed=1, steps=8))
    engine.step()
    first = engine.submit(tuned("res", seed=2, steps=2))
    # Both slots are in use until `first` ends, so the third waits, and so does the one behind it.
    third, behind = engine.submit(tuned("bypass", seed=3, steps=2)), engine.submit(ask(seed=4, steps=2))
    engine.step()
    assert [ticket.progress.state for ticket in (third, behind)] == ["waiting"] * 2
    finish(engine)
    assert engine.stats().tuner_evictions == 1
    # `bypass` was used last, `skip` ended last.
    assert set(TunerManager.of(base.unet).names) == {"skip", "bypass"}
    assert_as_alone(reference, tuners, [ticket.result(0) for ticket in (long, first, third, behind)])
    engine.submit(tuned("skip"))
    finish(engine)
    engine.submit(tuned("other"))
    finish(engine)
    assert set(TunerManager.of(base.unet).names) == {"skip", "other"}
    assert engine.stats().tuner_hits == 1
    engine.close()
    assert TunerManager.of(base.unet) is None


def test_a_tuner_of_weight_zero_is_not_even_read(base, make_engine):
    engine = make_engine()
    engine.submit(ask(tuners=(("skip", 0.0),)))
    finish(engine)
    assert engine.stats().tuner_misses == 0


def test_a_changed_file_is_used_by_the_next_request(base, reference, tuners, make_engine, tmp_path):
    shutil.copy(tuners / "skip.safetensors", tmp_path)
    engine = make_engine(tmp_path)
    before = engine.submit(tuned("skip", seed=1, steps=4))
    engine.step()
    changed = Tuner.for_base(base.unet, SkipConfig(ratio=0.25))
    randomize(changed, 77, std=0.2)
    save_tuner(changed, tmp_path / "skip.safetensors")
    after = engine.submit(tuned("skip", seed=1, steps=4))
    shutil.copy(tuners / "other.safetensors", tmp_path / "new.safetensors")
    new = engine.submit(tuned("new", seed=1, steps=4))
    finish(engine)
    assert_as_alone(reference, tmp_path, [after.result(0), new.result(0)])
    # The request that was running keeps the tuner that it began with.
    assert_as_alone(reference, tuners, [before.result(0)])
    # Unused versions go with the next attachment, or when their room is needed.
    assert engine.stats().tuners <= 3


def test_errors_of_one_request_do_not_hurt_the_others(base, reference, tuners, make_engine, tmp_path):
    for name in ("skip", "res"):
        shutil.copy(tuners / f"{name}.safetensors", tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"not a tuner")
    huge = Tuner.for_base(base.unet, SkipConfig())
    for parameter in huge.parameters():
        parameter.data.fill_(1e30)
    save_tuner(huge, tmp_path / "huge.safetensors")
    engine = make_engine(tmp_path, max_rows=12)
    good = [engine.submit(tuned("skip", seed=1)), engine.submit(tuned("res", seed=2, guidance=1.0))]
    infinite = engine.submit(tuned("huge", seed=3))
    with pytest.raises(TunerFileError, match="'broken' cannot be used"):
        engine.submit(tuned("broken"))
    with pytest.raises(TunerNameError, match="no tuner 'none'"):
        engine.submit(tuned("none"))
    with pytest.raises(TunerNameError):
        engine.submit(tuned("../skip"))
    finish(engine)
    with pytest.raises(RequestFailed, match="NaN or infinite"):
        infinite.result(0)
    assert_as_alone(reference, tmp_path, [ticket.result(0) for ticket in good])
    assert engine.stats().failed == 1
    assert engine.stats().refused == 3


def test_one_request_that_breaks_the_call_is_found(base, reference, tuners, make_engine, monkeypatch):
    engine = make_engine(max_rows=12)
    tickets = [engine.submit(tuned("skip", seed=seed)) for seed in range(3)]
    engine.step()
    bad = engine._running.next()[1]
    bad.state.embeds = bad.state.embeds[..., :5]
    finish(engine)
    with pytest.raises(RequestFailed, match="could not be generated"):
        tickets[1].result(0)
    assert_as_alone(reference, tuners, [tickets[0].result(0), tickets[2].result(0)])


def test_limits_are_refused_at_once(make_engine):
    engine = make_engine(max_queue=2, max_side=64, max_steps=20, max_pixels=32 * 64, max_attached=1)
    for request, message in (
        (ask(width=128), "64x32|a side has 64 pixels at most"),
        (ask(width=64, height=64), "2048 pixels at most"),
        (ask(width=33), "multiple of 8"),
        (ask(steps=21), "use 20 at most"),
        (tuned("skip", "res"), "use 1 at most"),
        (ask(steps=999, scheduler="lcm"), "at most|does not support"),
    ):
        with pytest.raises(RequestRefused, match=message):
            engine.submit(request)
    with pytest.raises(ConditionError, match="needs an image"):
        engine.submit(tuned("control"))
    with pytest.raises(ConditionError, match="No tuner of the request takes"):
        engine.submit(tuned("skip", conditions=gray(3)))
    engine.submit(ask())
    # All or none.
    with pytest.raises(QueueFull, match="try again later"):
        engine.submit_all([ask(), ask()])
    engine.submit(ask())
    with pytest.raises(QueueFull):
        engine.submit(ask())
    assert engine.stats().queued == 2
    finish(engine)
    assert engine.stats().done == 2
    engine.submit(ask())


def test_rows_follow_from_the_memory(base, make_engine):
    small, large = (4, 4), (8, 8)
    memory = decoding_bytes(base.vae, small, 8) + 3 * row_bytes(base.unet, small)
    engine = make_engine(max_rows=100, memory_bytes=memory)
    tickets = [engine.submit(ask(guidance=1.0)) for _ in range(5)]
    finish(engine)
    assert all(ticket.done for ticket in tickets)
    assert engine.stats().max_rows == 3
    assert row_bytes(base.unet, large) > 3 * row_bytes(base.unet, small)
    with pytest.raises(RequestRefused, match="An image of 64x64 needs about"):
        engine.submit(ask(width=64, height=64))


def test_text_embeddings_are_cached_by_text_and_tuner(make_engine):
    engine = make_engine(max_rows=16)
    for request in (ask(), ask(1), tuned("skip"), tuned("text"), tuned("text"), ask(tuners=(("text", 0.5),))):
        engine.submit(request)
    finish(engine)
    stats = engine.stats()
    # The prompt and the empty negative prompt, once without the text tuner and once for each of its weights.
    assert (stats.text_misses, stats.text_hits) == (6, 6)


def test_previews_approach_the_image(make_engine):
    engine = make_engine()
    ticket = engine.submit(ask(steps=6, preview_every=2, scheduler="euler"))
    seen: list[Any] = []
    ticket.listen(seen.append)
    finish(engine)
    assert [each.state for each in seen] == ["waiting", "running", *["running"] * 5, "decoding", "done"]
    assert [each.step for each in seen] == [0, 0, 1, 2, 3, 4, 5, 6, 6]
    previews = [each.preview for each in seen if each.preview is not None]
    assert len(previews) == 2
    final = torch.tensor(list(ticket.result(0).image.getdata())).float()
    errors = [float((torch.tensor(list(each.getdata())).float() - final).abs().mean()) for each in previews]
    assert errors[1] < errors[0]


def test_a_listener_that_fails_is_ignored(make_engine):
    engine = make_engine()
    ticket = engine.submit(ask())
    ticket.listen(lambda progress: 1 / 0)
    finish(engine)
    assert ticket.result(0).steps == 3


def test_threads(base, reference, tuners, make_engine):
    engine = make_engine(max_rows=4)
    engine.start()
    results: dict[int, Any] = {}

    def client(seed: int) -> None:
        ticket = engine.submit(tuned("skip" if seed % 2 else "lora", seed=seed))
        assert list(ticket.events(60))[-1].state == "done"
        results[seed] = ticket.result(0)

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for each in clients:
        each.start()
    for each in clients:
        each.join(60)
    assert_as_alone(reference, tuners, [results[seed] for seed in range(6)])
    last = engine.submit(ask())
    engine.stop(finish=True)
    assert last.result(0).steps == 3
    with pytest.raises(RequestCancelled, match="shutting down"):
        engine.submit(ask())
    engine.start()
    endless = engine.submit(ask(steps=150))
    engine.close()
    with pytest.raises(RequestCancelled, match="closed"):
        endless.result(0)
    assert TunerManager.of(base.unet) is None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("restune")]


def test_pipelines_that_are_refused(base, reference, tuners):
    with pytest.raises(RestuneError, match="serves Stable Diffusion"):
        Engine(object())
    reference.load_tuner_weights(tuners / "skip.safetensors")
    with pytest.raises(RestuneError, match="has tuners loaded"):
        Engine(reference)
    reference.unload_tuner_weights()
    with pytest.raises(TunerNameError, match="serves the base alone"):
        Engine(base).submit(tuned("skip"))


def test_a_random_seed_is_reported(reference, tuners, make_engine):
    engine = make_engine()
    tickets = [engine.submit(ask(seed=None)), engine.submit(ask(seed=None))]
    finish(engine)
    assert_as_alone(reference, tuners, [ticket.result(0) for ticket in tickets])
    assert tickets[0].seed != tickets[1].seed


def test_the_time_of_a_step_is_accounted_for(base, tuners):
    ticks = itertools.count()
    engine = Engine(base, TunerLibrary(tuners), clock=lambda: float(next(ticks)))
    engine.submit(tuned("skip", image=image()))
    # Every look at the clock takes a second.
    engine.step()
    stats = engine.stats()
    parts = (stats.unet_seconds, stats.vae_seconds, stats.text_seconds, stats.tuner_seconds, stats.scheduler_seconds)
    assert all(seconds >= 1 for seconds in (*parts, stats.overhead_seconds))
    assert sum(parts) + stats.overhead_seconds == next(ticks) - 1
    finish(engine)
    stats = engine.stats()
    assert sum(stats.latency_counts) == stats.done == 1
    engine.close()


def test_an_error_that_ends_the_thread_ends_all_requests_and_refuses_new_ones(make_engine):
    engine = make_engine(max_rows=2)
    assert not engine.alive
    engine.start()
    assert engine.alive
    running, waiting = (engine.submit(ask(seed=seed, steps=150)) for seed in range(2))
    end_thread_of(engine)
    for ticket in (running, waiting):
        with pytest.raises(EngineStopped):
            ticket.result(60)
    assert not engine.alive
    with pytest.raises(EngineStopped, match="a restart is needed"):
        engine.submit(ask())
    assert engine.stats().failed == 2
    engine.stop()
    engine.start()
    assert engine.alive
    assert engine.submit(ask(seed=7)).result(60).seed == 7


def test_the_engine_names_the_tuners_that_are_attached(make_engine):
    engine = make_engine(max_attached=2)
    for name, held in (("skip", ["skip"]), ("res", ["res", "skip"]), ("skip", ["skip", "res"])):
        engine.submit(tuned(name))
        finish(engine)
        assert engine.attached_tuners() == held
    engine.submit(tuned("bypass"))
    finish(engine)
    assert engine.attached_tuners() == ["bypass", "skip"]
