"""Admission and turns: no request waits for ever, whatever else arrives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from restune_diffusion.serving.execution.batching import Batches


def job(size: tuple[int, int], rows: int, steps: int = 3) -> Any:
    return SimpleNamespace(size=size, rows=rows, steps=steps)


A, B, C = (4, 4), (8, 8), (8, 4)


def turn(batches: Batches) -> list[Any]:
    """Compute a step, and remove the requests that are done."""
    batch = batches.next()
    for each in batch:
        each.steps -= 1
        if not each.steps:
            batches.remove(each)
    return batch


def test_a_request_of_another_size_gets_every_second_call_behind_a_stream():
    batches, waiting = Batches(lambda size: 4), []
    rare = job(B, 2, steps=5)
    calls = 0
    for step in range(100):
        waiting += [job(A, 2), job(A, 2)]
        if step == 10:
            waiting.append(rare)
        gone = batches.admit(waiting, lambda each: "admitted")
        waiting = [each for each in waiting if each not in gone]
        turn(batches)
        calls += step >= 10
        if not rare.steps:
            break
    assert calls == 10


def test_small_requests_do_not_overtake_a_large_one_of_their_size():
    batches = Batches(lambda size: 3)
    first, large = job(A, 2, steps=10), job(A, 2)
    small = [job(A, 1) for _ in range(5)]
    gone = batches.admit([first, large, *small], lambda each: "admitted")
    assert gone == [first]
    assert batches.next() == [first]


def test_one_that_waits_for_a_shared_resource_holds_back_the_younger_ones():
    batches = Batches(lambda size: 8)
    blocked, later = job(A, 1), job(B, 1)
    assert batches.admit([blocked, later], lambda each: "all wait" if each is blocked else "admitted") == []
    # One that is not ready yet, such as a file that is being read, holds back nobody.
    assert batches.admit([blocked, later], lambda each: "not yet" if each is blocked else "admitted") == [later]


def test_three_sizes_take_turns():
    batches = Batches(lambda size: 8)
    batches.admit([job(size, 1, 9) for size in (A, B, A, C)], lambda each: "admitted")
    assert [[each.size for each in batches.next()] for _ in range(6)] == [[A, A], [B], [C]] * 2


def test_a_call_is_split_after_its_limit_was_lowered():
    batches = Batches(lambda size: 8)
    jobs = [job(A, 2) for _ in range(4)]
    batches.admit(jobs, lambda each: "admitted")
    batches.lower_limit(A, 4)
    assert batches.next() == jobs[:2]
    assert batches.next() == jobs[2:]
    batches.lower_limit(A, 0)
    # A request of two rows runs even where one row is the limit, alone.
    assert [len(batches.next()) for _ in range(4)] == [1] * 4
