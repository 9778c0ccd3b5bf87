"""Request router of Ray Serve that prefers a replica which holds the tuners of a request."""

from __future__ import annotations

import time

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from .ranking import ReplicaState, SentTuners, ranked


class TunerRouter(RequestRouter):
    """Router that ranks replicas by their requests and by the tuners of the request that they hold.

    A replica that is full is skipped. The keywords `tuners` and `avoid` of a call are for this router.
    """

    def initialize_state(self, advantage: float = 8.0) -> None:
        """Set the keywords of the deployment's `RequestRouterConfig`.

        Args:
            advantage: number of requests that a replica may have more because it holds the tuners of a request.
        """
        self._advantage = advantage
        self._sent = SentTuners()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas, the preferred one first."""
        keywords = {} if pending_request is None else pending_request.kwargs
        wanted, now = set(keywords.get("tuners", ())), time.monotonic()
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        states = [
            ReplicaState(
                name,
                frozenset(replica.routing_stats.get("tuners", ())) | self._sent.on(name, now),
                self.replica_queue_len_cache.get(replica.replica_id) or 0,
                replica.routing_stats.get("alive", True),
            )
            for name, replica in by_name.items()
        ]
        names = ranked(states, wanted, self._advantage, keywords.get("avoid", ()))
        if names and wanted:
            self._sent.add(names[0], wanted, now)
        return [[by_name[name]] for name in names]
