"""Request router of Ray Serve that prefers a replica which has used the tuners of a request."""

from __future__ import annotations

import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class TunerRouter(RequestRouter):
    """Router that ranks replicas by the number of the request's tuners that they have used last.

    Replicas of one rank are compared by the length of their queues. A replica that is full is skipped.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas in ranks, the preferred ones first."""
        wanted = set() if pending_request is None else set(pending_request.kwargs.get("tuners", ()))
        ranks: dict[int, list[RunningReplica]] = {}
        for replica in candidate_replicas:
            held = len(wanted.intersection(replica.routing_stats.get("tuners", ())))
            ranks.setdefault(held, []).append(replica)
        # Two of each rank, as their queues are asked for.
        return [random.sample(ranks[held], min(2, len(ranks[held]))) for held in sorted(ranks, reverse=True)]
