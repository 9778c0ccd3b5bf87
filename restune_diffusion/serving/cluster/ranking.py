"""Order in which replicas are tried for a request, without Ray."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

REPORT_SECONDS = 5.0
"""Time after which a tuner that a request has brought to a replica is in the replica's own report, or is not there."""


@dataclass(frozen=True)
class ReplicaState:
    """State of a replica that the router knows.

    Args:
        name: id of the replica.
        tuners: tuners that its engine holds.
        requests: requests that it has.
        alive: whether its engine works.
    """

    name: str
    tuners: frozenset[str] = frozenset()
    requests: int = 0
    alive: bool = True


def ranked(
    replicas: Sequence[ReplicaState], wanted: Collection[str], advantage: float, avoid: Collection[str] = ()
) -> list[str]:
    """Return the ids of replicas, the preferred one first.

    A replica that holds the tuners of a request is preferred, as long as it has less than `advantage` requests more
    than one that holds none of them. Among equal ones, the one with the fewest tuners is preferred.

    Args:
        replicas: the replicas.
        wanted: tuners of the request.
        advantage: number of requests that a replica may have more because it holds all tuners of the request.
        avoid: ids of replicas that could not answer the request.
    """

    def cost(replica: ReplicaState) -> tuple[bool, float, int, float]:
        missing = len(set(wanted) - replica.tuners) / max(1, len(wanted))
        unfit = not replica.alive or replica.name in avoid
        return unfit, replica.requests + advantage * missing, len(replica.tuners), random.random()

    return [replica.name for replica in sorted(replicas, key=cost)]


class SentTuners:
    """Tuners that requests have brought to replicas, until the replicas report them.

    Without it, requests of one tuner that arrive together would go to different replicas.
    """

    def __init__(self) -> None:
        self._sent: dict[tuple[str, str], float] = {}

    def add(self, replica: str, tuners: Collection[str], now: float) -> None:
        """Remember a request for tuners that is sent to a replica.

        Args:
            replica: id of the replica.
            tuners: the tuners.
            now: time in seconds.
        """
        self._sent = {key: time for key, time in self._sent.items() if now - time < REPORT_SECONDS}
        self._sent.update({(replica, tuner): now for tuner in tuners})

    def on(self, replica: str, now: float) -> frozenset[str]:
        """Return the tuners that were sent to a replica within the last seconds."""
        return frozenset(
            tuner for (name, tuner), time in self._sent.items() if name == replica and now - time < REPORT_SECONDS
        )
