"""Request router: what it takes from Ray's replicas and requests."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("ray")

from restune_diffusion.serving.cluster.router import TunerRouter

STATS = {"a": {"tuners": ["ink"], "alive": True}, "b": {}, "c": {"tuners": ["ink", "water"]}, "d": {"alive": False}}


def make_router(requests):
    """Return a router that is not connected to a cluster, for replicas with these numbers of requests."""
    router = object.__new__(TunerRouter)
    router._replica_queue_len_cache = SimpleNamespace(get=lambda replica: requests.get(replica.unique_id))
    router.initialize_state(advantage=4.0)
    return router


def order(router, **keywords):
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=n), routing_stats=s) for n, s in STATS.items()]
    ranks = asyncio.run(router.choose_replicas(replicas, SimpleNamespace(kwargs=keywords)))
    assert all(len(rank) == 1 for rank in ranks)
    return "".join(rank[0].replica_id.unique_id for rank in ranks)


def test_replicas_are_ranked_by_their_reports_and_requests():
    requests = {"a": 2, "b": 1, "c": 3}
    assert order(make_router(requests), tuners=["ink", "water"]) == "cabd"
    assert order(make_router(requests), tuners=["ink"]) == "acbd"
    assert order(make_router({**requests, "c": 6}), tuners=["ink", "water"]) == "abcd"
    assert order(make_router(requests), tuners=["ink"], avoid=["a"]) == "cbad"
    assert order(make_router(requests)) == "bacd"


def test_requests_that_arrive_together_go_to_one_replica_before_it_reports():
    router = make_router({"a": 1, "b": 0, "c": 1})
    assert order(router, tuners=["fire"])[0] == "b"
    router._replica_queue_len_cache.get = lambda replica: {"a": 1, "b": 3, "c": 1}.get(replica.unique_id)
    assert order(router, tuners=["fire"])[0] == "b"
    assert order(router, tuners=["snow"])[0] in "ac"
