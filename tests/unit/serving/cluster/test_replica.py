"""A replica in this process: its response, the tuners that it reports, and its health."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from restune_diffusion.serving import EngineStopped
from restune_diffusion.serving.cluster.replica import UNAVAILABLE

from ....conftest import TINY_BASE
from ....fragile_replica import FragileReplica
from ....serving_process import wait_for


class NamedReplica(FragileReplica):
    """Replica that needs no Ray to know its id."""

    _name = "first"


@pytest.fixture
def replica(files: Any) -> Any:
    replica = NamedReplica({"base": str(TINY_BASE), "tuners": str(files), "device": "cpu"})
    yield replica
    replica._engine.close()


def answer(replica: Any, **values: Any) -> list[Any]:
    body = json.dumps({"prompt": "a", "steps": 1, "size": "64x64", **values}).encode()
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/images/generations",
        "raw_path": b"",
        "query_string": b"",
        "scheme": "http",
        "headers": [(b"content-type", b"application/json")],
    }
    return asyncio.run(asyncio.wait_for(replica.reply(scope, body), 60))


def test_a_replica_reports_the_tuners_that_its_engine_holds(replica):
    assert replica.record_routing_stats() == {"tuners": [], "alive": True}
    assert answer(replica, model="ink")[0]["status"] == 200
    assert answer(replica, model="water:0.5")[0]["status"] == 200
    # Requests that name others are refused, or have no weight for them.
    assert answer(replica, model="fire")[0]["status"] == 404
    assert answer(replica, model="watercolor:0")[0]["status"] == 200
    assert replica.record_routing_stats() == {"tuners": ["water", "ink"], "alive": True}
    name, text = replica.metrics()
    assert name == "first"
    assert "restune_attached_tuners 2.0" in text


def test_a_stopped_engine_is_noticed_and_its_requests_end(replica):
    replica.check_health()
    assert replica.ready()
    engine = replica._engine
    # The waiting thread notices it when a request wakes it.
    replica.end_engine()
    start = time.monotonic()
    assert answer(replica, steps=150) == [{"type": UNAVAILABLE, "replica": "first"}]
    assert time.monotonic() - start < 30
    wait_for(lambda: not engine.alive)
    with pytest.raises(EngineStopped, match="The engine has stopped after an error"):
        replica.check_health()
    assert not replica.ready()
    assert replica.record_routing_stats()["alive"] is False
    assert answer(replica) == [{"type": UNAVAILABLE, "replica": "first"}]
